"""Autocast inside of a model and around a step: gradients and curvature are those of the net, as far as halves tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func.blocks import squares
from tests.kinds import truth
from tests.zoo import close, kronecker_block

N = 16
LOSS = kf.losses.cross_entropy()
HALVES = [torch.bfloat16, torch.float16]
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 6, generator=G), torch.randint(3, (N,), generator=G)
IMAGES, IDS = torch.randn(N, 2, 5, 5, generator=G), torch.randint(7, (N, 4), generator=G)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        e = self.table(ids)
        return self.head((e + self.mix(e, e, e, need_weights=False)[0]).mean(1))


class Tied(nn.Module):
    """One weight, twice, of which one use stays in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.body(x.float()).tanh()
        return self.head(self.body(h))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), X),
    "conv": (Conv, IMAGES),
    "attention": (Attentive, IDS),
    "tied": (Tied, X),
}
each = pytest.mark.parametrize("name", NETS)
halves = pytest.mark.parametrize("half", HALVES, ids=str)


def made(name: str, half: torch.dtype) -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    """The net in float32, and under autocast."""
    torch.manual_seed(0)
    build, inputs = NETS[name]
    fn, params = kf.make_functional(build())

    def mixed(p: dict, x: Tensor) -> Tensor:
        with torch.autocast("cpu", half):
            return fn(p, x).float()

    return fn, mixed, params, inputs


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@each
@halves
def test_gradients_are_those_of_torch(name, half):
    _, mixed, params, x = made(name, half)
    wanted = truth.gradient(mixed, LOSS.value, params, x, Y)
    for estimator in (kf.estimators.exact(), kf.estimators.monte_carlo(), kf.estimators.empirical()):
        step: Any = kf.value_grad_and_stats(mixed, LOSS, estimator=estimator)
        grads = step(params, (x, Y), generator=truth.seeded())[1]
        assert {leaf.dtype for leaf in grads.values()} == {torch.float32}
        largest = max(float(leaf.norm()) for leaf in wanted.values())
        for path, leaf in wanted.items():
            assert float((grads[path] - leaf).norm()) < 2e-2 * largest, path


@each
@halves
def test_curvature_is_that_of_the_net_in_full(name, half):
    fn, mixed, params, x = made(name, half)
    steps: list[Any] = [kf.value_grad_and_stats(f, LOSS, estimator=kf.estimators.exact()) for f in (mixed, fn)]
    found, wanted = (step(params, (x, Y))[2].blocks() for step in steps)
    for block, one in found.items():
        assert off(squares(one), squares(wanted[block])) < 4e-2, block
        if one.layout.matrix:
            assert off(kronecker_block(one), kronecker_block(wanted[block])) < 4e-2, block
            assert kronecker_block(one).dtype == torch.float32
    updates = []
    for step in steps:
        _, grads, stats = step(params, (x, Y))
        tx = kf.kfac(damping=0.1)
        updates.append(tx.update(grads, tx.init(params), params, stats=stats)[0])
    scale = max(float(leaf.norm()) for leaf in updates[1].values())
    assert all(float((updates[0][path] - leaf).norm()) < 5e-2 * scale for path, leaf in updates[1].items())


@each
def test_examples_and_kernels_are_those_of_the_net_in_full(name):
    fn, mixed, params, x = made(name, torch.bfloat16)
    found, wanted = (kf.products.per_example_grads(f, LOSS, route="tape")(params, (x, Y)) for f in (mixed, fn))
    scale = max(float(leaf.norm()) for leaf in wanted.values())
    assert all(float((found[path] - leaf).norm()) < 3e-2 * scale for path, leaf in wanted.items())
    assert off(*(kf.products.empirical_ntk(f, route="tape")(params, x) for f in (mixed, fn))) < 3e-2
    assert off(*(kf.products.per_example_traces(f, LOSS, route="tape")(params, (x, Y)) for f in (mixed, fn))) < 3e-2


@each
def test_steps_inside_and_outside_of_autocast_take_turns(name):
    """What a step under autocast leaves behind is not taken for a step without, and the other way round."""
    fn, mixed, params, x = made(name, torch.bfloat16)
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    plain = truth.gradient(fn, LOSS.value, params, x, Y)
    rough = truth.gradient(mixed, LOSS.value, params, x, Y)
    scale = max(float(leaf.norm()) for leaf in plain.values())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            inside = step(params, (x, Y))[1]
        outside = step(params, (x, Y))[1]
        assert all(close(outside[path], leaf, 1e-5) for path, leaf in plain.items() if leaf.norm() > 1e-3 * scale)
        assert all(float((inside[path] - leaf).norm()) < 2e-2 * scale for path, leaf in rough.items())


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_part_of_the_net_in_halves(where):
    """The rest is as exact as it was."""
    w, v = torch.randn(8, 6, generator=G), torch.randn(3, 8, generator=G)

    def fn(p: dict, x: Tensor) -> Tensor:
        if where == "before":
            h = F.linear(x.bfloat16(), p["w"].bfloat16()).float().tanh()
            return F.linear(h, p["v"])
        h = F.linear(x, p["w"]).tanh()
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(h, p["v"]).float()

    params = {"w": w / 2, "v": v / 2}
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    grads, wanted = step(params, (X, Y))[1], truth.gradient(fn, LOSS.value, params, X, Y)
    assert all(off(grads[path], wanted[path]) < 1e-2 for path in params)
    if where == "before":
        assert off(grads["v"], wanted["v"]) < 1e-5
