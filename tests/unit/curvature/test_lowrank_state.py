"""The states of sums of Kronecker products: averages, purity, transformations, and the whole way through `kf.kfac`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import Use
from kfac_func.curvature import Batch
from kfac_func.curvature.corrected import CorrectedState
from kfac_func.curvature.deflation import deflation
from kfac_func.linalg.sums import Terms, densified
from tests import oracles
from tests.unit.curvature.exact_blocks import (
    BLOCKS,
    DAMPING,
    ONE,
    STRUCTURES,
    absorbed,
    best,
    block_of,
    exact,
    groups_of,
    halves,
    matrix,
    rescaled,
    shape_of,
    terms_of,
    tight,
)
from tests.zoo import CASES, close, direction, measured, randn, run, subset

each = pytest.mark.parametrize("name", BLOCKS)
structures = pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)


@pytest.mark.parametrize("structure", STRUCTURES)
@each
def test_two_batches_give_the_best_approximation_of_their_mixture(name, structure):
    own, (one, two) = tight(structure), halves(name)
    old = absorbed(own, one)
    new = absorbed(own, two, 0.3, old)
    mixture = 0.7 * own.dense(old) + 0.3 * matrix(exact(two))
    kfac = _kfac(new)
    wanted = kfac + best(groups_of(mixture - kfac, exact(two)), len(terms_of(new).r) - (structure == "corrected"))
    assert close(own.dense(new), wanted, 1e-5)
    assert not close(own.dense(new), own.dense(old), 1e-2)
    assert (terms_of(new).r[0].diagonal(dim1=-2, dim2=-1).sum(-1) > 0).all()


def _kfac(state: Any) -> Tensor | int:
    return densified(Terms(*(x[:1] for x in terms_of(state)))) if isinstance(state, CorrectedState) else 0


@pytest.mark.parametrize("structure", STRUCTURES)
@each
def test_a_constant_stream_is_a_fixed_point(name, structure):
    own, block = tight(structure), block_of(name)
    old = absorbed(own, block)
    new = absorbed(own, block, 0.1, absorbed(own, block, 0.4, old))
    assert close(own.dense(new), own.dense(old), 1e-6)


def shown(own: Any, prepared: Any) -> Batch:
    """What was prepared, as its structure may see it."""
    return Batch(own.measure(prepared), lambda question: question(prepared))


@structures
def test_a_fraction_of_zero_changes_nothing(make):
    own, (one, two) = make(), halves("linear")
    old = absorbed(own, one)
    assert all(map(torch.equal, leaves(absorbed(own, two, 0.0, old)), leaves(old)))
    nothing = absorbed(own, one, 0.0)
    assert torch.count_nonzero(own.dense(nothing)) == 0
    u = randn(*shape_of(old))
    assert close(own.solve(own.factorize(nothing, DAMPING, "pi"), u), u / DAMPING)


@structures
@pytest.mark.parametrize("name", ["linear", "conv", "groups"])
def test_a_dead_batch_gives_finite_results_and_the_next_one_recovers(name, make):
    own, block = make(), block_of(name)
    dead = absorbed(own, rescaled(block, g=0.0))
    assert torch.count_nonzero(own.dense(dead)) == 0
    u = randn(*shape_of(dead))
    v = own.solve(own.factorize(dead, DAMPING, "pi"), u)
    assert v.isfinite().all()
    assert close(v, u / DAMPING) or own.name == "corrected"  # whose A is alive, as in K-FAC
    assert close(own.dense(absorbed(own, block, 1.0, dead)), own.dense(absorbed(own, block)), 1e-9)


@structures
def test_absorb_is_pure_and_gives_the_same_twice(make):
    own, (one, two) = make(), halves("conv")
    state, prepared = absorbed(own, one), own.prepare(two)
    before, versions = tree_map(torch.clone, (state, prepared)), [x._version for x in leaves((state, prepared))]
    found = [own.absorb(state, shown(own, prepared), 0.3 * ONE) for _ in range(2)]
    assert all(map(torch.equal, *map(leaves, found)))
    assert all(map(torch.equal, leaves(before), leaves((state, prepared))))
    assert versions == [x._version for x in leaves((state, prepared))]


@structures
@pytest.mark.parametrize("name", ["no bias", "conv", "groups"])
def test_scales_of_inputs_and_gradients_only_scale(name, make):
    own, block = make(), block_of(name)
    wanted = own.dense(absorbed(own, block))
    assert close(1e8 * own.dense(absorbed(own, rescaled(block, g=1e-4))), wanted, 1e-7)
    if name == "no bias":
        assert close(1e-6 * own.dense(absorbed(own, rescaled(block, a=1e4, g=1e-1))), wanted, 1e-7)


@structures
def test_moments_average_over_ranks(make):
    """Two ranks with half a batch each, whose answers are averaged, have the state of the whole batch."""
    case, path = BLOCKS["conv"]
    whole = measured(subset(CASES[case], 0, 6))[path]
    own = make()
    ranks = [own.prepare(measured(subset(CASES[case], k, k + 3))[path]) for k in (0, 3)]

    def mean(question: Any) -> Any:
        return tree_map(lambda x, y: (x + y) / 2, *map(question, ranks))

    state = own.absorb((), Batch(mean(own.measure), mean), ONE)
    assert close(own.dense(state), own.dense(absorbed(own, whole)), 1e-8)


def test_later_batches_start_where_the_last_one_ended():
    """A stream that hardly changes needs fewer questions."""
    own, block, counts = deflation(iterations=50, tolerance=1e-4), block_of("conv"), []
    prepared, state = own.prepare(block), ()
    for fraction in (1.0, 0.1):
        questions = []

        def ask(question: Any, questions: list = questions) -> Any:
            questions.append(question)
            return question(prepared)

        state = own.absorb(state, Batch(own.measure(prepared), ask), fraction * ONE)
        counts.append(len(questions))
    assert counts[1] < counts[0] / 2


@structures
@pytest.mark.parametrize("name", ["linear", "conv", "groups"])
def test_vmap_is_a_loop(name, make):
    own, (one, two) = make(), halves(name)
    prepared = [own.prepare(rescaled(two, g=c)) for c in (1.0, 0.5, 2.0)]
    state = absorbed(own, one)
    vs = torch.stack([randn(*shape_of(state), seed=k) for k in range(3)])

    def run(prepared: Any, v: Tensor) -> Tensor:
        new = own.absorb(state, shown(own, prepared), 0.3 * ONE)
        return own.solve(own.factorize(new, DAMPING, "pi"), v)

    found = torch.func.vmap(run)(tree_map(lambda *x: torch.stack(x), *prepared), vs)
    loop = torch.stack([run(p, v) for p, v in zip(prepared, vs, strict=True)])
    assert close(found, loop, 1e-7)
    assert not close(found, torch.stack([run(prepared[0], v) for v in vs]), 1e-3)


@structures
def test_derivatives_in_the_damping(make):
    own = make()
    state = absorbed(own, block_of("linear"))
    u = randn(*shape_of(state))

    def energy(damping: Tensor) -> Tensor:
        return (u * own.solve(own.factorize(state, damping, "pi"), u)).sum()

    slope = (energy(DAMPING + 1e-6) - energy(DAMPING - 1e-6)) / 2e-6
    assert close(torch.func.grad(energy)(DAMPING), slope, 1e-5)


def _single(use: Use) -> Use:
    assert use.grads is not None
    return use._replace(inputs=use.inputs.float(), grads=use.grads.float())


@structures
def test_single_precision(make):
    case, path = BLOCKS["conv"]
    own, block = make(), measured(CASES[case])[path]
    single = block._replace(uses=tuple(map(_single, block.uses)))
    one, other = absorbed(own, block), absorbed(own, single)
    assert {leaf.dtype for leaf in leaves(other)} == {torch.float32}
    assert close(own.dense(other).double(), own.dense(one), 1e-4)
    u = randn(*shape_of(one))
    found = own.solve(own.factorize(other, DAMPING, "pi"), u.float())
    assert found.dtype == torch.float32
    assert close(found.double(), own.solve(own.factorize(one, DAMPING, "pi"), u), 1e-3)


@structures
@pytest.mark.parametrize("name", ["conv", "grouped", "tokens", "tied"])
def test_the_whole_way_gives_a_descent_direction(name, make):
    case = CASES[name]
    found, grads = direction(case, curvature=make(), damping=1e-2), oracles.flat(run(case)[1])
    assert all(leaf.isfinite().all() for leaf in found.values())
    assert sum((found[path] * grads[path]).sum() for path in found) > 0


@structures
def test_several_steps_of_the_whole_way(make):
    """Averages, refresh and solve through `kf.kfac`, with a batch that is not finite in between."""
    fn, params = kf.make_functional(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)))
    params = tree_map(torch.Tensor.double, params)
    step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    tx = kf.kfac(make(), damping=1e-2)
    state = tx.init(params)
    for k in range(4):
        x = randn(6, 3, seed=k) if k != 2 else torch.full((6, 3), torch.nan, dtype=torch.float64)
        _, grads, stats = step(params, (x, F.pad(x.sin(), (0, -1))))
        v, state = tx.update(tree_map(torch.nan_to_num, grads), state, params, stats=stats)
        assert all(leaf.isfinite().all() for leaf in leaves(v))
    assert (int(state.observed), int(state.rejected), int(state.failed)) == (3, 1, 0)


@pytest.mark.compile
@pytest.mark.parametrize("structure", ["kpsvd", "deflation", "lanczos", "corrected"])
def test_one_graph_for_absorb_factorize_and_solve(structure):
    few = {"steps": 3} if structure == "lanczos" else {"iterations": 2}
    own, (one, two) = STRUCTURES[structure](**few), halves("conv")
    state, prepared = absorbed(own, one), own.prepare(two)
    u = randn(*shape_of(state))

    def fn(state: Any, prepared: Any, fraction: Tensor, damping: Tensor) -> Tensor:
        new = own.absorb(state, shown(own, prepared), fraction)
        return own.solve(own.factorize(new, damping, "pi"), u)

    args = state, prepared, 0.3 * ONE, DAMPING
    assert close(torch.compile(fn, backend="aot_eager", fullgraph=True)(*args), fn(*args), 1e-9)
