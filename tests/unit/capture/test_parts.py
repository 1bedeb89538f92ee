"""Casts, reshapes and parts of weights: gradients are put back where they belong, curvature is that of the leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import squares
from tests.zoo import close, randn

LOSS = kf.losses.mse("batchmean", scale=0.5)
X, Y = randn(5, 4, seed=1), randn(5, 6, seed=2)
P = {"w": randn(6, 4), "b": randn(6, seed=3), "h": randn(6, 2, seed=4), "k": randn(6, 8, seed=5)}


def packed(p: dict, x: Tensor, parts: Any, biases: Any = (None, None, None)) -> Tensor:
    q, k, v = (F.linear(x, w, b) for w, b in zip(parts, biases, strict=True))
    return torch.cat([q * k, v.tanh(), q + v], 1)


def rows(x: Tensor) -> Tensor:
    return torch.stack([x, x.sin()], 1)


def slices(t: Tensor) -> list[Tensor]:
    return [t[:2], t[2:4], t[4:]]


MODELS: dict[str, Callable[[dict, Tensor], Tensor]] = {
    "chunk": lambda p, x: packed(p, x, p["w"].chunk(3)),
    "torch.chunk, dim": lambda p, x: packed(p, x, torch.chunk(p["w"], 3, dim=0)),
    "split": lambda p, x: packed(p, x, p["w"].split([2, 2, 2])),
    "unequal split": lambda p, x: torch.cat([F.linear(x, w).tanh() for w in p["w"].split([1, 2, 3])], 1),
    "slices": lambda p, x: packed(p, x, slices(p["w"])),
    "narrow": lambda p, x: packed(p, x, [p["w"].narrow(0, k, 2) for k in (0, 2, 4)]),
    "unbind": lambda p, x: packed(p, x, p["w"].view(3, 2, 4).unbind(0)),
    "index": lambda p, x: packed(p, x, [p["w"].reshape(3, 2, 4)[k] for k in range(3)]),
    "with parts of a bias": lambda p, x: packed(p, x, p["w"].chunk(3), p["b"].chunk(3)),
    "bias by slices": lambda p, x: packed(p, x, slices(p["w"]), slices(p["b"])),
    "bias by index": lambda p, x: packed(p, x, p["w"].chunk(3), p["b"].view(3, 2)),
    "bias of other rows": lambda p, x: packed(p, x, p["w"].chunk(3), p["b"].chunk(3)[::-1]),
    "one part of a bias": lambda p, x: packed(p, x, p["w"].chunk(3), (None, p["b"][2:4], None)),
    "parts by matmul": lambda p, x: torch.cat([x @ w.T for w in p["w"].chunk(3)], 1).tanh(),
    "parts of the transpose": lambda p, x: torch.cat([x @ w for w in p["w"].T.chunk(3, dim=1)], 1).tanh(),
    "a bias that is added": lambda p, x: torch.cat(
        [x @ w.T + b for w, b in zip(p["w"].chunk(2), p["b"].chunk(2), strict=True)], 1
    ).tanh(),
    "einsum": lambda p, x: torch.cat([torch.einsum("ni,oi->no", x, w) for w in p["w"].chunk(2)], 1).tanh(),
    "columns": lambda p, x: F.linear(x, p["k"][:, :4], p["b"]).tanh() + F.linear(x.sin(), p["k"][:, 4:]),
    "a part of a part": lambda p, x: F.linear(x, p["k"][1:][2:, 2:][:, :4]).repeat(1, 2),
    "part and whole": lambda p, x: F.linear(x, p["w"]).tanh() + F.linear(x, p["w"][:2]).repeat(1, 3),
    "part and transpose": lambda p, x: F.linear(F.linear(x, p["w"]).tanh()[:, :2], p["w"][:2].T).repeat(1, 2)[:, :6],
    "positions": lambda p, x: torch.cat([F.linear(rows(x), w) for w in p["w"].chunk(3)], 2).tanh().sum(1),
    "cast and used so": lambda p, x: F.linear(x.float(), p["w"].float(), p["b"].to(torch.float32)).double(),
    "cast to what it is": lambda p, x: F.linear(x, p["w"].double(), p["b"].to(x)),
    "type_as": lambda p, x: F.linear(x, p["w"].type_as(x)),
    "contiguous": lambda p, x: F.linear(x, p["w"].T.contiguous().T),
    "reshaped": lambda p, x: F.linear(x, p["w"].view(2, 3, 4).reshape(6, 4)),
    "flattened and back": lambda p, x: F.linear(x, p["w"].flatten().unflatten(0, (6, 4))),
}


@pytest.mark.parametrize("fn", MODELS.values(), ids=MODELS)
def test_gradient_and_diagonal_are_those_of_autograd(fn):
    z = fn(P, X)
    batch = X, Y[:, : z.shape[1]] if z.shape[1] <= 6 else randn(5, z.shape[1], seed=2)
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    _, grads, stats = step(P, batch)
    tolerance = 1e-5 if fn is MODELS["cast and used so"] else 1e-10
    wanted = torch.func.grad(lambda p: LOSS.value(fn(p, X), batch[1]))(P)
    torch.testing.assert_close(grads, wanted, rtol=tolerance, atol=tolerance)
    plan = stats.rules.value.plan
    assert plan.unclaimed == ()
    assert set(plan.claimed) == {k for k, g in wanted.items() if g.abs().max() > 0}
    for block in stats.blocks().values():
        got = squares(block)
        leaf, bias = block.layout.weight, block.layout.bias
        if leaf is not None:
            own = diagonal(fn, leaf).permute(block.layout.order).flatten(1)
            assert close(got[:, : own.shape[1]], own, 1e-6), leaf
        if bias is not None:
            assert close(got[:, -1], diagonal(fn, bias), 1e-6), bias


def diagonal(fn: Callable, path: str) -> Tensor:
    j = torch.func.jacrev(lambda leaf: fn({**P, path: leaf}, X))(P[path])
    return j.flatten(0, 1).square().sum(0) / len(X)


def test_a_packed_projection_is_one_block_with_its_bias():
    plan = kf.make_plan(MODELS["with parts of a bias"], P, X)
    assert [block.layout.leaves for block in plan.blocks] == [("w", "b")]
    assert [rule.part.rows for _, rule in plan.blocks[0].uses] == [(0, 6), (2, 6), (4, 6)]


@pytest.mark.parametrize("structure", [kf.kfac, kf.ekfac, kf.kpsvd, kf.inverse_free, kf.exact_natural_gradient])
def test_structures_take_them(structure):
    fn = MODELS["with parts of a bias"]
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    _, grads, stats = step(P, (X, Y))
    tx = structure(damping=0.1)
    updates, _ = tx.update(grads, tx.init(P), P, stats=stats)
    assert sum(float((updates[k] * grads[k]).sum()) for k in ("w", "b")) > 0


def test_what_is_no_part_along_the_dimensions_is_told():
    for cut in (lambda w: w[::2], lambda w: w[[1, 0]], lambda w: w.flip(0)):
        with pytest.raises(kf.errors.UncapturedParameterError, match="'w'"):
            kf.make_plan(lambda p, x, cut=cut: F.linear(x, cut(p["w"])), {"w": P["w"]}, X)
