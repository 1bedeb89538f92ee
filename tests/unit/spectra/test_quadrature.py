"""Stochastic Lanczos quadrature: exact moments of every probe, a density of mass one, honest errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from tests.unit.spectra.operators import LIKE, P, on_tree, seeded, symmetric

VALUES = torch.linspace(-1, 2, P, dtype=torch.float64)
POSITIVE = torch.linspace(0.1, 4, P, dtype=torch.float64)


def probes(count: int) -> Tensor:
    draws, source = [], seeded()
    for _ in range(count):
        draws.append(2.0 * torch.randint(0, 2, (P,), generator=source) - 1)
    return torch.stack(draws).double()


def moments(nodes: Tensor, weights: Tensor, degree: int) -> Tensor:
    return (weights * nodes**degree).sum(-1)


def test_moments_are_exact_up_to_degree_2m_minus_1_and_no_further():
    steps, matrix = 4, symmetric(VALUES)
    found = kf.spectra.spectral_density(on_tree(matrix), LIKE, generator=seeded(), probes=3, steps=steps)
    for degree in range(2 * steps + 1):
        power = torch.linalg.matrix_power(matrix, degree)
        exact = torch.einsum("kp,pq,kq->k", probes(3), power, probes(3)) / P
        gap = (moments(found.nodes, found.weights, degree) - exact).abs().max()
        assert gap < 1e-10 if degree < 2 * steps else gap > 1e-4, degree


@pytest.mark.parametrize("width", [None, 1e-6, 0.05, 3.0])
@pytest.mark.parametrize("points", [7, 1000])
def test_the_density_integrates_to_one(width: float | None, points: int):
    found = kf.spectra.spectral_density(
        on_tree(symmetric(VALUES)), LIKE, generator=seeded(), probes=2, steps=6, width=width, points=points
    )
    cell = found.grid[1] - found.grid[0]
    assert found.density.shape == found.grid.shape == (points,)
    assert (found.density >= 0).all()
    assert abs(float(found.density.sum() * cell) - 1) < 1e-8
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    mean = (found.weights * found.nodes).sum(-1).mean()
    assert abs(float((found.grid * found.density).sum() * cell - mean)) < float(cell)


def test_the_density_is_a_mixture_of_gaussians():
    found = kf.spectra.spectral_density(on_tree(symmetric(VALUES)), LIKE, generator=seeded(), probes=3, width=0.2)
    z = (found.grid[:, None, None] - found.nodes) / 0.2
    wanted = (found.weights * torch.exp(-(z**2) / 2) / (0.2 * (2 * torch.pi) ** 0.5)).sum(-1).mean(-1)
    torch.testing.assert_close(found.density, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 5.0])
def test_one_eigenvalue_alone(scale: float):
    found = kf.spectra.spectral_density(
        on_tree(scale * torch.eye(P, dtype=torch.float64)), LIKE, generator=seeded(), probes=2
    )
    assert found.density.isfinite().all()
    peak = found.grid[found.density.argmax()]
    assert abs(float(peak) - scale) < 1e-2
    assert abs(float(found.density.sum() * (found.grid[1] - found.grid[0])) - 1) < 1e-6


def test_log_determinant_within_its_error():
    matrix, damping = symmetric(POSITIVE), 0.05
    exact = float(torch.logdet(matrix + damping * torch.eye(P, dtype=torch.float64)))
    found = kf.spectra.log_determinant(on_tree(matrix), LIKE, damping=damping, generator=seeded(), probes=30, steps=P)
    assert 0 < float(found.error) < 0.1 * abs(exact)
    assert abs(float(found.value) - exact) < 3 * float(found.error)


def test_a_trace_of_a_function_is_that_of_the_matrix_for_every_probe():
    """With P steps the quadrature is exact: the estimate is the mean of vᵀ f(A) v."""
    matrix = symmetric(POSITIVE)
    values, basis = torch.linalg.eigh(matrix)
    v = probes(5)
    exact = ((v @ basis).square() * values.sqrt()).sum(-1)
    found = kf.spectra.trace_of(torch.sqrt, on_tree(matrix), LIKE, generator=seeded(), probes=5, steps=P)
    torch.testing.assert_close(found.value, exact.mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.error, exact.std() / 5**0.5, rtol=1e-8, atol=0)


def test_the_error_covers_the_truth():
    matrix, exact = symmetric(POSITIVE), float(POSITIVE.log().sum())
    found = [
        kf.spectra.log_determinant(on_tree(matrix), LIKE, generator=seeded(s), probes=12, steps=16, chunk_size=None)
        for s in range(60)
    ]
    gaps = torch.stack([(x.value - exact) / x.error for x in found])
    assert (gaps.abs() < 2.5).double().mean() > 0.9
    assert gaps.abs().median() > 0.3  # nor is it much too large


def test_rows_that_end_early_beside_others_keep_their_measure():
    """A diagonal operator on which some sign vectors... all see two eigenvalues: spaces of dimension 2, of 8 steps."""
    values = torch.cat([torch.full((13,), 2.0), torch.full((13,), 3.0)]).double()
    for size in (1, None):
        found = kf.spectra.trace_of(
            torch.log, on_tree(symmetric(values)), LIKE, generator=seeded(), probes=40, steps=8, chunk_size=size
        )
        assert abs(float(found.value - values.log().sum())) < 3 * float(found.error)


@pytest.mark.parametrize("steps", [5, P])
def test_chunks_change_nothing(steps: int):
    matvec = on_tree(symmetric(POSITIVE))
    one, some, every = (
        kf.spectra.spectral_density(matvec, LIKE, generator=seeded(), probes=5, steps=steps, chunk_size=size)
        for size in (1, 2, None)
    )
    for other in (some, every):
        torch.testing.assert_close(other.nodes, one.nodes, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(other.density, one.density, rtol=1e-7, atol=1e-7)


def test_progress_sees_every_chunk():
    seen: list[int] = []
    kf.spectra.spectral_density(
        on_tree(symmetric(POSITIVE)), LIKE, generator=seeded(), probes=5, chunk_size=2,
        progress=lambda parts: [seen.append(part) or part for part in parts],
    )  # fmt: skip
    assert seen == [2, 2, 1]


def test_gradients_with_respect_to_the_operator_and_the_damping():
    """∂ log det(s A + λ)/∂λ = tr (s A + λ)⁻¹ on the probes, by the derivative of the same quadrature."""
    matrix = symmetric(POSITIVE)

    def value(s: Tensor, damping: Tensor) -> Tensor:
        return kf.spectra.log_determinant(
            lambda v: on_tree(s * matrix)(v), LIKE, damping=damping, generator=seeded(), probes=3, steps=P
        ).value

    s, damping = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    grads = torch.func.grad(value, (0, 1))(s, damping)
    inverse = torch.linalg.inv(matrix + damping * torch.eye(P, dtype=torch.float64))
    wanted = [torch.einsum("kp,pq,kq->", probes(3), m, probes(3)) / 3 for m in (inverse @ matrix, inverse)]
    for got, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-7, atol=0)
