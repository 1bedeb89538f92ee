"""Cases of `test_errors` for matrix-free products and the norms made of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfac_func as kf
from kfac_func import errors
from kfac_func.precondition import natural_gradient_norm
from tests.error_cases import Case

FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
INPUTS, TARGETS = torch.ones(4, 3), torch.zeros(4, 2)
BATCH = INPUTS, TARGETS
MSE = kf.losses.mse()
BAD = {"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}
HYPER, MISMATCH, BATCHES = errors.HyperparameterError, errors.TreeMismatchError, errors.BatchError
GGN, HVP = kf.products.ggn_vp(FN, MSE), kf.products.hvp(FN, MSE)


def times(vector: Any, made: Callable[..., Any] = GGN) -> Callable[[], Any]:
    return lambda: made(PARAMS, BATCH)(vector)


def over(batches: Any) -> Callable[[], Any]:
    return lambda: kf.products.accumulate(GGN, PARAMS, batches, loss=MSE)(PARAMS)


def without_scipy() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scipy.sparse.linalg", None)
        kf.products.as_scipy(lambda v: v, PARAMS)


CASES = {
    "an unknown leaf": Case(times({**PARAMS, "scale": torch.ones(1)}), MISMATCH, "'scale'", "the same parameters"),
    "a leaf is missing": Case(times({"weight": PARAMS["weight"]}), MISMATCH, "'bias'", "the same parameters"),
    "a leaf of another shape": Case(
        times({**PARAMS, "weight": torch.ones(3, 2)}, HVP), MISMATCH, "'weight'", "wanted   [2, 3]"
    ),
    "a vector with NaN": Case(times(BAD), HYPER, "'weight'", "would be NaN"),
    "a model with NaN": Case(lambda: GGN(BAD, BATCH), BATCHES, "outputs are not finite", "look for NaN"),
    "a gradient with NaN": Case(
        lambda: HVP(PARAMS, (INPUTS, TARGETS + torch.inf)), BATCHES, "gradient of the loss", "in the targets"
    ),
    "no examples for a Hessian": Case(lambda: HVP(PARAMS, (INPUTS[:0], TARGETS)), BATCHES, "[0, 3]", "at least one"),
    "no examples for a Jacobian": Case(lambda: kf.products.jvp(FN)(PARAMS, INPUTS[:0]), BATCHES, "[0, 3]", "at least"),
    "outputs that are no examples": Case(
        lambda: kf.products.vjp(lambda p, x: FN(p, x).sum())(PARAMS, INPUTS), BATCHES, "outputs []", "return [N,"
    ),
    "nothing to multiply with": Case(
        lambda: kf.products.fisher_vp(FN, MSE, kf.estimators.forward_only())(PARAMS, BATCH),
        HYPER, "forward_only", "monte_carlo()",
    ),
    "a draw from nowhere": Case(
        lambda: kf.products.fisher_vp(FN, MSE, kf.estimators.monte_carlo())(PARAMS, BATCH),
        HYPER, "monte_carlo", "generator=",
    ),
    "noise of another shape": Case(
        lambda: kf.products.fisher_vp(FN, MSE, kf.estimators.monte_carlo())(PARAMS, BATCH, noise=TARGETS),
        HYPER, "[4, 2]", "wanted  [1, 4, 2]",
    ),
    "no vectors": Case(lambda: kf.products.fisher_forms(FN, MSE)(PARAMS, BATCH)([]), HYPER, "no vectors", "a list of"),
    "no batches": Case(over([]), BATCHES, "no batches", "at least one batch"),
    "batches that are read once": Case(over(iter([BATCH])), HYPER, "only once", "list(batches)"),
    "no SciPy": Case(without_scipy, errors.MissingPackageError, "SciPy", "pip install scipy"),
    "a gradient without a norm": Case(
        lambda: natural_gradient_norm(kf.kfac().init(PARAMS), BAD), HYPER, "gradient is not finite", "would be NaN"
    ),
}  # fmt: skip
