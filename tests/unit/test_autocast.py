"""The whole iteration in one autocast block: updates, states and quadratic models keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfac_func as kf
from kfac_func._tracing import without_autocast
from kfac_func._tree import leaves

C = kf.curvature
torch.manual_seed(0)
FN, PARAMS = kf.make_functional(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)))
BATCH = torch.randn(64, 4), torch.randn(64, 3)
LOSS, EXACT = kf.losses.mse(), kf.estimators.exact()
_, GRADS, STATS = kf.value_grad_and_stats(FN, LOSS, estimator=EXACT)(PARAMS, BATCH)
PARTS = [STATS] if STATS is not None else []
RECIPES: dict[str, Callable[[], Any]] = {
    "kfac": kf.kfac,
    "kfac, exact": lambda: kf.kfac(split="exact"),
    "ekfac": kf.ekfac,
    "kpsvd": kf.kpsvd,
    "deflation": kf.deflation,
    "lanczos": kf.lanczos,
    "corrected": kf.corrected,
    "inverse_free": kf.inverse_free,
    "two_level": kf.two_level_kfac,
    "exact_natural_gradient": kf.exact_natural_gradient,
    "diagonal": lambda: kf.kfac(C.diagonal()),
    "chain": lambda: kf.chain(kf.kfac(), kf.clip_by_kl(1e-3, learning_rate=0.1), kf.sgd(0.1)),
}


def exactly(one: Any, other: Any) -> None:
    assert all(map(torch.equal, leaves(one), leaves(other)))
    assert len(leaves(one)) == len(leaves(other)) > 0


def inside(fn: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype is torch.bfloat16
        return fn()


@pytest.mark.parametrize("recipe", RECIPES)
def test_updates(recipe: str):
    tx = RECIPES[recipe]()

    def two() -> Any:
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, stats=STATS)
        return tx.update(GRADS, state, PARAMS, stats=[*PARTS, *PARTS], refresh=True)

    exactly(inside(two), two())


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "chain"])
def test_the_two_primitives(recipe: str):
    state = RECIPES[recipe]().init(PARAMS)

    def both() -> Any:
        seen = kf.observe(state, PARTS)
        return seen, kf.precondition(seen, GRADS), kf.natural_gradient_norm(seen, GRADS)

    exactly(inside(both), both())


@pytest.mark.parametrize("curvature", [C.kronecker, C.eigen, C.diagonal, C.kpsvd])
def test_the_curvature_of_a_data_set(curvature: Any):
    def run() -> Any:
        return kf.fit_curvature(FN, LOSS, PARAMS, [BATCH], curvature=curvature(), split="pi")

    exactly(inside(run), run())


def test_quadratic_models():
    model = kf.quadratic_model(FN, LOSS, l2=1e-3)
    inner = kf.chain(kf.kfac(), kf.scale_by_quadratic_model(model))
    tx = kf.adapt_damping(inner, kf.levenberg_marquardt(interval=1), model=model, reject=True, calibrate=True)

    def run() -> Any:
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, stats=STATS, batch=BATCH)

    exactly(inside(run), run())


def test_only_the_body_is_without():
    seen = []

    @without_autocast
    def body(device: str) -> None:
        seen.append(torch.is_autocast_enabled(device))

    body("cpu")
    with torch.autocast("cpu"):
        body("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False, False]


def test_it_compiles():
    @without_autocast
    def body(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    x = torch.eye(2)
    assert torch.equal(torch.compile(body, fullgraph=True, backend="eager")(x), x)
