"""Norms, angles and traces of trees, against sums written out and brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import BatchError, StateError, TreeMismatchError
from kfac_func.blocks import pack
from kfac_func.precondition.rules import block_damping, curvature_of
from kfac_func.state import KFacState
from tests.zoo import CASES, Case, run
from tests.zoo import curvature_of as exact_curvature
from tests.zoo.run import close

C, D = kf.curvature, kf.diagnostics
NETS = ["mlp", "conv", "tokens"]
nets = pytest.mark.parametrize("net", NETS)


def observed(case: Case, curvature: Any, damping: float = 0.3) -> KFacState:
    tx = kf.kfac(curvature, damping=damping, split="exact")
    state = kf.observe(tx.init(case.params), run(case)[2])
    assert isinstance(state, KFacState)
    return state


def noise(tree: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return _tree.tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), tree)


def by_block(state: KFacState, tree: Any) -> dict[str, Tensor]:
    leaves = _tree.unique_paths(tree)
    return {at.name: pack(at, leaves).flatten() for at in state.rules.value.layouts}


# ------------------------------------------------------------------ norms and angles


@nets
def test_norms_cosines_and_ratios_are_those_of_flat_vectors(net: str):
    case = CASES[net]
    u, g = noise(case.params, 1), noise(case.params, 2)
    state = observed(case, C.diagonal())
    x, y = _tree.ravel(u)[0], _tree.ravel(g)[0]
    for one in (None, state):
        assert close(D.norms(u, one).total, x.norm(), 1e-12)
        assert close(D.cosine(u, g, one).total, x @ y / (x.norm() * y.norm()), 1e-12)
        assert close(D.norm_ratio(u, g, one).total, x.norm() / y.norm(), 1e-12)
    parts = {"leaf": (_tree.unique_paths(u), _tree.unique_paths(g)), "block": (by_block(state, u), by_block(state, g))}
    for name, (us, gs) in parts.items():
        where = state if name == "block" else None
        cosines, ratios, norms = D.cosine(u, g, where), D.norm_ratio(u, g, where), D.norms(u, where)
        assert set(norms.parts) == set(cosines.parts) == set(ratios.parts) == set(us)
        for part, a in us.items():
            a, b = a.flatten(), gs[part].flatten()
            assert close(norms.parts[part], a.norm(), 1e-12)
            assert close(cosines.parts[part], a @ b / (a.norm() * b.norm()), 1e-12)
            assert close(ratios.parts[part], a.norm() / b.norm(), 1e-12)


def test_blocks_come_in_the_order_of_the_network_and_other_leaves_last():
    case = CASES["mlp"]
    state = observed(case, C.diagonal())
    tree = {**noise(case.params, 1), "another": torch.ones(2, dtype=torch.float64)}
    assert list(D.norms(tree, state).parts) == ["first.w", "second.w", "another"]


def test_a_descent_direction_has_cosine_minus_one_and_zero_has_none():
    g = {"w": torch.tensor([3.0, 4.0]), "b": None}
    assert D.cosine({"w": -2 * g["w"], "b": None}, g).total.item() == -1.0
    nothing = {"w": torch.zeros(2), "b": None}
    assert D.cosine(nothing, g).total.item() == 0.0
    assert D.norm_ratio(nothing, nothing).total.item() == 0.0
    assert D.norm_ratio(g, nothing).total.item() == float("inf")


def test_a_nan_stays_a_nan():
    bad, good = {"w": torch.tensor([torch.nan, 1.0])}, {"w": torch.ones(2)}
    for found in (D.norms(bad), D.cosine(bad, good), D.norm_ratio(bad, good)):
        assert found.total.isnan()


def test_low_precision_trees_are_summed_in_float64():
    tree = {"w": torch.full((100_000,), 0.1, dtype=torch.bfloat16)}
    wanted = 100_000**0.5 * float(tree["w"][0])
    assert D.norms(tree).total.item() == pytest.approx(wanted, rel=1e-12)


def test_norms_have_gradients_also_at_zero_and_map():
    assert torch.equal(torch.func.grad(lambda x: D.norms({"w": x}).total)(torch.zeros(3)), torch.zeros(3))
    stack = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = torch.vmap(lambda x: D.cosine({"w": x}, {"w": stack[0]}).total)(stack)
    wanted = torch.nn.functional.cosine_similarity(stack.double(), stack[:1].double())
    torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------ the metric of the curvature


@nets
@pytest.mark.parametrize("damping", [0.0, 0.5, None], ids=str)
def test_fisher_norms_are_quadratic_forms_of_the_dense_blocks(net: str, damping: float | None):
    case = CASES[net]
    state, u = observed(case, C.eigen()), noise(case.params, 3)
    found, wanted = D.fisher_norms(state, case.params, u, damping=damping), {}
    for name, matrix in curvature_of(state).dense(state.curvature).items():
        v = by_block(state, u)[name]
        wanted[name] = v @ matrix @ v + (block_damping(state)[name] if damping is None else damping) * v @ v
        assert close(found.parts[name], wanted[name].sqrt())
    assert close(found.total, sum(wanted.values(), torch.zeros(())).double().sqrt())


# ------------------------------------------------------------------ tr F̂ / tr F


def exact_trace(net: str, state: KFacState) -> dict[str, Tensor]:
    """By block: the trace of the GGN of brute force."""
    case, whole = CASES[net], exact_curvature(net)
    order = list(_tree.unique_paths(case.params))
    diagonal = whole.whole(order).diagonal()
    sizes = [leaf.numel() for leaf in _tree.unique_paths(case.params).values()]
    leaves = dict(zip(order, (part.sum() for part in diagonal.split(sizes)), strict=True))
    return {at.name: sum((leaves[path] for path in at.leaves), torch.zeros(())) for at in state.rules.value.layouts}


@nets
@pytest.mark.parametrize("structure", ["kronecker", "eigen", "kpsvd", "diagonal"])
def test_trace_ratios_against_brute_force(net: str, structure: str):
    case = CASES[net]
    state = observed(case, getattr(C, structure)())
    found = D.trace_ratio(state, case.fn, case.loss, case.params, case.batch)
    dense, exact = curvature_of(state).dense(state.curvature), exact_trace(net, state)
    for name, matrix in dense.items():
        assert close(found.parts[name], matrix.trace() / exact[name], 1e-9), name
    total = sum(float(matrix.trace()) for matrix in dense.values()) / sum(map(float, exact.values()))
    assert found.total.item() == pytest.approx(total, rel=1e-9)


@nets
def test_ekfac_keeps_the_trace_and_k_fac_does_not(net: str):
    case = CASES[net]
    ekfac, kfac = (
        D.trace_ratio(observed(case, curvature), case.fn, case.loss, case.params, case.batch)
        for curvature in (C.eigen(), C.kronecker())
    )
    one = torch.ones((), dtype=torch.float64)
    assert all(close(ratio, one) for ratio in (ekfac.total, *ekfac.parts.values()))
    assert any(abs(float(ratio) - 1) > 1e-2 for ratio in kfac.parts.values())


def test_both_routes_and_chunks_agree():
    case = CASES["conv"]
    state = observed(case, C.kronecker())
    one, *others = (
        D.trace_ratio(state, case.fn, case.loss, case.params, case.batch, route=route, chunk_size=size)
        for route, size in (("tape", None), ("vmap", None), ("tape", 3))
    )
    for other in others:
        assert all(close(other.parts[name], value) for name, value in one.parts.items())


def test_progress_sees_every_chunk():
    case, seen = CASES["mlp"], []

    def progress(items: Any) -> Any:
        for item in items:
            seen.append(item)
            yield item

    state = observed(case, C.eigen())
    D.trace_ratio(state, case.fn, case.loss, case.params, case.batch, chunk_size=3, progress=progress)
    assert len(seen) == 3


def test_a_sum_over_examples_in_training_has_ratio_one_too():
    fn, params = kf.make_functional(torch.nn.Linear(3, 2).double())
    batch = torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    loss = kf.losses.mse("sum")
    _, _, stats = kf.value_grad_and_stats(fn, loss, estimator=kf.estimators.exact())(params, batch)
    assert stats is not None
    state = kf.observe(kf.kfac(C.eigen()).init(params), stats)
    assert D.trace_ratio(state, fn, loss, params, batch).total.item() == pytest.approx(1, rel=1e-12)
    fitted = kf.fit_curvature(fn, loss, params, [batch])
    mean = loss._replace(reduction="batchmean")
    assert D.trace_ratio(fitted, fn, mean, params, batch).total.item() == pytest.approx(1, rel=1e-12)


def test_a_layer_that_nothing_moves_has_ratio_one():
    fn, params = kf.make_functional(torch.nn.Linear(2, 2, bias=False))
    batch = torch.zeros(3, 2), torch.zeros(3, 2)
    state = kf.fit_curvature(fn, kf.losses.mse(), params, [batch])
    assert D.trace_ratio(state, fn, kf.losses.mse(), params, batch).total.item() == 1.0
    moved = torch.ones(3, 2), torch.zeros(3, 2)
    assert D.trace_ratio(state, fn, kf.losses.mse(), params, moved).total.item() == 0.0
    seen = kf.fit_curvature(fn, kf.losses.mse(), params, [moved])
    assert D.trace_ratio(seen, fn, kf.losses.mse(), params, batch).total.item() == float("inf")


# ------------------------------------------------------------------ errors


def test_trees_that_do_not_fit_are_refused_by_path():
    with pytest.raises(TreeMismatchError, match=r"leaf 'b\.w'(.|\n)*\[2\](.|\n)*\[3\]"):
        D.cosine({"b": {"w": torch.ones(2)}}, {"b": {"w": torch.ones(3)}})
    with pytest.raises(TreeMismatchError, match=r"leaf 'c'(.|\n)*no such leaf"):
        D.norm_ratio({"b": torch.ones(2)}, {"b": torch.ones(2), "c": torch.ones(1)})
    with pytest.raises(TreeMismatchError, match="no leaves to be measured"):
        D.norms({"w": None})
    with pytest.raises(StateError, match="no statistics"):
        D.norms({"w": torch.ones(2)}, kf.kfac().init({"w": torch.ones(2)}))


def test_the_trace_ratio_refuses_what_it_cannot_use():
    case = CASES["mlp"]
    state = observed(case, C.kronecker())
    with pytest.raises(TreeMismatchError, match=r"not those that the statistics(.|\n)*value_grad_and_stats"):
        D.trace_ratio(state, case.fn, case.loss, {"w": torch.ones(2)}, case.batch)
    with pytest.raises(BatchError, match="no examples"):
        D.trace_ratio(state, case.fn, case.loss, case.params, (case.inputs[:0], case.targets[:0]))
    with pytest.raises(BatchError, match="NaN"):
        D.trace_ratio(state, case.fn, case.loss, case.params, (case.inputs * torch.nan, case.targets))
