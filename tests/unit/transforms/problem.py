"""A small model with its gradients and statistics, for tests of K-FAC inside other transformations."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

import kfac_func as kf
from kfac_func._tree import unique_paths

G = torch.Generator().manual_seed(0)
X, Y = (torch.randn(8, size, generator=G, dtype=torch.float64) for size in (3, 2))

FN, PARAMS = kf.make_functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
STEP: Any = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=kf.estimators.exact())


def passed(params: Any = PARAMS, rows: slice = slice(None)) -> tuple[Any, Any]:
    """The gradients and the statistics of some rows of the batch."""
    _, grads, stats = STEP(params, (X[rows], Y[rows]))
    return grads, stats


def run(tx: Any, steps: int = 3, state: Any = None, **extras: Any) -> tuple[Any, Any]:
    """Parameters and state after some steps on the whole batch."""
    params, state = PARAMS, tx.init(PARAMS) if state is None else state
    for _ in range(steps):
        grads, stats = passed(params)
        updates, state = tx.update(grads, state, params, stats=stats, **extras)
        params = kf.apply_updates(params, updates)
    return params, state


def close(got: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    got, wanted = unique_paths(got), unique_paths(wanted)
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        torch.testing.assert_close(got[path], value, rtol=tolerance, atol=tolerance)


def reloaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
