"""Cases of `test_errors` for the public oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from tests.error_cases import Case, wrong

FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
X, Y = torch.ones(4, 3), torch.zeros(4, 2)
MSE, T = kf.losses.mse(), kf.testing
BATCH, HYPER = errors.BatchError, errors.HyperparameterError
REGIME = T.Regime(FN, PARAMS, (X, Y), MSE)


def ggn(fn: Callable = FN, params: Any = PARAMS, x: Any = X, y: Tensor = Y, **options: Any) -> Callable[[], Any]:
    return lambda: T.dense_ggn(fn, MSE, params, (x, y), **options)


def positioned(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, p["weight"], p["bias"]) + F.linear(torch.ones(1, 3), p["place"])


def exact(*args: Any) -> Callable[[], Any]:
    return lambda: T.assert_exact(*args)


SPOILT = {"weight": torch.full((2, 3), torch.nan), "bias": torch.zeros(2)}
SHARED = REGIME._replace(fn=positioned, params=PARAMS | {"place": torch.ones(2, 3)})

CASES = {
    "outputs without examples": Case(ggn(lambda p, x: FN(p, x).T), BATCH, "[2, 4]", "return [N,"),
    "no examples": Case(ggn(x=X[:0], y=Y[:0]), BATCH, "[0, 3]", "at least one"),
    "parameters not finite": Case(ggn(params=SPOILT), BATCH, "'weight', not finite", "torch.isfinite"),
    "block not finite": Case(ggn(params=SPOILT, blocks=True), BATCH, "'weight', not finite", "torch.isfinite"),
    "outputs not finite": Case(ggn(x=X / 0), BATCH, "outputs of the model, not finite", "torch.isfinite"),
    "targets not finite": Case(
        lambda: T.dense_empirical_fisher(FN, MSE, PARAMS, (X, Y / 0)), BATCH, "targets, not finite", "torch.isfinite"
    ),
    "derivatives not finite": Case(
        ggn(lambda p, x: FN(p, x) + (p["bias"] * 0).sqrt()), BATCH, "derivatives", "torch.isfinite"
    ),
    "no parameters": Case(ggn(params={}), errors.TreeMismatchError, "no parameters", "a tree of tensors"),
    "an integer": Case(
        ggn(params=PARAMS | {"steps": torch.tensor(1)}), errors.TreeMismatchError, "'steps'", "out of params"
    ),
    "a number": Case(ggn(params=PARAMS | {"steps": 1}), errors.TreeMismatchError, "'steps'", "out of params"),
    "too large": Case(ggn(limit=7), HYPER, "8 x 8 numbers", "blocks=True, for the diagonal blocks alone; or limit=8"),
    "a block too large": Case(ggn(limit=7, blocks=True), HYPER, "block 'weight'", "limit=8"),
    "no vectors": Case(
        lambda: T.dense_fisher(FN, MSE, PARAMS, (X, Y), estimator=kf.estimators.forward_only()),
        HYPER, "forward_only", "exact()",
    ),
    "no generator": Case(
        lambda: T.dense_fisher(FN, MSE, PARAMS, (X, Y), estimator=kf.estimators.monte_carlo()),
        HYPER, "monte_carlo", "generator",
    ),
    "no such regime": Case(exact("linea"), HYPER, "'linea'", "'linear'"),
    "no regime": Case(exact(kf.curvature.kronecker()), HYPER, "needs a regime", "kf.testing.regimes()"),
    "no such block": Case(
        exact(kf.curvature.diagonal(), REGIME._replace(blocks=("w",))), HYPER, "wanted   'w'", "path of their weight"
    ),
    "no matrix block": Case(exact(kf.curvature.kronecker(), "rms_norm"), HYPER, "a matrix block", "kronecker"),
    "no such kind": Case(exact("conv", REGIME), HYPER, "'conv'", "'linear'"),
    "a shared use": Case(exact(kf.curvature.diagonal(), SHARED), HYPER, "all examples share", "expand its input"),
    "factored damping alone": Case(exact(kf.curvature.deflation(), "expand"), HYPER, "deflation", "split='pi'"),
    "an unknown thing": Case(exact(wrong(3)), HYPER, "needs a regime", "Regime of your own"),
}  # fmt: skip
