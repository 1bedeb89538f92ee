"""The exact natural gradient is the dense solve with the GGN of the whole net, and what follows from that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import map_nodes, tree_map
from kfac_func.blocks import Pairs
from kfac_func.curvature.block_diagonal import block_diagonal
from kfac_func.curvature.full import full
from tests import oracles
from tests.zoo import CASES, Case, close, curvature_of, direction, functional, randn, run, subset

DAMPING = 0.02
EVERYWHERE = kf.curvature.blockwise(block_diagonal(), block_diagonal())
cases = pytest.mark.parametrize("name", CASES)
some = pytest.mark.parametrize("name", ["mlp", "conv", "grouped", "tokens", "attention"])
curvatures = pytest.mark.parametrize("curvature", [full(), EVERYWHERE], ids=lambda c: c.name[:5])


def raveled(tree: Any, case: Case) -> Tensor:
    leaves = oracles.flat(tree)
    return torch.cat([leaves[path].flatten() for path in oracles.flat(case.params)])


def whole(name: str) -> Tensor:
    return curvature_of(name).whole(list(oracles.flat(CASES[name].params)))


def solved(matrix: Tensor, damping: float, g: Tensor) -> Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), g)


def state_of(case: Case, curvature: Any, damping: float = DAMPING) -> tuple[Any, Any]:
    """The state after the batch of a case, and the gradient."""
    _, grads, stats = run(case)
    return kf.observe(kf.kfac(curvature, damping=damping).init(case.params), stats), grads


@cases
def test_the_whole_net(name):
    """v = (F + λ)⁻¹ g with the dense F of all parameters; and no other v."""
    case = CASES[name]
    state, grads = state_of(case, full())
    v, g = raveled(kf.precondition(state, grads), case), raveled(grads, case)
    assert close(v, solved(whole(name), DAMPING, g), 1e-9)
    assert not close(v, solved(whole(name), 1.1 * DAMPING, g), 1e-3)
    blocks = raveled(kf.precondition(state_of(case, EVERYWHERE)[0], grads), case)
    assert not close(v, blocks, 1e-2)


@cases
def test_every_block(name):
    case, dense = CASES[name], curvature_of(name)
    state, grads = state_of(case, EVERYWHERE)
    found = oracles.flat(kf.precondition(state, grads))
    for spec in case.blocks.values():
        v, g = (oracles.laid_out(spec, oracles.flat(tree), 0) for tree in (found, grads))
        assert close(v, solved(dense.block(spec), DAMPING, g), 1e-9)


@some
def test_through_a_chain(name):
    """The direction of two steps, the second on another batch, with momentum and a rate after it."""
    case = CASES[name]
    tx = kf.chain(kf.kfac(full(), damping=DAMPING, refresh_every=1), kf.sgd(0.1, momentum=0.5))
    state, momentum = tx.init(case.params), torch.zeros(())
    for part in (subset(case, 0, len(case.targets) - 2), case):
        _, grads, stats = run(part)
        updates, state = tx.update(grads, state, case.params, stats=stats)
        dense = oracles.ggn(part.fn, part.params, part.inputs, part.targets, part.value)
        v = solved(dense.whole(list(oracles.flat(case.params))), DAMPING, raveled(grads, case))
        momentum = 0.5 * momentum + v
        assert close(raveled(updates, case), -0.1 * momentum, 1e-9)


@curvatures
@some
def test_the_operator(name, curvature):
    """Symmetric, linear, positive definite, zero at zero; λ v → g as λ → ∞."""
    case = CASES[name]
    state, grads = state_of(case, curvature)

    def apply(tree: Any) -> Tensor:
        return raveled(kf.precondition(state, tree), case)

    u, w = (tree_map(lambda x, k=k: randn(*x.shape, seed=k), case.params) for k in (1, 2))
    assert close(raveled(u, case) @ apply(w), raveled(w, case) @ apply(u), 1e-9)
    both = tree_map(lambda x, y: 2 * x - 3 * y, u, w)
    assert close(apply(both), 2 * apply(u) - 3 * apply(w), 1e-9)
    assert all(raveled(t, case) @ apply(t) > 0 for t in (u, w, grads))
    assert torch.count_nonzero(apply(tree_map(torch.zeros_like, u))) == 0
    far, _ = state_of(case, curvature, 1e12)
    assert close(1e12 * raveled(kf.precondition(far, grads), case), raveled(grads, case), 1e-8)


@curvatures
@some
def test_the_order_of_examples_and_duplicates_change_nothing(name, curvature):
    case = CASES[name]
    order = torch.roll(torch.arange(len(case.targets)), 3)
    found = raveled(direction(case, curvature=curvature, damping=DAMPING), case)
    for index in (order, torch.cat([order, order])):
        other = case._replace(inputs=case.inputs[index], targets=case.targets[index])
        assert close(raveled(direction(other, curvature=curvature, damping=DAMPING), case), found, 1e-9)


def prepared_of(curvature: Any, case: Case) -> Any:
    return curvature.prepare(run(case)[2].blocks())


@curvatures
@some
def test_rows_of_examples_in_two_orders_are_wrong(name, curvature):
    """The trap: inputs by example and gradients by position, say. It turns the first tests of this file red."""
    case = CASES[name]
    mixed = map_nodes(lambda rows: Pairs(rows.left.roll(1, dims=1), rows.right), prepared_of(curvature, case), Pairs)
    wrong = curvature._replace(prepare=lambda blocks: mixed)
    found, other = (raveled(direction(case, curvature=c, damping=DAMPING), case) for c in (curvature, wrong))
    assert not close(other, found, 1e-2)


@curvatures
@some
def test_rows_of_some_examples_are_those_of_a_batch_of_them(name, curvature):
    """With 1/N of the smaller batch: √(N/n) times the columns of the larger one."""
    case, n = CASES[name], 3
    every, few = (prepared_of(curvature, c) for c in (case, subset(case, 0, n)))
    if not isinstance(every, dict):
        every, few = (rows.matrix | rows.vector for rows in (every, few))
    for block, rows in few.items():
        scale = (len(case.targets) / n) ** 0.5
        assert close(rows.left, scale * every[block].left[:, :n], 1e-9)
        assert close(rows.right, every[block].right[:, :n], 1e-9)


def test_one_step_solves_linear_regression():
    """F is the Hessian of a linear model with squared loss: one undamped step is Newton's, and the gradient is gone."""
    fn, params = functional(torch.nn.Linear(3, 2))
    x, y = randn(9, 3), randn(9, 2, seed=1)
    case = Case(fn, params, x, y, kf.losses.mse(), F.mse_loss, {}, {})
    for curvature in (full(), EVERYWHERE):
        v = direction(case, curvature=curvature, damping=1e-9)
        moved = {name: p - v[name] for name, p in params.items()}
        before, after = (raveled(run(c)[1], case).abs().max() for c in (case, case._replace(params=moved)))
        assert before > 0.1
        assert after < 1e-6


def test_two_layers_that_answer_for_one_output_share_the_step():
    """f = (u + w) x: the whole net takes the Newton step once, its blocks take it twice."""
    params = {"u": randn(1, 1), "w": randn(1, 1, seed=1)}
    case = Case(
        lambda p, x: F.linear(x, p["u"]) + F.linear(x, p["w"]),
        params, randn(6, 1), randn(6, 1, seed=2), kf.losses.mse(), F.mse_loss, {}, {},
    )  # fmt: skip
    one, two = (direction(case, curvature=c, damping=1e-9) for c in (full(), EVERYWHERE))
    for curvature, v, gone in ((full(), one, True), (EVERYWHERE, two, False)):
        moved = {name: p - v[name] for name, p in params.items()}
        assert (float(run(case._replace(params=moved))[1]["u"].abs()) < 1e-5) is gone, curvature.name
    assert close(two["u"], 2 * one["u"], 1e-6)
