"""`block_diagonal` and `full` inside vmap, grad, files, one graph; dead layers and half precision."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import leaves, tree_map
from kfac_func.curvature.block_diagonal import block_diagonal
from kfac_func.curvature.full import full
from tests.zoo import CASES, close, randn, run

LAMBDA = torch.tensor(0.03, dtype=torch.float64)
MAKERS = {
    "full": full,
    "block_diagonal": lambda **options: kf.curvature.blockwise(block_diagonal(**options), block_diagonal(**options)),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
windows = pytest.mark.parametrize("window", [1, 2])


@pytest.mark.parametrize("rule", ["standard", "heuristic"])
@windows
@makers
def test_vmap_over_an_ensemble_is_a_loop(make, window, rule):
    """Three members, two steps each, the statistics of one member rejected."""
    case, tx = CASES["tokens"], kf.kfac(make(window=window, rule=rule), damping=0.03, refresh_every=1)
    step = kf.value_grad_and_stats(case.fn, case.loss, estimator=kf.estimators.exact())
    plan = kf.make_plan(case.fn, case.params, case.inputs)
    members = [tree_map(lambda p, k=k: p + 0.1 * randn(*p.shape, seed=k), case.params) for k in range(3)]

    def one(params: Any, sick: Tensor) -> Any:
        state = tx.init(params)
        for factor in (1.0, torch.where(sick, torch.nan, 1.3)):
            moved = tree_map(lambda p, factor=factor: p * factor, params)
            _, grads, stats = step(moved, case.batch, plan=plan)
            grads = tree_map(lambda g: torch.nan_to_num(g, nan=0.5), grads)
            updates, state = tx.update(grads, state, params, stats=stats)
        return updates, state.rejected, state.curvature

    sick = torch.tensor([False, True, False])
    together = torch.func.vmap(one)(tree_map(lambda *x: torch.stack(x), *members), sick)
    for k, member in enumerate(members):
        for got, wanted in zip(leaves(together), leaves(one(member, sick[k])), strict=True):
            torch.testing.assert_close(got[k], wanted, rtol=1e-9, atol=1e-11)
    assert together[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("rule", ["standard", "heuristic"])
@makers
def test_gradients_flow_through_the_damping(make, rule):
    case = CASES["tokens"]
    _, grads, stats = run(case)

    def after(damping: Tensor) -> Tensor:
        tx = kf.kfac(make(rule=rule), damping=damping)
        v, _ = tx.update(grads, tx.init(case.params), stats=stats)
        return torch.stack([x.square().sum() for x in leaves(v)]).sum()

    slope, e = torch.func.grad(after)(LAMBDA), 1e-6
    assert abs(float(slope)) > 1e-3
    assert close(slope, (after(LAMBDA + e) - after(LAMBDA - e)) / (2 * e), 1e-5)


@makers
def test_a_state_survives_a_file(make):
    case, tx = CASES["tokens"], kf.kfac(make(window=2), damping=0.03)
    _, grads, stats = run(case)
    _, state = tx.update(grads, tx.init(case.params), stats=stats)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    one, two = (tx.update(grads, s, stats=stats) for s in (state, loaded))
    assert all(torch.equal(x, y) for x, y in zip(leaves(one), leaves(two), strict=True))


@makers
def test_dead_layers_and_half_precision(make):
    """Nothing is observed where gradients are zero: v = g/λ; bfloat16 statistics give float32 rows."""
    case = CASES["conv"]
    _, grads, stats = run(case)
    dead = stats._replace(grads=tuple(0 * g for g in stats.grads))
    state = kf.observe(kf.kfac(make(), damping=0.03).init(case.params), dead)
    for v, g in zip(leaves(kf.precondition(state, grads)), leaves(grads), strict=True):
        assert close(0.03 * v, g, 1e-12)
    half = tree_map(lambda x: x.bfloat16(), stats)
    state = kf.observe(kf.kfac(make(), damping=0.03).init(case.params), half)
    assert {x.dtype for x in leaves(state.factored)} == {torch.float32}
    v = kf.precondition(state, tree_map(lambda g: g.bfloat16(), grads))
    wanted = kf.precondition(kf.observe(kf.kfac(make(), damping=0.03).init(case.params), stats), grads)
    for x, y in zip(leaves(v), leaves(wanted), strict=True):
        assert x.dtype == torch.bfloat16
        assert close(x.double(), y, 0.1)


@makers
def test_one_layer_in_half_precision(make):
    """Its rows come in float32, those of the layers around it in float64: one solve, in float64."""
    params = {"a": randn(3, 4), "b": randn(3, 3, seed=1), "c": randn(2, 3, seed=2)}
    x, y = randn(5, 4, seed=3), torch.tensor([0, 1, 1, 0, 1])

    def fn(p: Any, x: Tensor, low: torch.dtype = torch.bfloat16) -> Tensor:
        h = torch.tanh(x @ p["a"].mT)
        return torch.tanh(F.linear(h.to(low), p["b"].to(low)).to(x.dtype)) @ p["c"].mT

    def solved(fn: Any) -> Any:
        step: Any = kf.value_grad_and_stats(fn, kf.losses.cross_entropy(), estimator=kf.estimators.exact())
        _, grads, stats = step(params, (x, y))
        return kf.precondition(kf.observe(kf.kfac(make(), damping=0.03).init(params), stats), grads)

    for v, wanted in zip(leaves(solved(fn)), leaves(solved(partial(fn, low=torch.float64))), strict=True):
        assert v.dtype == torch.float64
        assert close(v, wanted, 0.05)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it imports the compiler
@pytest.mark.parametrize(("window", "backend"), [(1, "eager"), (2, "aot_eager")])
@makers
def test_an_update_is_one_graph(make, window, backend):
    torch._dynamo.reset()
    case, tx = CASES["conv"], kf.kfac(make(window=window, rule="heuristic"), damping=0.03)
    _, grads, stats = run(case)

    def update(state: Any) -> Any:
        return tx.update(grads, state, stats=stats, refresh=True)

    _, state = update(tx.init(case.params))
    found = torch.compile(update, fullgraph=True, backend=backend)(state)
    torch.testing.assert_close(leaves(found), leaves(update(state)), rtol=1e-9, atol=1e-11)
