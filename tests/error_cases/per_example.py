"""Cases of `test_errors` for per-example quantities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from kfac_func.products.rows import example_rows
from kfac_func.products.sources import unit_vectors
from tests.error_cases import Case, wrong

P = kf.products
FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
BATCH = torch.ones(4, 3), torch.zeros(4, 2)
MSE = kf.losses.mse()
HYPER, CAPTURE = errors.HyperparameterError, errors.CaptureError


def gated(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"]) * p["gain"].exp()


def placed(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"]) + F.embedding(torch.arange(2), p["place"]).sum(0)


def interleaved(p: Any, x: Tensor) -> Tensor:
    return F.linear(torch.stack([x, 2 * x]).flatten(0, 1), p["w"]).unflatten(0, (2, -1)).sum(0)


GATED = {"w": torch.ones(2, 3), "gain": torch.ones(2)}
PLACED = {"w": torch.ones(2, 3), "place": torch.ones(2, 2)}
X = torch.arange(12.0).reshape(4, 3)

CASES = {
    "route": Case(lambda: P.jacobian(FN, route=wrong("loops"))(PARAMS, X), HYPER, "'loops'", "'tape' or 'vmap'"),
    "chunk size": Case(lambda: P.jacobian(FN, chunk_size=0)(PARAMS, X), HYPER, "chunk_size", "at least 1"),
    "outputs": Case(lambda: P.empirical_ntk(FN, wrong("mean")), HYPER, "'mean'", "'full' or 'trace'"),
    "unseen": Case(lambda: P.jacobian(gated, route="tape")(GATED, X), CAPTURE, "'gain'", "route='vmap'"),
    "shared": Case(lambda: P.jacobian(placed, route="tape")(PLACED, X), CAPTURE, "'place'", "route='vmap'"),
    "no plan": Case(
        lambda: P.jacobian(interleaved, route="tape")({"w": torch.ones(2, 3)}, X), CAPTURE, "'w'", "route='vmap'"
    ),
    "outputs without examples": Case(
        lambda: P.jacobian(lambda p, x: FN(p, x).T, route="vmap")(PARAMS, X),
        errors.BatchError, "[4, 3]", "outputs [N, ...]",
    ),
    "no such block": Case(
        lambda: example_rows(FN, PARAMS, X, unit_vectors, only=["head*"]),
        HYPER, "'head*'", "mend the pattern",
    ),
    "no vectors": Case(
        lambda: P.fisher_diagonal(FN, MSE, kf.estimators.forward_only())(PARAMS, BATCH),
        HYPER, "forward_only", "monte_carlo()",
    ),
    "no generator": Case(
        lambda: P.per_example_traces(FN, MSE, kf.estimators.monte_carlo())(PARAMS, BATCH),
        HYPER, "monte_carlo", "generator=",
    ),
    "noise": Case(
        lambda: P.fisher_diagonal(FN, MSE, kf.estimators.monte_carlo())(PARAMS, BATCH, noise=torch.ones(4, 2)),
        HYPER, "[4, 2]", "wanted  [1, 4, 2]",
    ),
    "empty": Case(
        lambda: P.per_example_norms(FN, MSE)(PARAMS, (X[:0], BATCH[1][:0])), errors.BatchError, "[0, 3]", "at least one"
    ),
    "NaN": Case(
        lambda: P.per_example_grads(FN, MSE)(PARAMS, (X / X[:1], BATCH[1])),
        errors.BatchError, "NaN for 1 of 4 examples", "the parameters and the inputs",
    ),
}  # fmt: skip
