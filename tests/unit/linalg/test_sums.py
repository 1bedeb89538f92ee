"""Sums of Kronecker products against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least
from kfac_func.linalg.krylov import Triplet
from kfac_func.linalg.sums import (
    FLOOR,
    RADIUS,
    SumFactored,
    Terms,
    _radius,
    averaged,
    changed,
    densified,
    factorized_sum,
    positive,
    solve_sum,
    terms_of,
    warm,
)
from tests.zoo import close, randn

IN, OUT = 5, 4
SHIFTS = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
RANKS = (1, 2, 3, 5)


def symmetric(*shape: int, seed: int) -> Tensor:
    x = randn(*shape, seed=seed)
    return (x + x.mT) / 2


def terms(rank: int, size: float = 0.1, seed: int = 0, lead: tuple[int, ...] = ()) -> Terms:
    """A definite first term, and later ones of a given size."""
    r, s = symmetric(rank, *lead, IN, IN, seed=seed), symmetric(rank, *lead, OUT, OUT, seed=seed + 1)
    r, s = (torch.cat([x[:1] @ x[:1].mT, size**0.5 * x[1:]]) for x in (r, s))
    return Terms(r, s)


def dense(factored: SumFactored) -> Tensor:
    """The inverse as a matrix, from the factored parts."""
    k = torch.kron(factored.k2, factored.k1)
    inner = torch.diag(factored.diagonal.flatten())
    inner = inner + densified(factored.later) if len(factored.later.r) else inner
    return k @ torch.linalg.inv(inner) @ k.mT


def damped(sums: Terms) -> Tensor:
    r, s = sums.r[0] + SHIFTS[0] * torch.eye(IN).double(), sums.s[0] + SHIFTS[1] * torch.eye(OUT).double()
    return torch.kron(s, r) + sum(torch.kron(y, x) for x, y in zip(sums.r[1:], sums.s[1:], strict=True))


def operator(factored: SumFactored) -> Tensor:
    """`solve_sum` as a matrix."""
    eye = torch.eye(OUT * IN, dtype=factored.k1.dtype).reshape(OUT * IN, OUT, IN)
    return torch.stack([solve_sum(factored, v).flatten() for v in eye], dim=1)


@pytest.mark.parametrize("rank", RANKS)
def test_solve_is_the_inverse_of_the_damped_sum(rank):
    sums = terms(rank, 0.01)
    factored = factorized_sum(sums, *SHIFTS)
    assert factored.diagonal.min() > FLOOR
    assert close(operator(factored) @ damped(sums), torch.eye(OUT * IN).double(), 1e-9)
    assert not close(operator(factored) @ damped(terms(rank, 0.02)), torch.eye(OUT * IN).double(), 1e-3) or rank == 1


@pytest.mark.parametrize("size", [0.01, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("rank", RANKS)
def test_solve_is_symmetric_positive_definite_whatever_the_later_terms(rank, size):
    for seed in range(5):
        factored = factorized_sum(terms(rank, size, seed), *SHIFTS)
        found = operator(factored)
        assert close(found, dense(factored), 1e-9)
        assert close(found, found.mT, 1e-9)
        assert torch.linalg.eigvalsh(found).min() > 0


def test_the_floor_binds_and_nothing_is_amplified_beyond_the_damping():
    """The second term takes more than the first away: −5 · S₁ ⊗ R₁."""
    first = terms(1)
    sums = Terms(torch.cat([first.r, -5 * first.r]), torch.cat([first.s, first.s]))
    factored = factorized_sum(sums, *SHIFTS)
    k1, k2, d, _ = factored
    assert close(d.min(), torch.tensor(FLOOR, dtype=torch.float64))
    lengths = k2.square().sum(0)[:, None] * k1.square().sum(0)
    assert (lengths / d * SHIFTS[0] * SHIFTS[1]).max() <= 1 + 1e-12
    assert (lengths / d.clamp(max=FLOOR) * SHIFTS[0] * SHIFTS[1]).max() > 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("rank", [3, 5])
def test_the_bound_is_a_bound(rank, size):
    for seed in range(20):
        later, d = terms(rank, size, seed), randn(OUT, IN, seed=seed).exp()
        root = d.rsqrt().flatten()
        true = torch.linalg.eigvalsh(root[:, None] * densified(later) * root).abs().max()
        assert true <= _radius(later, d) * (1 + 1e-12)


def test_the_bound_is_sharp_where_it_can_be():
    """Nonnegative terms with D = 1, where the bound of Collatz and Wielandt converges; and one term, by its norms."""
    ones = torch.ones(OUT, IN, dtype=torch.float64)
    nonnegative = Terms(*(x.abs() for x in terms(3)))
    true = torch.linalg.eigvalsh(densified(nonnegative)).max()
    assert true <= _radius(nonnegative, ones) <= 1.1 * true
    single = Terms(*(x[:1] for x in terms(2)))
    assert close(_radius(single, ones), torch.linalg.eigvalsh(densified(single)).abs().max())


def test_later_terms_are_scaled_down_together_and_no_more_than_needed():
    small, large = (factorized_sum(terms(4, size), *SHIFTS) for size in (1e-3, 1e2))
    assert close(_radius(large.later, large.diagonal), torch.tensor(RADIUS, dtype=torch.float64))
    assert _radius(small.later, small.diagonal) < RADIUS
    wanted = small.k2.mT @ terms(4, 1e-3).s[2:] @ small.k2
    assert close(small.later.s, wanted)


@pytest.mark.parametrize("rank", RANKS)
def test_groups_are_a_loop(rank):
    sums, v = terms(rank, 3.0, lead=(3,)), randn(3, OUT, IN)
    shifts = [x * torch.arange(1, 4) for x in SHIFTS]
    found = solve_sum(factorized_sum(sums, *shifts), v)
    for q in range(3):
        own = factorized_sum(Terms(sums.r[:, q], sums.s[:, q]), shifts[0][q], shifts[1][q])
        assert close(found[q], solve_sum(own, v[q]))


@pytest.mark.parametrize("rank", RANKS)
def test_single_precision(rank):
    sums, v = terms(rank, 0.1), randn(OUT, IN)
    found = solve_sum(factorized_sum(Terms(*(x.float() for x in sums)), *SHIFTS), v.float())
    assert found.dtype == torch.float32
    assert close(found.double(), solve_sum(factorized_sum(sums, *SHIFTS), v), 1e-4)


@pytest.mark.parametrize("rank", RANKS)
def test_zero_terms_leave_the_damping(rank):
    zeros = Terms(*(0 * x for x in terms(rank)))
    v = randn(OUT, IN)
    assert close(solve_sum(factorized_sum(zeros, *SHIFTS), v), v / SHIFTS[0] / SHIFTS[1])


@pytest.mark.parametrize("rank", [2, 3])  # one term leaves an eigenbasis open
def test_solve_has_derivatives_in_the_shift(rank):
    sums, v = terms(rank, 0.1), randn(OUT, IN)

    def energy(shift: Tensor) -> Tensor:
        return (v * solve_sum(factorized_sum(sums, shift, SHIFTS[1]), v)).sum()

    step = 1e-5
    slope = torch.func.grad(energy)(SHIFTS[0])
    assert close(slope, (energy(SHIFTS[0] + step) - energy(SHIFTS[0] - step)) / (2 * step), 1e-6)


def test_positive_cuts_negative_eigenvalues():
    values, basis = torch.linalg.eigh(symmetric(IN, IN, seed=3))
    assert values.min() < 0
    assert close(positive(basis @ values.diag() @ basis.mT), basis @ values.clamp(min=0).diag() @ basis.mT)


def test_terms_carry_the_root_of_sigma_on_either_side():
    triplets = [
        Triplet(torch.tensor(c).double(), randn(IN, IN, seed=k), randn(OUT, OUT)) for k, c in enumerate((4.0, 9.0))
    ]
    found = terms_of(triplets)
    for k, (sigma, left, right) in enumerate(triplets):
        assert close(found.r[k], sigma.sqrt() * (left + left.mT) / 2)
        assert close(found.s[k], sigma.sqrt() * (right + right.mT) / 2)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_averaged_products(lead, monkeypatch):
    old, batch = terms(2, 1.0, lead=lead), terms(3, 1.0, seed=7, lead=lead)
    v, u = symmetric(*lead, OUT, OUT, seed=1), symmetric(*lead, IN, IN, seed=2)

    def mapped(sums: Terms, x: Tensor) -> Tensor:
        onto, other = sums if x is v else sums[::-1]
        return sum((b * x).sum((-2, -1), keepdim=True) * a for a, b in zip(onto, other, strict=True))  # pyright: ignore[reportReturnType]

    for name in ("to_inputs", "to_outputs"):
        monkeypatch.setattr(f"kfac_func.linalg.sums.{name}", mapped)
    f = torch.tensor(0.3, dtype=torch.float64)
    for state in (old, ()):
        for product, x in zip(averaged(state, lambda question: question(batch), f), (v, u), strict=True):
            before = 0 if state == () else 0.7 * mapped(old, x)
            assert close(product(x), before + 0.3 * mapped(batch, x))


def test_a_fraction_of_zero_changes_nothing():
    old, new, zero, some = terms(2), terms(2, seed=5), torch.tensor(0.0), torch.tensor(0.1)
    assert all(map(torch.equal, changed(old, new, zero), old))
    assert all(map(torch.equal, changed(old, new, some), new))
    assert all(torch.count_nonzero(x) == 0 for x in changed((), new, zero))


def test_a_start_is_the_old_matrix_unless_it_is_zero():
    fresh, old = randn(2, OUT, OUT), randn(2, OUT, OUT, seed=1)
    old[0] = 0
    assert torch.equal(warm(old, fresh), torch.stack([fresh[0], old[1]]))
    assert warm(None, fresh) is fresh


def test_options_below_their_least_value():
    at_least(1, rank=1, radius=None)
    with pytest.raises(HyperparameterError, match="rank must be at least 1"):
        at_least(1, rank=0)
