"""Structures that fit sums of Kronecker products to the exact block, and what they share with the single product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError
from kfac_func.curvature import Structure
from kfac_func.curvature.corrected import corrected
from kfac_func.curvature.deflation import deflation
from kfac_func.curvature.kpsvd import kpsvd
from kfac_func.curvature.lanczos import lanczos
from kfac_func.damping import pi_split
from kfac_func.linalg.sums import FLOOR, SumFactored, Terms, densified
from tests.unit.curvature.exact_blocks import (
    BLOCKS,
    DAMPING,
    ONE,
    STRUCTURES,
    SUMS,
    TIGHT,
    absorbed,
    best,
    block_of,
    exact,
    groups_of,
    matrix,
    operator,
    rearranged_matrix,
    shape_of,
    symmetric_part,
    terms_of,
)
from tests.zoo import CASES, close, kronecker_block, measured, randn, subset

each = pytest.mark.parametrize("name", BLOCKS)
sums = pytest.mark.parametrize("make", SUMS.values(), ids=SUMS)
structures = pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)


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
    rest = groups_of(matrix(exact(block)) - kfac, exact(block))
    assert close(own.dense(absorbed(own, block)), kfac + best(rest, 1), 1e-6)


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
    for seed in range(4):
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


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("deflation", {"rank": 3}),
    ("deflation", {"iterations": 1}),
    ("deflation", {"tolerance": 0.9}),
    ("deflation", {"radius": 0}),
    ("lanczos", {"rank": 3}),
    ("lanczos", {"steps": 2}),
    ("lanczos", {"radius": 0}),
    ("corrected", {"iterations": 1}),
    ("corrected", {"tolerance": 0.9}),
    ("corrected", {"radius": 0}),
]


@pytest.mark.parametrize(("structure", "option"), OPTIONS)
def test_every_option_counts(structure, option):
    one, other = (own.dense(absorbed(own, block_of("conv"))) for own in (SUMS[structure](), SUMS[structure](**option)))
    assert not close(one, other, 1e-9)
