"""What a state says about the curvature, against matrices written out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import StateError
from kfac_func.blocks import densify, merged
from kfac_func.precondition.rules import curvature_of
from kfac_func.state import KFacState
from tests.zoo import CASES, run
from tests.zoo.run import EXACT, close, measured, outer

C, D = kf.curvature, kf.diagnostics
STRUCTURES: dict[str, tuple[Any, Any]] = {
    "kronecker": (C.kronecker(), "pi"),
    "exact": (C.kronecker(), "exact"),
    "sua": (C.kronecker(sua=True), "pi"),
    "flat": (C.kronecker(max_dim=2, oversize="diagonal"), "exact"),
    "blocks": (C.kronecker(max_dim=2), "none"),
    "eigen": (C.eigen(), "exact"),
    "kpsvd": (C.kpsvd(), "pi"),
    "inverse_free": (C.inverse_free(), "pi"),
    "corrected": (C.corrected(), "pi"),
    "deflation": (C.deflation(), "pi"),
    "diagonal": (C.diagonal(), "exact"),
    "identity": (C.blockwise(C.identity(), C.identity()), "exact"),
}
FACTORED = [name for name in STRUCTURES if name not in ("diagonal", "identity")]
NETS = ["mlp", "conv", "grouped", "tokens", "tied"]
structures = pytest.mark.parametrize("structure", STRUCTURES)
nets = pytest.mark.parametrize("net", NETS)


@cache
def fitted(structure: str, net: str, damping: float = 0.3) -> KFacState:
    case, (curvature, split) = CASES[net], STRUCTURES[structure]
    tx = kf.kfac(curvature, damping=damping, split=split)
    state = kf.observe(tx.init(case.params), run(case)[2])
    assert isinstance(state, KFacState)
    return state


def dense(state: KFacState) -> dict[str, Tensor]:
    return curvature_of(state).dense(state.curvature)


def eigenvalues(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix.double()).clamp(min=0)


@nets
@structures
def test_the_spectra_of_blocks_are_those_of_the_dense_blocks(structure: str, net: str):
    state = fitted(structure, net)
    found, wanted = D.spectra(state), dense(state)
    assert list(found) == [layout.name for layout in state.rules.value.layouts]
    for name, matrix in wanted.items():
        assert close(found[name].block.double(), eigenvalues(matrix), 1e-9), name
        assert close(D.traces(state)[name], eigenvalues(matrix).sum(), 1e-9)


@nets
@pytest.mark.parametrize("structure", FACTORED)
def test_the_spectra_of_factors_are_those_of_the_dense_factors(structure: str, net: str):
    state = fitted(structure, net)
    found, sides = D.spectra(state), D.factors(state)
    assert {name for name, one in found.items() if isinstance(one.a, Tensor)} == set(sides)
    assert list(sides) == [layout.name for layout in state.rules.value.layouts if layout.matrix]
    for name, (a, g, _) in sides.items():
        assert close(found[name].a, eigenvalues(densify(a)))
        assert close(found[name].g, eigenvalues(densify(g)))


@nets
@pytest.mark.parametrize("structure", ["kronecker", "sua", "eigen", "kpsvd", "inverse_free"])
def test_the_factors_times_their_scale_are_the_block(structure: str, net: str):
    state = fitted(structure, net)
    if structure == "eigen":
        wanted = {name: scaled_kronecker(state, name) for name in state.curvature.matrix}
    else:
        wanted = dense(state)
    for name, (a, g, scale) in D.factors(state).items():
        a, g = (x.reshape(-1, *x.shape[-2:]) for x in (densify(a), densify(g)))
        whole = torch.block_diag(*(torch.kron(y, x) for x, y in zip(a, g, strict=True)))
        assert close(scale * whole, wanted[name]), name


@nets
@pytest.mark.parametrize(("structure", "first"), [("deflation", "kpsvd"), ("corrected", "exact")])
def test_the_factors_of_a_sum_are_those_of_its_first_term(structure: str, first: str, net: str):
    found, wanted = D.factors(fitted(structure, net)), D.factors(fitted(first, net))
    assert set(found) == set(wanted)
    for name, (a, g, scale) in found.items():
        assert close(densify(a), densify(wanted[name].a))
        assert close(densify(g), densify(wanted[name].g))
        assert close(scale, wanted[name].scale)


def scaled_kronecker(state: KFacState, name: str) -> Tensor:
    k = C.kronecker()
    return k.dense(state.curvature.matrix[name].factors)


@nets
@structures
def test_condition_numbers_are_those_of_the_dense_blocks(structure: str, net: str):
    state = fitted(structure, net)
    for name, (damped, undamped) in D.condition_numbers(state).items():
        values = eigenvalues(dense(state)[name])
        high = values[-1]
        if structure in ("exact", "flat", "eigen", "corrected", "deflation", "diagonal"):  # λ is added to the block
            assert close(damped.double(), (high + 0.3) / (values[0] + 0.3), 1e-9)
        if values[0] > 1e-6 * high:
            assert close(undamped.double(), high / values[0], 1e-6)
        else:
            assert undamped > 1e6


def test_the_condition_of_factored_damping_is_that_of_what_is_inverted():
    state = fitted("kronecker", "conv")
    for name, (damped, _) in D.condition_numbers(state).items():
        if name in state.curvature.matrix:
            a, g, t = merged(state.curvature.matrix[name])
            a, g, root = densify(a), densify(g), (0.3 / t).sqrt()
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            eyes = (torch.eye(len(x), dtype=x.dtype) for x in (a, g))
            shifted = [x + s * eye for x, s, eye in zip((a, g), (root * pi, root / pi), eyes, strict=True)]
            assert close(damped, torch.linalg.cond(torch.kron(*shifted)), 1e-9)


def test_a_singular_block_has_an_infinite_condition_and_damping_mends_it():
    fn, params = kf.make_functional(torch.nn.Linear(2, 2, bias=False).double())
    batch = torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    state = kf.fit_curvature(fn, kf.losses.mse(), params, [batch], curvature=C.kronecker(), damping=0.1)
    damped, undamped = D.condition_numbers(state)["weight"]
    assert (damped.item(), undamped.item()) == (1.0, float("inf"))


@nets
def test_pi_is_the_root_of_the_ratio_of_mean_eigenvalues(net: str):
    state = fitted("kronecker", net)
    found = D.pi(state)
    assert set(found) == set(state.curvature.matrix)
    for name, own in state.curvature.matrix.items():
        a, g, _ = merged(own)
        means = [densify(x).diagonal(dim1=-2, dim2=-1).mean(-1) for x in (a, g)]
        assert close(found[name], (means[0] / means[1]).sqrt(), 1e-12)


def test_a_dead_layer_has_pi_one():
    fn, params = kf.make_functional(torch.nn.Linear(2, 2, bias=False))
    state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.zeros(3, 2), torch.zeros(3, 2))])
    assert D.pi(state)["weight"].item() == 1.0


def test_the_damping_is_that_of_the_pattern_with_the_l2_term():
    case = CASES["mlp"]
    mask = {"first": {"w": False, "b": False}, "second": {"w": True, "b": True}}
    tx = kf.kfac(damping={"first*": 0.25, "**": 0.5}, l2=0.125, l2_mask=mask)
    state = kf.observe(tx.init(case.params), run(case)[2])
    assert {name: float(value) for name, value in D.damping(state).items()} == {"first.w": 0.25, "second.w": 0.625}


def test_dead_units_are_counted_over_all_groups():
    fn, params = kf.make_functional(torch.nn.Conv1d(4, 2, 1, groups=2))
    x = torch.ones(3, 4, 5)
    x[:, 1:] = 0
    state = kf.fit_curvature(fn, kf.losses.mse(), params, [(x, torch.zeros(3, 2, 5))])
    assert tuple(map(int, D.dead_units(state)["weight"])) == (3, 0)


def test_tokens_that_never_came_and_padding_are_dead_inputs():
    case = CASES["tokens"]
    state = kf.fit_curvature(case.fn, case.loss, case.params, [(case.inputs[:3], case.targets[:3])])
    seen = set(case.inputs[:3].flatten().tolist()) - {0}  # which is the padding
    assert int(D.dead_units(state)["embedding.weight"].inputs) == len(case.params["embedding.weight"]) - len(seen)


@pytest.mark.parametrize("net", ["mlp", "conv", "grouped", "tied", "recurrent", "attention"])
def test_the_gain_is_the_difference_of_squared_errors(net: str):
    case = CASES[net]
    tx = kf.kfac(C.eigen(), damping=0.3)
    state = kf.observe(tx.init(case.params), run(case)[2])
    blocks, gains = measured(case, EXACT), D.ekfac_gain(state)
    assert set(gains) == set(state.curvature.matrix)
    for name, gain in gains.items():
        exact, ekfac, k = outer(blocks[name]), dense(state)[name], scaled_kronecker(state, name)
        wanted = (exact - k).norm() ** 2 - (exact - ekfac).norm() ** 2
        scalings = state.curvature.matrix[name].scalings
        assert close((gain * scalings.norm()) ** 2, wanted, 1e-9), name
        assert gain > 1e-3


def test_the_gain_is_zero_for_one_datum_and_one_where_k_fac_is_zero():
    fn, params = kf.make_functional(torch.nn.Linear(3, 2).double())
    x, y = torch.ones(1, 3).double(), torch.zeros(1, 2).double()
    state = kf.fit_curvature(fn, kf.losses.mse(), params, [(x, y)])
    assert D.ekfac_gain(state)["weight"] < 1e-12
    own = state.curvature.matrix["weight"]
    empty = own._replace(factors=own.factors._replace(g=torch.zeros_like(own.factors.g)))
    state = state._replace(curvature=state.curvature._replace(matrix={"weight": empty}))
    assert D.ekfac_gain(state)["weight"].item() == 1.0


def test_the_gain_sees_the_factors_in_the_old_bases():
    """Between refreshes A and G move on, the bases do not."""
    case = CASES["mlp"]
    tx = kf.kfac(C.eigen(), damping=0.3, decay=0.5)
    state = kf.observe(tx.init(case.params), run(case)[2])
    other = case._replace(inputs=case.inputs.flip(1) + 1)
    state = kf.observe(state, run(other)[2], refresh=False)
    own = state.curvature.matrix["first.w"]
    a, g, t = merged(own.factors)
    diagonals = [(u.mT @ densify(x) @ u).diagonal() for x, u in ((g, own.bases.g), (a, own.bases.a))]
    wanted = (own.scalings - t * torch.outer(*diagonals)).norm() / own.scalings.norm()
    assert close(D.ekfac_gain(state)["first.w"], wanted)


@pytest.mark.parametrize("structure", ["kronecker", "exact", "sua", "flat", "eigen", "diagonal"])
def test_metrics_map_over_stacked_states(structure: str):
    case, (curvature, split) = CASES["conv"], STRUCTURES[structure]
    tx = kf.kfac(curvature, damping=0.3, split=split)
    batches = [case, case._replace(inputs=case.inputs.flip(2) + 0.5)]
    states = [kf.observe(tx.init(one.params), run(one)[2]) for one in batches]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    metrics = [D.spectra, D.traces, D.condition_numbers, D.pi, D.damping, D.dead_units]
    for metric in [*metrics, D.ekfac_gain] if structure == "eigen" else metrics:
        together = pytree.tree_leaves(torch.vmap(metric)(stacked))
        for k, state in enumerate(states):
            alone = pytree.tree_leaves(metric(state))
            assert len(alone) == len(together)
            for x, y in zip(together, alone, strict=True):
                finite = y.double() < 1e12  # beyond, a condition number is rounding
                assert close(x[k].double()[finite], y.double()[finite], 1e-9) if finite.any() else True


def test_spectra_are_differentiable_and_leave_the_state_alone():
    state = fitted("eigen", "mlp")
    before = [x.clone() for x in _tree.leaves(state)]
    scalings = state.curvature.matrix["first.w"].scalings

    def trace(s: Tensor) -> Tensor:
        own = state.curvature.matrix["first.w"]._replace(scalings=s)
        moved = state.curvature._replace(matrix=state.curvature.matrix | {"first.w": own})
        return D.traces(state._replace(curvature=moved))["first.w"]

    assert torch.equal(torch.func.grad(trace)(scalings), torch.ones_like(scalings))
    assert all(map(torch.equal, before, _tree.leaves(state)))


OF_BLOCKS = [D.factors, D.spectra, D.traces, D.condition_numbers, D.pi, D.dead_units, D.ekfac_gain]
METRICS = [*OF_BLOCKS, D.damping]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_states_without_statistics_and_several_states_are_refused(metric: Any):
    tx = kf.kfac(damping=0.1)
    fresh = tx.init(CASES["mlp"].params)
    with pytest.raises(StateError, match=r"no statistics(.|\n)*kf\.fit_curvature"):
        metric(fresh)
    with pytest.raises(StateError, match=r"several K-FAC states(.|\n)*pass one of them"):
        metric((fresh, fresh))
    with pytest.raises(StateError, match="no K-FAC state inside"):
        metric({"w": torch.ones(2)})


@pytest.mark.parametrize("metric", OF_BLOCKS, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("curvature", ["full", "two_level"])
def test_curvature_between_blocks_is_refused(metric: Any, curvature: str):
    case = CASES["mlp"]
    tx = kf.kfac(C.full() if curvature == "full" else C.two_level(C.kronecker()), damping=0.1)
    state = kf.observe(tx.init(case.params), run(case)[2])
    with pytest.raises(StateError, match=r"couples the blocks(.|\n)*eigen\(\)"):
        metric(state)
    assert set(D.damping(state)) == set(case.blocks)


def test_without_scalings_there_is_no_gain():
    with pytest.raises(StateError, match=r"no block has the scalings of EKFAC(.|\n)*kronecker"):
        D.ekfac_gain(fitted("kronecker", "mlp"))
