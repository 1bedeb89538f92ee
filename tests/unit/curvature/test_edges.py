"""Shapes at the edge: no columns, no rows, nothing hidden, one class, one example, one of everything."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from tests.oracles import flat
from tests.theorems.test_micro_batches import CURVATURES
from tests.zoo import close, randn


class Edge(NamedTuple):
    """A model; `empty`: its leaves without numbers, and the leaves and the model that are left without them."""

    fn: Any
    params: dict[str, Tensor]
    batch: tuple[Any, Tensor]
    loss: kf.losses.Loss
    rest: Any = None


def plain(p: dict, x: Any) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"], p["c"])


def leaves(i: int = 3, h: int = 4, o: int = 2) -> dict[str, Tensor]:
    return {"w": randn(h, i), "b": randn(h, seed=1), "v": randn(o, h, seed=2), "c": randn(o, seed=3)}


def beside(p: dict, x: Any) -> Tensor:
    return F.linear(x[0], p["z"]) + plain(p, x[1])


def above(p: dict, x: Any) -> Tensor:
    return torch.cat([plain(p, x), F.linear(x, p["z"], p["zb"])], 1)


def shifted(p: dict, x: Any) -> Tensor:
    return F.linear(x[0], p["z"], p["zb"]) + plain(p, x[1])


NOTHING, X, MSE = torch.zeros(5, 0, dtype=torch.float64), randn(5, 3, seed=7), kf.losses.mse()
EDGES = {
    "no columns": Edge(
        beside, leaves() | {"z": randn(2, 0)}, ((NOTHING, X), randn(5, 2, seed=8)), MSE, (plain, lambda x: x[1])
    ),
    "no rows": Edge(
        above, leaves() | {"z": randn(0, 3), "zb": randn(0)}, (X, randn(5, 2, seed=8)), MSE, (plain, lambda x: x)
    ),
    "columns of the bias alone": Edge(
        shifted, leaves() | {"z": randn(2, 0), "zb": randn(2)}, ((NOTHING, X), randn(5, 2, seed=8)), MSE
    ),
    "nothing hidden": Edge(plain, leaves(h=0), (X, randn(5, 2, seed=8)), MSE),
    "one output": Edge(plain, leaves(o=1), (X, randn(5, 1, seed=8)), MSE),
    "one example": Edge(plain, leaves(), (X[:1], randn(1, 2, seed=8)), MSE),
    "one of everything": Edge(plain, leaves(1, 1, 1), (X[:1, :1], randn(1, 1, seed=8)), MSE),
    "one class": Edge(plain, leaves(o=1), (X, torch.zeros(5, dtype=torch.long)), kf.losses.cross_entropy()),
}
EXACT = kf.estimators.exact()
SUMS = ("deflation", "corrected", "lanczos")


def moved(edge: Edge, name: str, split: str) -> tuple[dict[str, Tensor], kf.KFacState, dict[str, Tensor]]:
    step: Any = kf.value_grad_and_stats(edge.fn, edge.loss, estimator=EXACT)
    _, grads, stats = step(edge.params, edge.batch)
    tx: Any = kf.kfac(CURVATURES[name], split=split, damping=0.1)  # pyright: ignore[reportArgumentType]
    _, state = tx.update(grads, tx.init(edge.params), edge.params, stats=stats)
    updates, state = tx.update(grads, state, edge.params, stats=stats, refresh=True)
    return updates, state, grads


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("edge", EDGES)
def test_every_curvature_goes_through(edge, name, split):
    if split == "exact" and (name in SUMS or name == "inverse_free"):
        pytest.skip("refused with a reason everywhere")
    given = EDGES[edge]
    updates, state, grads = moved(given, name, split)
    assert int(state.failed) == 0
    assert all(u.isfinite().all() and u.shape == grads[k].shape for k, u in updates.items())
    assert sum((u * grads[k]).sum() for k, u in updates.items()) > 0 or edge == "one class"
    assert "memory" in kf.describe(state)
    if given.rest is not None:
        fn, chosen = given.rest
        kept = {k: v for k, v in given.params.items() if k[0] != "z"}
        batch = chosen(given.batch[0]), given.batch[1]
        wanted, *_ = moved(Edge(fn, kept, batch, given.loss), name, split)
        assert all(close(updates[k], wanted[k], 1e-8) for k in kept)
    if state.rules.value.curvature.spectra is not None:
        operator = kf.linear_operator(state, given.params)
        solved = operator.solve(operator.matvec(grads))
        assert all(g.numel() == 0 or close(solved[k], g, 1e-8) for k, g in flat(grads).items())
        assert operator.to_dense().shape == (sum(p.numel() for p in given.params.values()),) * 2
        assert operator.logdet().isfinite()


@pytest.mark.parametrize("edge", [name for name in EDGES if name != "one class"])
def test_what_is_exact_is_exact_there(edge):
    fn, params, batch, loss, _ = EDGES[edge]
    regime = kf.testing.Regime(fn, params, batch, loss)
    structures = [kf.curvature.block_diagonal(), kf.curvature.full()]
    if len(batch[1]) == 1:
        structures += [kf.curvature.kronecker(), kf.curvature.eigen(), kf.curvature.kpsvd()]
    for structure in structures:
        kf.testing.assert_exact(structure, regime)


@pytest.mark.parametrize("name", CURVATURES)
def test_a_model_of_empty_leaves_alone(name):
    """Nothing to do, or nothing to couple, which is said."""
    edge = Edge(lambda p, x: F.linear(x, p["z"]), {"z": randn(2, 0)}, (NOTHING, randn(5, 2)), MSE)
    if name.startswith(("full", "two_level")):
        with pytest.raises(kf.errors.StateError, match="there is no block"):
            moved(edge, name, "pi")
        return
    updates, state, _ = moved(edge, name, "pi")
    assert updates["z"].shape == (2, 0)
    assert int(state.failed) == 0
