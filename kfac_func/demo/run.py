"""The command line of the demo: train, tell, plot; or search the rates again with `--tune`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kfac_func.demo import data, models
from kfac_func.demo.packages import require
from kfac_func.demo.report import table, verdict
from kfac_func.demo.training import MOMENTUM, Budget, Method, Problem, train
from kfac_func.diagnostics.plots import History, loss_curves

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
DAMPINGS = (0.001, 0.01, 0.1, 1.0)

CURVES_METHODS = (Method("K-FAC", 0.03, 0.1), Method("Adam", 0.003), Method("SGD", 0.003))
DIGITS_METHODS = (Method("K-FAC", 0.03, 0.1), Method("Adam", 0.003), Method("SGD", 0.03))


def problems(names: str, *, seed: int, steps: int | None, quick: bool) -> list[Problem]:
    """The problems called "curves", "digits" or "both", cut down to a few seconds when `quick`.

    >>> [(p.name, tuple(p.images.shape), p.steps) for p in problems("curves", seed=0, steps=7, quick=True)]
    [('curves', (200, 784), 7)]
    """
    found = []
    if names in ("curves", "both"):
        images = data.curves(200 if quick else 2000, torch.Generator().manual_seed(seed))
        found.append(Problem("curves", images, models.CURVES, 100 if quick else 500, 200, CURVES_METHODS))
    if names in ("digits", "both"):
        found.append(Problem("digits", data.digits(), models.DIGITS, 300, 400, DIGITS_METHODS))
    return [problem._replace(steps=steps or (6 if quick else problem.steps)) for problem in found]


def compare(problem: Problem, methods: Sequence[Method], seed: int, device: str) -> dict[str, History]:
    """Train with every method: the first for its steps, the others for as many steps AND as many seconds as the first.

    A method that is cheaper per step therefore gets more steps.
    """
    every = max(1, problem.steps // 20)
    histories: dict[str, History] = {}
    budget = Budget(problem.steps)
    for method in methods:
        with _bar(f"{problem.name} {method.name}") as progress:
            history = train(problem, method, budget, seed=seed, device=device, every=every, progress=progress)
        histories[method.name] = history
        budget = Budget(problem.steps, max(budget.seconds, history.seconds[-1]) if not budget.seconds else budget.seconds)
    return histories
