"""Eigenbases refreshed along a moving matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_func.linalg.rotation import refreshed_basis

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
SIZE, LEADING = 80, 16  # `share` is a fifth


def moment(generator: torch.Generator, size: int, count: int, *batch: int, dtype: torch.dtype) -> Tensor:
    """The second moment of rows with decaying variances in mixed directions, the same ones for every size."""
    directions = torch.Generator().manual_seed(size)
    mixing = torch.linalg.qr(torch.randn(size, size, generator=directions, dtype=torch.float64))[0]
    rows = torch.randn(*batch, count, size, generator=generator, dtype=torch.float64)
    rows = rows * torch.arange(1, size + 1) ** -0.7 @ mixing
    return (rows.mT @ rows / count).to(dtype)


def gapped(generator: torch.Generator, *, size: int = SIZE, rank: int = LEADING, small: float = 0.1) -> Tensor:
    """Eigenvalues 2 … 3 and, `rank` of them, 0 … small, in mixed directions."""
    values = torch.cat([torch.linspace(0, small, size - rank), torch.linspace(2, 3, rank)]).double()
    mixing = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return (mixing * values) @ mixing.mT


def eye(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a)


def coupling(a: Tensor, basis: Tensor) -> Tensor:
    """What UᵀAU has off its diagonal in the leading columns, relative to all of A."""
    a = a / a.abs().amax((-2, -1), keepdim=True)  # squares of small entries underflow
    b = basis.mT @ a @ basis
    off = b - torch.diag_embed(b.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.matrix_norm(off[..., -LEADING:]) / torch.linalg.matrix_norm(a)


def orthogonality(basis: Tensor) -> float:
    return (basis.mT @ basis - eye(basis)).abs().max().item()


def test_repeated_on_a_fixed_matrix_the_leading_columns_become_eigenvectors(generator: torch.Generator) -> None:
    a = torch.stack([gapped(generator), 1e-100 * gapped(generator)])
    basis = eye(a)
    assert coupling(a, basis).min() > 0.1
    basis = refreshed_basis(a, basis, 60)
    assert coupling(a, basis).max() < 1e-12
    exact = torch.linalg.eigh(a)[1]
    torch.testing.assert_close((basis.mT @ exact).abs()[..., -LEADING:], eye(a)[..., -LEADING:], rtol=0, atol=1e-9)
    assert orthogonality(basis) < 1e-12


def test_a_sweep_takes_the_error_down_by_the_ratio_of_shifted_eigenvalues(generator: torch.Generator) -> None:
    a = gapped(generator, small=1.0)
    exact = torch.linalg.eigh(a)[1]
    noise = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    basis = exact @ torch.linalg.matrix_exp(1e-3 * (noise - noise.mT))
    for _ in range(4):  # (1 - ½) / (2 - ½); without the shift 1 / 2
        before, basis = basis, refreshed_basis(a, basis)
        errors = [torch.linalg.matrix_norm(exact[:, :-LEADING].mT @ u[:, -LEADING:], 2) for u in (before, basis)]
        assert errors[1] < 0.34 * errors[0]


def test_the_rest_is_turned_no_more_than_it_must(generator: torch.Generator) -> None:
    a = gapped(generator)
    exact = torch.linalg.eigh(a)[1]
    noise = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    near = exact @ torch.linalg.matrix_exp(1e-4 * (noise - noise.mT))
    rest, moved = near[:, :-LEADING], refreshed_basis(a, near)[:, :-LEADING]
    torch.testing.assert_close(rest.mT @ moved, torch.eye(SIZE - LEADING).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(refreshed_basis(a, exact).abs(), exact.abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", LIMITS)
def test_it_stays_orthogonal_over_a_thousand_refreshes(dtype: torch.dtype, generator: torch.Generator) -> None:
    a = moment(generator, SIZE, 160, dtype=dtype)
    basis = eye(a)
    for _ in range(1000):
        x = torch.randn(20, SIZE, generator=generator, dtype=torch.float64).to(dtype)
        a = torch.lerp(a, x.mT @ x / 20, 0.05)
        basis = refreshed_basis(a, basis)
    assert orthogonality(basis) < LIMITS[dtype]
    assert coupling(a, basis) < 0.5 * coupling(a, eye(a))


@pytest.mark.parametrize("dtype", LIMITS)
def test_deficient_and_zero_matrices_leave_it_orthogonal(dtype: torch.dtype, generator: torch.Generator) -> None:
    a = moment(generator, SIZE, 3, 4, dtype=dtype)  # rank 3
    a[1] = 0.0
    a[2] *= 1e-30
    a[3] = -a[3]  # rounding can do that, and much less
    basis = refreshed_basis(a, eye(a), 30)
    assert orthogonality(basis) < LIMITS[dtype]
    assert coupling(a, basis)[::2].max() < LIMITS[dtype]
    torch.testing.assert_close(basis[1], eye(a)[1], rtol=0, atol=0)


def test_a_drifting_stream_keeps_the_preconditioned_vector(generator: torch.Generator) -> None:
    sizes, v = (100, 80), torch.randn(80, 100, generator=generator)
    frames = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for size in sizes]
    drifts = [torch.randn(size, size, generator=generator) for size in sizes]
    values = [torch.cat([torch.linspace(0, 1e-3, size - 12), torch.linspace(1, 4, 12)]) for size in sizes]

    def preconditioned(bases: list[Tensor]) -> Tensor:
        u_a, u_g = bases
        a, g = ((u.mT @ x @ u).diagonal() for u, x in zip(bases, moments, strict=True))
        return u_g @ ((u_g.mT @ v @ u_a) / (torch.outer(g, a) + 0.1)) @ u_a.mT

    bases, errors = frames, []
    for time in range(1, 31):
        turned = [torch.linalg.matrix_exp(2e-3 * time * (x - x.mT)) @ u for x, u in zip(drifts, frames, strict=True)]
        moments = [(u * x) @ u.mT for u, x in zip(turned, values, strict=True)]
        bases = [refreshed_basis(x, u) for x, u in zip(moments, bases, strict=True)]
        exact = preconditioned([torch.linalg.eigh(x)[1] for x in moments])
        errors.append([(preconditioned(some) - exact).norm() / exact.norm() for some in (bases, frames)])
    assert max(warm for warm, _ in errors) < 1e-2
    assert errors[-1][1] > 0.1


def test_scale_batches_vmap_and_repetition(generator: torch.Generator) -> None:
    a = moment(generator, SIZE, 200, 3, dtype=torch.float64)
    basis = refreshed_basis(a, eye(a), 3)
    assert torch.equal(basis, refreshed_basis(a, eye(a), 3))
    torch.testing.assert_close(refreshed_basis(2.0**-30 * a, eye(a), 3), basis, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.vmap(lambda a, u: refreshed_basis(a, u, 3))(a, eye(a)), basis, rtol=0, atol=1e-9)
    for one, other in zip(a, basis, strict=True):
        torch.testing.assert_close(refreshed_basis(one, eye(one), 3), other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("size", "share"), [(SIZE, 1.0), (8, 0.2), (1, 0.2)])
def test_small_matrices_and_the_whole_share_are_decomposed(size: int, share: float, generator: torch.Generator) -> None:
    a = moment(generator, size, 200, 2, dtype=torch.float64)
    torch.testing.assert_close(refreshed_basis(a, eye(a), share=share), torch.linalg.eigh(a)[1])


def test_its_derivative_is_that_of_its_differences(generator: torch.Generator) -> None:
    a, weights = moment(generator, SIZE, 200, 2, dtype=torch.float64)

    def seen(t: Tensor) -> Tensor:
        u = refreshed_basis(a + t * weights, eye(a))
        return (weights * (u.mT @ a @ u)).square().sum()

    at, step = torch.tensor(0.1).double(), 1e-6
    slope = (seen(at + step) - seen(at - step)) / (2 * step)
    torch.testing.assert_close(torch.func.grad(seen)(at), slope, rtol=1e-5, atol=0)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_one_graph_equal_to_eager(generator: torch.Generator) -> None:
    a = moment(generator, SIZE, 200, 2, dtype=torch.float64)
    compiled = torch.compile(lambda a, u: refreshed_basis(a, u, 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, eye(a)), refreshed_basis(a, eye(a), 2))
