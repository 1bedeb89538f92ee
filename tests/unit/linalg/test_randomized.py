"""The core on rows: several starts at once, spaces that end at different steps, and shapes at the edge."""

from __future__ import annotations

import torch

from kfac_func.linalg.eigenpairs import eigenpairs
from kfac_func.linalg.inner import PIECE, inner, norm, orthonormal
from kfac_func.linalg.randomized import estimate, hutch_pp, quadratic_forms, xtrace
from kfac_func.linalg.tridiagonal import orthogonalised, ritz, tridiagonal

SCALES = torch.tensor([0.0, 1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
EYE = torch.eye(5, dtype=torch.float64)


def scaled(rows: torch.Tensor) -> torch.Tensor:
    return rows * SCALES


def test_starts_end_by_themselves():
    """Starts of one, two and five components end after as many steps; what follows has no weight."""
    start = torch.stack([EYE[3], EYE[1] + EYE[4], torch.ones(5, dtype=torch.float64)])
    found = tridiagonal(scaled, start, 5, 1e-3)
    assert found.steps.tolist() == [1, 2, 5]
    measure = ritz(found)
    for row, components in enumerate([[3], [1, 4], [0, 1, 2, 3, 4]]):
        exact = SCALES[components]
        for degree in range(6):
            got = (measure.weights[row] * measure.values[row] ** degree).sum()
            torch.testing.assert_close(got, (exact**degree).mean(), rtol=1e-10, atol=1e-10)
    assert (found.basis[0, 1:] == 0).all()
    assert (found.alpha[0] == 4).all()
    assert measure.values.min() > -1e-10  # the padding stays inside the spectrum
    assert measure.values.max() < 7 + 1e-10


def test_one_start_ends_the_loop():
    assert tridiagonal(scaled, EYE[2:3], 5, 1e-3).alpha.shape == (1, 1)


def test_the_basis_stays_orthonormal_on_a_hard_spectrum():
    """A spectrum over twelve orders of magnitude, on which Lanczos without re-orthogonalisation repeats itself."""
    scales = 10 ** torch.linspace(-12, 0, 60, dtype=torch.float64)
    found = tridiagonal(lambda rows: rows * scales, torch.ones(1, 60, dtype=torch.float64), 25, 1e-3)
    basis = found.basis[0]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-12)


def test_orthogonalised_splits_a_row():
    components, rest = orthogonalised(torch.ones(1, 5, dtype=torch.float64), EYE[:2].unsqueeze(0))
    assert components.tolist() == [[1.0, 1.0]]
    assert rest.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]]


def test_eigenpairs_of_a_space_that_fills_up():
    """Blocks of two in five dimensions: the last block is cut to what is left, and all five pairs are found."""
    found = eigenpairs(
        scaled, torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 5,
        which="smallest", tolerance=1e-10, max_steps=1, room=9, symmetry=1e-3,
    )  # fmt: skip
    torch.testing.assert_close(found.values, SCALES, rtol=0, atol=1e-10)
    assert found.converged.all()


def test_eigenpairs_from_an_invariant_start():
    """The start holds only one eigenvector, so that the residual is zero and the rest must be made up."""
    found = eigenpairs(
        scaled, EYE[1:2].clone(), 2, which="largest", tolerance=1e-10, max_steps=9, room=5, symmetry=1e-3
    )  # fmt: skip
    vectors = found.vectors
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)
    residuals = torch.linalg.vector_norm(scaled(vectors) - found.values.unsqueeze(-1) * vectors, dim=-1)
    torch.testing.assert_close(found.residuals, residuals, rtol=0, atol=1e-10)


def test_samples_of_the_trace():
    probes = torch.stack([EYE[0] + EYE[1], EYE[2] - EYE[3]])
    torch.testing.assert_close(quadratic_forms(scaled, probes), torch.tensor([1.0, 6.0], dtype=torch.float64))
    # the sketch by the first unit vectors takes their eigenvalues out of the rest
    got = hutch_pp(scaled, EYE[3:], torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(got, torch.full((2,), 14.0, dtype=torch.float64))
    found = estimate(got)
    assert (float(found.value), float(found.error)) == (14.0, 0.0)


def test_xtrace_with_columns_that_vanish():
    """An operator that is zero, or of rank 1 along a unit vector, leaves exact zeros in R."""
    probes = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (xtrace(torch.zeros_like, probes) == 0).all()
    projector = EYE[3].outer(EYE[3]) * 4
    torch.testing.assert_close(
        xtrace(lambda rows: rows @ projector, probes), torch.full((4,), 4.0, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_long_rows_in_float32_keep_their_digits():
    """70 000 entries: plain float32 sums would leave the basis orthogonal to 1e-4 only, and never converge."""
    size, k = 70_000, 4
    scales = 1 / torch.arange(1.0, size + 1)
    start = torch.randn(k, size, generator=torch.Generator().manual_seed(0))
    found = eigenpairs(
        lambda rows: rows * scales, start, k, which="largest", tolerance=3e-6, max_steps=30, room=20, symmetry=1e-2
    )
    assert found.converged.all()
    torch.testing.assert_close(found.values, scales[:k], rtol=0, atol=2e-6)
    x = found.vectors.double()
    torch.testing.assert_close(x @ x.mT, torch.eye(k, dtype=torch.float64), rtol=0, atol=5e-6)


def test_inner_products_norms_and_bases():
    rows = torch.randn(3, PIECE + 5, generator=torch.Generator().manual_seed(0))
    exact = rows.double() @ rows.double().mT
    torch.testing.assert_close(inner(rows, rows), exact.float(), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(norm(rows), exact.diagonal().sqrt().float(), rtol=1e-6, atol=0)
    assert float(norm(torch.zeros(4))) == 0
    q, r = orthonormal(rows)
    torch.testing.assert_close(r.mT @ q, rows, rtol=0, atol=1e-5)
    torch.testing.assert_close(q.double() @ q.double().mT, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    q, r = orthonormal(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))  # more rows than entries
    assert (q.shape, r.shape) == ((3, 3), (3, 5))


def test_inner_products_see_what_is_small_beside_one():
    """1 + 30 000 · 1e-8: every term is below half a unit in the last place of float32 1."""
    row = torch.full((1, 30_001), 1e-4)
    row[0, 0] = 1
    assert abs(float(inner(row, row)) - 1.0003) < 2e-7
