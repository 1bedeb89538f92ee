"""Cases of `test_errors` for linear operators and for the curvature of a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kfac_func as kf
from kfac_func import errors
from tests.error_cases import Case

FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
BATCH = torch.eye(3), torch.zeros(3, 2)
MSE = kf.losses.mse()
C = kf.curvature
HYPER, MISMATCH, STATE = errors.HyperparameterError, errors.TreeMismatchError, errors.StateError


def fit(batches: Any = (BATCH,), **options: Any) -> Callable[[], Any]:
    return lambda: kf.fit_curvature(FN, MSE, PARAMS, batches, **options)


def operator(params: Any = PARAMS, **options: Any) -> Any:
    return kf.linear_operator(fit()(), params, **options)


def coupled() -> Any:
    return kf.linear_operator(fit(curvature=C.full())(), PARAMS)


CASES = {
    "one pass": Case(fit(iter([BATCH])), HYPER, "only once", "pass a list or a loader"),
    "no batch": Case(fit([]), errors.BatchError, "no batch", "at least one"),
    "nan": Case(fit([(BATCH[0] * torch.nan, BATCH[1])]), STATE, "batch 0", "leave such examples out"),
    "a window": Case(fit([BATCH, BATCH], curvature=C.block_diagonal()), STATE, "the last 1 batch", "window="),
    "several states": Case(lambda: kf.linear_operator((fit()(), fit()()), PARAMS), STATE, "several", "one of them"),
    "no statistics": Case(lambda: kf.linear_operator(kf.kfac().init(PARAMS), PARAMS), STATE, "no stat", "kf.observe"),
    "between blocks": Case(coupled, STATE, "full[", "blockwise()"),
    "other parameters": Case(lambda: operator({"w": PARAMS["weight"]}), MISMATCH, "'bias'", "value_grad_and_stats"),
    "negative damping": Case(lambda: operator(damping=-1.0), HYPER, "damping", "got"),
    "another vector": Case(
        lambda: operator().matvec({"weight": torch.ones(3, 2)}), MISMATCH, "'weight'", "like the parameters"
    ),
    "an unknown leaf": Case(lambda: operator().solve({"v": torch.ones(1)}), MISMATCH, "'v'", "like the parameters"),
    "a vector with NaN": Case(
        lambda: operator().solve({"weight": PARAMS["weight"] * torch.nan, "bias": None}), HYPER, "'weight'", "got"
    ),
    "no generator": Case(lambda: operator().sample(), HYPER, "generator", "noise="),
}
