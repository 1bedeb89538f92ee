"""Rows without a gradient whatever the targets: padded positions, branches under no_grad. They count in no moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from tests.kinds import truth
from tests.oracles import Spec
from tests.zoo import close, kronecker_block, randn

N, T = 5, 6
LENGTHS = torch.tensor([2, 1, 6, 3, 2])
REAL = torch.arange(T) < LENGTHS[:, None]
IDS = torch.where(REAL, torch.arange(N * T).mul(7).remainder(8).reshape(N, T) + 1, 0)
LABELS = torch.where(REAL, torch.arange(N * T).mul(5).remainder(3).reshape(N, T), -100)


class Tagger(nn.Module):
    """A net for tokens, classes last or in dimension 1. Padding has an embedding like any other, or none."""

    def __init__(self, padding: int | None, last: int) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(9, 4, padding_idx=padding), nn.Linear(4, 5)
        self.norm, self.head, self.last = nn.LayerNorm(5), nn.Linear(5, 3), last

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.table(ids))).tanh()).movedim(-1, self.last)


def blocks(fn: Any, loss: Any, params: Any, batch: Any, **options: Any) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Value, gradient, and T·G ⊗ A of every matrix."""
    step: Any = kf.value_grad_and_stats(fn, loss, **options)
    value, grads, stats = step(params, batch, generator=truth.seeded())
    return value, grads, {k: kronecker_block(b) for k, b in stats.blocks().items() if b.layout.matrix}


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("last", [-1, 1])
@pytest.mark.parametrize("order", ["at the end", "in gaps", "an empty example"])
def test_padded_tokens_are_those_of_a_list(padding, last, order):
    torch.manual_seed(0)
    fn, params = kf.make_functional(Tagger(padding, last).double())
    ids, labels, real = IDS, LABELS, REAL
    if order == "in gaps":
        places = torch.tensor([4, 0, 3, 5, 1, 2])
        ids, labels, real = (x[:, places] for x in (IDS, LABELS, REAL))
    elif order == "an empty example":
        ids, labels, real = (
            torch.cat([x, torch.full_like(x[:1], y)]) for x, y in ((IDS, 0), (LABELS, -100), (REAL, 0))
        )
    exact = kf.estimators.exact()
    wanted = blocks(fn, kf.losses.cross_entropy(), params, (ids[real], labels[real]), estimator=exact)
    found = blocks(fn, kf.losses.cross_entropy(class_dim=last), params, (ids, labels), estimator=exact)
    assert close(found[0], wanted[0])
    truth.same(found[1], wanted[1])
    truth.same(found[2], wanted[2])
    assert {"table.weight", "body.weight", "head.weight"} == set(found[2])


P = {"w": randn(3, 3, seed=1), "b": randn(3, seed=2), "v": randn(2, 3, seed=3)}
X, Y = randn(4, 3, seed=4), randn(4, 2, seed=5)
MSE = kf.losses.mse("batchmean", scale=0.5)


def target(p: dict, x: Tensor) -> Tensor:
    return F.linear(F.linear(x.cos(), p["w"], p["b"]).tanh(), p["v"])


def under_no_grad(p: dict, x: Tensor) -> Tensor:
    with torch.no_grad():
        return target(p, x)


def on_copies(p: dict, x: Tensor) -> Tensor:
    return target({path: leaf.detach() for path, leaf in p.items()}, x)


STOPPED: dict[str, Callable[[dict, Tensor], Tensor]] = {
    "no_grad": under_no_grad,
    "decorated": torch.no_grad()(target),
    "detached parameters": on_copies,
    "detached": lambda p, x: target(p, x).detach(),
}


@pytest.mark.parametrize("stopped", STOPPED.values(), ids=STOPPED)
def test_a_branch_without_a_gradient_is_a_constant(stopped, monkeypatch):
    """A target net, self-distillation, a baseline: uses of the same weights that nothing flows back through."""

    def fn(p: dict, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"]) * (2 + stopped(p, x))

    constant = stopped(P, X)

    def plain(p: dict, inputs: Any) -> Tensor:
        x, c = inputs
        return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"]) * (2 + c)

    truth.check(monkeypatch, fn, MSE, P, (X, Y))
    for estimator in (kf.estimators.exact(), kf.estimators.monte_carlo(), kf.estimators.forward_only()):
        found = blocks(fn, MSE, P, (X, Y), estimator=estimator)
        wanted = blocks(plain, MSE, P, ((X, constant), Y), estimator=estimator)
        assert close(found[0], wanted[0])
        truth.same(found[1], wanted[1])
        truth.same(found[2], wanted[2])


def test_one_example_with_a_target_net_is_solved_exactly():
    def fn(p: dict, x: Tensor) -> Tensor:
        return F.linear(x, p["w"], p["b"]).tanh() - F.linear(under_no_grad(p, x), p["w"].detach()[:, :2])

    params, batch = {"w": P["w"], "b": P["b"], "v": P["v"]}, (X[:1], randn(1, 3, seed=6))
    step: Any = kf.value_grad_and_stats(fn, MSE, estimator=kf.estimators.exact())
    _, grads, stats = step(params, batch)
    tx = kf.kfac(damping=0.1, split="exact")
    updates = tx.update(grads, tx.init(params), params, stats=stats)[0]
    dense = truth.curvature(fn, MSE.value, params, *batch).block(Spec("w", "b"))
    wanted = truth.gradient(fn, MSE.value, params, *batch)
    g = torch.cat([wanted["w"], wanted["b"][:, None]], 1)
    solved = torch.linalg.solve(dense + 0.1 * torch.eye(12).double(), g.flatten()).reshape(3, 4)
    assert close(updates["w"], solved[:, :3])
    assert close(updates["b"], solved[:, 3])
    assert not updates["v"].any()
