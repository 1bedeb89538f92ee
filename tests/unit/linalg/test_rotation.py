"""Eigenbases refreshed along a moving matrix, and diagonals carried between bases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_func.linalg.rotation import reexpressed, refreshed_basis

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


def moment(generator: torch.Generator, size: int, count: int, *batch: int, dtype: torch.dtype) -> Tensor:
    """The second moment of rows with decaying variances in mixed directions, the same ones for every size."""
    directions = torch.Generator().manual_seed(size)
    mixing = torch.linalg.qr(torch.randn(size, size, generator=directions, dtype=torch.float64))[0]
    rows = torch.randn(*batch, count, size, generator=generator, dtype=torch.float64)
    rows = rows * torch.arange(1, size + 1) ** -0.7 @ mixing
    return (rows.mT @ rows / count).to(dtype)


def eye(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a)


def off_diagonal(a: Tensor, basis: Tensor) -> Tensor:
    a = a / a.abs().amax((-2, -1), keepdim=True)  # squares of small entries underflow
    b = basis.mT @ a @ basis
    return torch.linalg.matrix_norm(b - torch.diag_embed(b.diagonal(dim1=-2, dim2=-1))) / torch.linalg.matrix_norm(a)


def orthogonality(basis: Tensor) -> float:
    return (basis.mT @ basis - eye(basis)).abs().max().item()


def test_repeated_on_a_fixed_matrix_it_converges_to_the_eigenbasis(generator: torch.Generator) -> None:
    a = moment(generator, 40, 80, 3, dtype=torch.float64)
    a[1] = a[1] / (a[1].diagonal().sqrt() * a[1].diagonal().sqrt().unsqueeze(-1))
    a[1].fill_diagonal_(1.0)  # all gaps of the first basis are ties
    a[2] *= 1e-40
    basis = eye(a)
    assert off_diagonal(a, basis).min() > 0.1
    basis = refreshed_basis(a, basis, 60)
    assert off_diagonal(a, basis).max() < 1e-12
    values = (basis.mT @ a @ basis).diagonal(dim1=-2, dim2=-1).sort().values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(a), rtol=1e-9, atol=0.0)


def test_near_the_eigenbasis_it_converges_quadratically(generator: torch.Generator) -> None:
    a = moment(generator, 20, 40, dtype=torch.float64)
    exact = torch.linalg.eigh(a)[1]
    noise = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    near = exact @ torch.linalg.matrix_exp(1e-5 * (noise - noise.mT))
    before, after = off_diagonal(a, near), off_diagonal(a, refreshed_basis(a, near))
    assert after < 1e-3 * before
    torch.testing.assert_close(refreshed_basis(a, near, 2), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", LIMITS)
def test_it_stays_orthogonal_over_a_thousand_refreshes(dtype: torch.dtype, generator: torch.Generator) -> None:
    a = moment(generator, 12, 20, dtype=dtype)
    basis = eye(a)
    for _ in range(1000):
        x = torch.randn(5, 12, generator=generator, dtype=torch.float64).to(dtype)
        a = torch.lerp(a, x.mT @ x / 5, 0.05)
        basis = refreshed_basis(a, basis)
    assert orthogonality(basis) < LIMITS[dtype]
    assert off_diagonal(a, basis) < 0.1 < off_diagonal(a, eye(a))


@pytest.mark.parametrize("dtype", LIMITS)
def test_deficient_and_zero_matrices_leave_it_orthogonal(dtype: torch.dtype, generator: torch.Generator) -> None:
    a = moment(generator, 12, 3, 3, dtype=dtype)
    a[1] = 0.0
    a[2] *= 1e-30
    basis = refreshed_basis(a, eye(a), 60)
    assert orthogonality(basis) < LIMITS[dtype]
    assert off_diagonal(a, basis)[::2].max() < LIMITS[dtype]
    torch.testing.assert_close(basis[1], eye(a)[1], rtol=0, atol=0)
    exact = torch.linalg.eigh(a[0])[1]  # rounding errors must not turn its null vectors
    torch.testing.assert_close(refreshed_basis(a[0], exact), exact, rtol=0, atol=10 * LIMITS[dtype])


def test_a_drifting_stream_keeps_the_preconditioned_vector(generator: torch.Generator) -> None:
    sizes, v = (60, 40), torch.randn(40, 60, generator=generator)
    moments = [moment(generator, size, 1000, dtype=torch.float32) for size in sizes]
    bases = [torch.linalg.eigh(x)[1] for x in moments]
    stale = bases

    def preconditioned(bases: list[Tensor]) -> Tensor:
        u_a, u_g = bases
        a, g = ((u.mT @ x @ u).diagonal() for u, x in zip(bases, moments, strict=True))
        s = torch.outer(g, a)
        return u_g @ ((u_g.mT @ v @ u_a) / (s + 1e-3 * s.mean())) @ u_a.mT

    exact = preconditioned(bases)
    for _ in range(20):
        drifts = [moment(generator, size, 500, dtype=torch.float32) for size in sizes]
        moments = [torch.lerp(x, y, 0.05) for x, y in zip(moments, drifts, strict=True)]
        bases = [refreshed_basis(x, u, 2) for x, u in zip(moments, bases, strict=True)]
        exact = preconditioned([torch.linalg.eigh(x)[1] for x in moments])
        assert (preconditioned(bases) - exact).norm() < 1e-2 * exact.norm()
    assert (preconditioned(stale) - exact).norm() > 0.1 * exact.norm()


def test_scale_batches_vmap_and_repetition(generator: torch.Generator) -> None:
    a = moment(generator, 10, 30, 3, dtype=torch.float64)
    basis = refreshed_basis(a, eye(a), 3)
    assert torch.equal(basis, refreshed_basis(a, eye(a), 3))
    torch.testing.assert_close(refreshed_basis(1e-8 * a, eye(a), 3), basis, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.vmap(lambda a, u: refreshed_basis(a, u, 3))(a, eye(a)), basis, rtol=0, atol=1e-10)
    for one, other in zip(a, basis, strict=True):
        torch.testing.assert_close(refreshed_basis(one, eye(one), 3), other, rtol=0, atol=1e-10)


def test_its_derivatives_are_finite_also_at_ties(generator: torch.Generator) -> None:
    a, weights = moment(generator, 5, 9, dtype=torch.float64), torch.randn(5, 5, generator=generator).double()
    for one in (a, a / (a.diagonal().sqrt() * a.diagonal().sqrt().unsqueeze(-1)), eye(a).clone(), 0 * a):
        assert torch.func.grad(lambda a: (weights * refreshed_basis(a, eye(a))).sum())(one).isfinite().all()


def test_reexpressed_is_the_diagonal_of_the_rotated_matrix(generator: torch.Generator) -> None:
    s = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    old_g, new_g, old_a, new_a = (
        torch.linalg.qr(torch.randn(2, d, d, generator=generator, dtype=torch.float64))[0] for d in (3, 3, 4, 4)
    )
    new = reexpressed(s, old_g.mT @ new_g, old_a.mT @ new_a)
    for n in range(2):
        old_basis, new_basis = torch.kron(old_g[n], old_a[n]), torch.kron(new_g[n], new_a[n])
        matrix = (old_basis * s[n].flatten()) @ old_basis.mT
        torch.testing.assert_close(new[n].flatten(), (new_basis.mT @ matrix @ new_basis).diagonal())
    torch.testing.assert_close(new.sum((-2, -1)), s.sum((-2, -1)))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_one_graph_equal_to_eager(generator: torch.Generator) -> None:
    a = moment(generator, 6, 9, 2, dtype=torch.float64)
    compiled = torch.compile(lambda a, u: refreshed_basis(a, u, 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, eye(a)), refreshed_basis(a, eye(a), 2))
