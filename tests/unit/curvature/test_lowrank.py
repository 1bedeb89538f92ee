"""Structures that fit sums of Kronecker products to the exact block, and what they share with the single product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func._errors import HyperparameterError
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import Block, densify, merged
from kfac_func.blocks.rearranged import Frame
from kfac_func.curvature import Structure
from kfac_func.curvature.corrected import CorrectedState, corrected
from kfac_func.curvature.deflation import deflation
from kfac_func.curvature.kpsvd import kpsvd
from kfac_func.curvature.lanczos import lanczos
from kfac_func.damping import pi_split
from kfac_func.linalg.sums import FLOOR, SumFactored, Terms, densified
from tests.unit.curvature.exact_blocks import (
    BLOCKS,
    ONE,
    TIGHT,
    absorbed,
    best,
    block_of,
    exact,
    matrix,
    rearranged_matrix,
    rescaled,
    symmetric_part,
)
from tests.zoo import CASES, close, direction, kronecker_block, measured, randn, subset

DAMPING = torch.tensor(0.03, dtype=torch.float64)
SUMS: dict[str, Callable[..., Structure]] = {
    "deflation": deflation,
    "lanczos": lanczos,
    "corrected": corrected,
    "deflation 3": lambda **options: deflation(3, **options),
    "lanczos 3": lambda **options: lanczos(3, **options),
}
STRUCTURES = {"kpsvd": kpsvd, **SUMS}
each = pytest.mark.parametrize("name", BLOCKS)
sums = pytest.mark.parametrize("make", SUMS.values(), ids=SUMS)
structures = pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)


def tight(structure: str) -> Structure:
    return STRUCTURES[structure](**({"steps": 60} if structure.startswith("lanczos") else TIGHT))


def halves(name: str) -> tuple[Block, Block]:
    """Two batches of one block that differ."""
    case, path = BLOCKS[name]
    n = len(CASES[case].targets)
    return tuple(measured(subset(CASES[case], *ends))[path] for ends in ((0, n // 2), (n // 2, n)))  # pyright: ignore


def terms_of(state: Any) -> Terms:
    """All terms of a state."""
    if isinstance(state, Terms):
        return state
    a, g, t = merged(state.kronecker)
    first = t * densify(a), densify(g)
    return Terms(*(torch.cat([x[None], y]) for x, y in zip(first, state.correction, strict=True)))


def shape_of(state: Any) -> tuple[int, ...]:
    terms = terms_of(state)
    return (*terms.r.shape[1:-2], terms.s.shape[-1], terms.r.shape[-1])


# ------------------------------------------------------------------------------------ approximations


@each
def test_errors_are_those_of_the_dense_singular_values(name):
    """‖F − F̂‖² = ‖F‖² − Σ_{k≤r} σ_k², the σ of Z on symmetric matrices."""
    block = block_of(name)
    f = exact(block)
    sigmas = torch.stack([torch.linalg.svdvals(symmetric_part(rearranged_matrix(one))) for one in f])
    for rank in (1, 2, 3):
        wanted = (f.square().sum() - sigmas[:, :rank].square().sum()).sqrt()
        for own in (deflation(rank, **TIGHT), lanczos(rank, steps=60), lanczos(rank, steps=rank + 20)):
            error = (matrix(f) - own.dense(absorbed(own, block))).norm()
            assert close(error, wanted, 1e-7), (own.name, error / wanted)
            assert error > (1 - 1e-9) * wanted


@each
def test_defaults_are_near_the_best(name):
    block = block_of(name)
    f = matrix(exact(block))
    for own in (deflation(), lanczos()):
        wanted = (f - best(exact(block), 2)).norm()
        assert (f - own.dense(absorbed(own, block))).norm() < 1.01 * wanted


@each
def test_more_terms_are_never_further_away(name):
    block = block_of(name)
    f = matrix(exact(block))

    def error(own: Structure) -> Tensor:
        return (f - own.dense(absorbed(own, block))).norm()

    kfac = (f - kronecker_block(block)).norm()
    assert error(corrected()) < kfac
    assert error(corrected(iterations=1)) < kfac
    assert error(deflation(3)) < error(deflation()) < error(kpsvd()) < kfac


def test_a_second_term_that_is_not_deflated_is_further_away():
    """The mutant: R₂ ⊗ S₂ = R₁ ⊗ S₁."""
    for name in BLOCKS:
        f, state = matrix(exact(block_of(name))), absorbed(deflation(), block_of(name))
        mutant = Terms(state.r[[0, 0]], state.s[[0, 0]])
        one = (f - densified(Terms(state.r[:1], state.s[:1]))).norm()
        assert (f - densified(state)).norm() < one < (f - densified(mutant)).norm()


@each
def test_corrected_is_kfac_and_the_best_product_for_the_rest(name):
    block = block_of(name)
    own = corrected(**TIGHT)
    kfac = kronecker_block(block)
    rest = _unmatrix(matrix(exact(block)) - kfac, exact(block))
    assert close(own.dense(absorbed(own, block)), kfac + best(rest, 1), 1e-6)


def _unmatrix(m: Tensor, like: Tensor) -> Tensor:
    """The diagonal blocks of a matrix, shaped like the F of every group."""
    size = len(m) // len(like)
    return (
        torch.stack([x[k] for k, x in enumerate(m.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2))])[
            :, range(size)
        ]
        .diagonal(0, 0, 0)
        .reshape_as(like)
        if False
        else torch.stack(
            [m[k * size : (k + 1) * size, k * size : (k + 1) * size] for k in range(len(like))]
        ).reshape_as(like)
    )


def test_a_block_of_lower_rank_is_exact_and_leaves_zeros():
    """One example at one position: F = Σ_v g gᵀ ⊗ a aᵀ is one product."""
    block = measured(subset(CASES["mlp"], 0, 1))["first.w"]
    f = matrix(exact(block))
    for own in (deflation(3), lanczos(3), kpsvd()):
        state = absorbed(own, block)
        assert close(own.dense(state), f)
        assert all(x[1:].abs().max() < 1e-7 * x[0].abs().max() for x in state if len(x) > 1)
        v = own.solve(own.factorize(state, DAMPING, "pi"), randn(*shape_of(state)))
        assert v.isfinite().all()


# ------------------------------------------------------------------------------------ averages


@pytest.mark.parametrize("structure", STRUCTURES)
@each
def test_two_batches_give_the_best_approximation_of_their_mixture(name, structure):
    own, (one, two) = tight(structure), halves(name)
    old = absorbed(own, one)
    new = absorbed(own, two, 0.3, old)
    mixture = 0.7 * own.dense(old) + 0.3 * matrix(exact(two))
    kfac = _kfac(new)
    wanted = kfac + best(_unmatrix(mixture - kfac, exact(two)), len(terms_of(new).r) - (structure == "corrected"))
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
    assert close(own.solve(own.factorize(dead, DAMPING, "pi"), u), u / DAMPING)
    assert close(own.dense(absorbed(own, block, 1.0, dead)), own.dense(absorbed(own, block)), 1e-9)


@structures
def test_absorb_is_pure_and_gives_the_same_twice(make):
    own, (one, two) = make(), halves("conv")
    state, prepared = absorbed(own, one), own.prepare(two)
    before, versions = tree_map(torch.clone, (state, prepared)), [x._version for x in leaves((state, prepared))]
    found = [own.absorb(state, lambda f: own.measure(prepared, f), 0.3 * ONE) for _ in range(2)]
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
    """Two ranks with half a batch each, whose moments are averaged look by look, have the state of the whole batch."""
    case, path = BLOCKS["conv"]
    whole = measured(subset(CASES[case], 0, 6))[path]
    own = make()
    ranks = [own.prepare(measured(subset(CASES[case], k, k + 3))[path]) for k in (0, 3)]

    def look(frame: Any) -> Any:
        return tree_map(lambda x, y: (x + y) / 2, *(own.measure(prepared, frame) for prepared in ranks))

    assert close(own.dense(own.absorb((), look, ONE)), own.dense(absorbed(own, whole)), 1e-8)


def test_later_batches_start_where_the_last_one_ended():
    """A stream that hardly changes needs fewer looks."""
    own, block, counts = deflation(iterations=50, tolerance=1e-4), block_of("conv"), []
    prepared, state = own.prepare(block), ()
    for fraction in (1.0, 0.1):
        frames = []

        def look(frame: Any, frames: list = frames) -> Any:
            frames.append(frame)
            return own.measure(prepared, frame)

        state = own.absorb(state, look, fraction * ONE)
        assert all(isinstance(frame, Frame) for frame in frames[1:])
        counts.append(len(frames))
    assert counts[1] < counts[0] / 2


# ------------------------------------------------------------------------------------ solving


def rebuilt(factored: SumFactored) -> Tensor:
    """The inverse that the factored parts describe, groups along the diagonal."""
    k1, k2, d, later = factored
    if k1.ndim == 2:
        k1, k2, d, later = k1[None], k2[None], d[None], Terms(*(x.unsqueeze(1) for x in later))
    found = []
    for q in range(len(d)):
        k, inner = torch.kron(k2[q], k1[q]), torch.diag(d[q].flatten())
        for r, s in zip(later.r[:, q], later.s[:, q], strict=True):
            inner = inner + torch.kron(s, r)
        found.append(k @ torch.linalg.inv(inner) @ k.mT)
    return torch.block_diag(*found)


def operator(own: Structure, factored: Any, shape: tuple[int, ...]) -> Tensor:
    p = torch.Size(shape).numel()
    eye = torch.eye(p, dtype=torch.float64).reshape(p, *shape)
    return torch.stack([own.solve(factored, v).flatten() for v in eye], dim=1)


@sums
@pytest.mark.parametrize("split", ["pi", "none"])
@each
def test_solve_is_symmetric_positive_definite_and_inverts_the_damped_sum(name, split, make):
    own = make()
    state = absorbed(own, block_of(name))
    terms = terms_of(state)
    shape = shape_of(state)
    for damping in (DAMPING, 100 * DAMPING):
        factored = own.factorize(state, damping, split)
        found = operator(own, factored, shape)
        assert close(found, rebuilt(factored), 1e-9)
        assert close(found, found.mT, 1e-9)
        assert torch.linalg.eigvalsh((found + found.mT) / 2).min() > 0
        if len(terms.r) == 2 and factored.diagonal.min() > FLOOR:
            assert close(found @ _damped(terms, damping, split), torch.eye(len(found)).double(), 1e-8)
    assert factored.diagonal.min() > FLOOR  # at the larger damping


def _damped(terms: Terms, damping: Tensor, split: Any) -> Tensor:
    """(S₁ + λ_g I) ⊗ (R₁ + λ_a I) + S₂ ⊗ R₂."""
    shifts = pi_split(terms.r[0], terms.s[0], damping, split)
    first = [x[0] + c[..., None, None] * torch.eye(x.shape[-1]) for x, c in zip(terms, shifts, strict=True)]
    return densified(Terms(*(torch.stack([x, y[1]]) for x, y in zip(first, terms, strict=True))))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_an_indefinite_sum_is_still_solved_with_a_definite_operator(rank):
    """Adversarial states: later terms as large as the first, of either sign, and tiny damping."""
    own = deflation(rank)
    for seed in range(10):
        r, s = randn(rank, 5, 5, seed=seed), randn(rank, 4, 4, seed=seed + 50)
        r, s = (torch.cat([x[:1, :, :3] @ x[:1, :, :3].mT, 10 * (x + x.mT)[1:]]) for x in (r, s))
        for damping in (1e-6, 1e-2, 1.0):
            factored = own.factorize(Terms(r, s), damping * ONE, "pi")
            found = operator(own, factored, (4, 5))
            found = (found + found.mT) / 2
            values = torch.linalg.eigvalsh(found)
            assert values.min() > 0
            if rank > 1:
                assert factored.diagonal.min() < 1.0001 * FLOOR or damping == 1e-6


@structures
@each
def test_large_damping_is_division_by_it(name, make):
    own = make()
    state = absorbed(own, block_of(name))
    u = randn(*shape_of(state))
    assert close(1e14 * own.solve(own.factorize(state, 1e14 * ONE, "pi"), u), u, 1e-5)
    assert torch.count_nonzero(own.solve(own.factorize(state, DAMPING, "pi"), 0 * u)) == 0


@sums
def test_exact_damping_is_refused(make):
    own = make()
    state = absorbed(own, block_of("linear"))
    with pytest.raises(HyperparameterError, match=rf"{own.name.split('[')[0]}.* has no exact damping"):
        own.factorize(state, DAMPING, "exact")


@structures
@pytest.mark.parametrize("name", ["linear", "conv", "groups"])
def test_vmap_is_a_loop(name, make):
    own, (one, two) = make(), halves(name)
    prepared = [own.prepare(rescaled(two, g=c)) for c in (1.0, 0.5, 2.0)]
    state = absorbed(own, one)
    vs = torch.stack([randn(*shape_of(state), seed=k) for k in range(3)])

    def run(prepared: Any, v: Tensor) -> Tensor:
        new = own.absorb(state, lambda frame: own.measure(prepared, frame), 0.3 * ONE)
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


@structures
def test_single_precision(make):
    case, path = BLOCKS["conv"]
    own, block = make(), measured(CASES[case])[path]
    single = block._replace(
        uses=tuple(use._replace(inputs=use.inputs.float(), grads=use.grads.float()) for use in block.uses)  # pyright: ignore
    )
    one, other = absorbed(own, block), absorbed(own, single)
    assert {leaf.dtype for leaf in leaves(other)} == {torch.float32}
    assert close(own.dense(other).double(), own.dense(one), 1e-4)
    u = randn(*shape_of(one))
    found = own.solve(own.factorize(other, DAMPING, "pi"), u.float())
    assert found.dtype == torch.float32
    assert close(found.double(), own.solve(own.factorize(one, DAMPING, "pi"), u), 1e-3)


@pytest.mark.parametrize("radius", [0, 1])
@structures
def test_radius_is_for_maps_and_keeps_the_solve_definite(make, radius):
    whole, own = make(), make(radius=radius)
    for name in ("conv", "groups", "linear"):
        state = absorbed(own, block_of(name))
        same = close(own.dense(state), whole.dense(absorbed(whole, block_of(name))), 1e-9)
        assert same == (name == "linear")
        found = operator(own, own.factorize(state, DAMPING, "pi"), shape_of(state))
        assert torch.linalg.eigvalsh((found + found.mT) / 2).min() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: deflation(0),
        lambda: deflation(iterations=0),
        lambda: deflation(radius=-1),
        lambda: lanczos(0),
        lambda: lanczos(3, steps=2),
        lambda: lanczos(radius=-1),
        lambda: corrected(iterations=0),
        lambda: corrected(radius=-1),
    ],
)
def test_values_without_meaning(make):
    with pytest.raises(HyperparameterError, match="at least"):
        make()


def test_every_option_counts():
    block = block_of("conv")
    for make, options in (
        (deflation, ({"rank": 3}, {"iterations": 1}, {"tolerance": 0.9}, {"radius": 0})),
        (lanczos, ({"rank": 3}, {"steps": 2}, {"radius": 0})),
        (corrected, ({"iterations": 1}, {"tolerance": 0.9}, {"radius": 0})),
    ):
        plain = make().dense(absorbed(make(), block))
        for option in options:
            own = make(**option)
            assert not close(own.dense(absorbed(own, block)), plain, 1e-9), (own.name, option)


@structures
@pytest.mark.parametrize("name", ["conv", "grouped", "tokens", "tied"])
def test_the_whole_way_gives_a_descent_direction(name, make):
    found = direction(CASES[name], curvature=make(), damping=1e-2)
    value, grads, _ = kf.value_grad_and_stats(CASES[name].fn, CASES[name].loss, estimator=kf.estimators.exact())(
        CASES[name].params, CASES[name].batch
    )
    del value
    flat = {path: leaf for path, leaf in _flat(grads).items()}
    assert all(leaf.isfinite().all() for leaf in found.values())
    assert sum((found[path] * flat[path]).sum() for path in found) > 0


def _flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {prefix[:-1]: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in _flat(value, f"{prefix}{key}.").items()}


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
