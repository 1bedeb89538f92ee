"""Cases of `test_errors` for what must not pass in silence: keywords, stored statistics, losses, edges of layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from kfac_func.estimators.storing import KINDS, kind_named
from tests.error_cases import Case

FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
STEP: Any = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=kf.estimators.exact())
BATCH = torch.arange(12.0).reshape(4, 3), torch.zeros(4, 2)
STATE, HYPER, CAPTURE = errors.StateError, errors.HyperparameterError, errors.CaptureError


def homeless() -> None:
    copy.deepcopy(KINDS["base.dense"]._replace(name="mine", rows=lambda x, options: x))


def takes(name: str) -> Callable[[], Any]:
    """A function of the library that is given a loss of torch's."""
    torchs: Any = nn.CrossEntropyLoss()
    state = kf.observe(kf.kfac().init(PARAMS), STEP(PARAMS, BATCH)[2])
    calls = {
        "accumulate": lambda: kf.products.accumulate(lambda p, b: p, PARAMS, [BATCH], loss=torchs),
        "scores": lambda: kf.influence.scores(FN, torchs, PARAMS, state, [BATCH], [BATCH], damping=0.1),
        "self_influence": lambda: kf.influence.self_influence(FN, torchs, PARAMS, state, [BATCH], damping=0.1),
        "fit": lambda: kf.laplace.fit(FN, torchs, PARAMS, [BATCH]),
        "dense_ggn": lambda: kf.testing.dense_ggn(FN, torchs, PARAMS, BATCH),
    }
    return calls[name] if name in calls else lambda: getattr(kf.products, name)(FN, torchs)


PRODUCTS = ("hvp", "ggn_vp", "fisher_vp", "ggn_factor", "fisher_forms", "kl_quadratic", "fisher_rao_norm")
PER_EXAMPLE = ("per_example_grads", "per_example_norms", "per_example_gram", "fisher_diagonal", "per_example_traces")
TAKERS = (*PRODUCTS, *PER_EXAMPLE, "accumulate", "scores", "self_influence", "fit", "dense_ggn")


def empty(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    fn, params = kf.make_functional(nn.Sequential(module))
    return lambda: kf.make_plan(lambda p, x: fn(p, x).flatten(1).sum(1, keepdim=True), params, x)


CASES = {
    "an embedding of no tokens": Case(
        empty(nn.Embedding(5, 3), torch.zeros(4, 0, dtype=torch.long)), CAPTURE, "'0.weight'", "leave the empty"
    ),
    "an embedding of no width": Case(
        empty(nn.Embedding(5, 0), torch.zeros(4, 2, dtype=torch.long)), CAPTURE, "[2, 2, 0]", "leave the empty"
    ),
    "an empty normalisation": Case(empty(nn.LayerNorm(0), torch.zeros(4, 0)), CAPTURE, "parameter [0]", "leave the"),
    **{
        f"a loss of torch in {name}": Case(takes(name), HYPER, "CrossEntropyLoss()", "kf.losses.cross_entropy()")
        for name in TAKERS
    },
    "a kind of nowhere": Case(homeless, STATE, "'mine'", "right after a step"),
    "a kind of another version": Case(lambda: kind_named("base.sparse", "x"), STATE, "'base.sparse'", "after a step"),
}  # fmt: skip
