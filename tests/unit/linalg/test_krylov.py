"""Singular triplets of the rearranged operator and the two-term inverse, against dense decompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_func.linalg.krylov import Operator, Triplet, deflated, golub_kahan, power, start_matrix, two_term

N, D_A, D_G = 6, 4, 3  # Z has min(N, D_A(D_A + 1)/2, D_G(D_G + 1)/2) = 6 triplets
RANK = 6


def rows(generator: torch.Generator, *batch: int) -> tuple[Tensor, Tensor]:
    a = torch.randn(*batch, N, D_A, generator=generator, dtype=torch.float64)
    return a, torch.randn(*batch, N, D_G, generator=generator, dtype=torch.float64)


def operator(a: Tensor, g: Tensor) -> tuple[Operator, Operator]:
    """Z v = (1/N) Σ_n (g_nᵀ v g_n) a_n a_nᵀ and its adjoint."""

    def product(to: Tensor, source: Tensor) -> Operator:
        def apply(v: Tensor) -> Tensor:
            weights = torch.einsum("...np,...pq,...nq->...n", source, v, source)
            return torch.einsum("...n,...np,...nq->...pq", weights, to, to) / to.shape[-2]

        return apply

    return product(a, g), product(g, a)


def dense(a: Tensor, g: Tensor) -> Tensor:
    """Z as a matrix [i², o²]."""
    return torch.einsum("np,nq,nr,ns->pqrs", a, a, g, g).reshape(D_A * D_A, D_G * D_G) / N


def singular(z: Tensor, rank: int) -> list[Triplet]:
    """The leading triplets of a dense Z, with tr(left) ≥ 0."""
    u, s, vh = torch.linalg.svd(z)
    found = []
    for k in range(rank):
        left, right = u[:, k].reshape(D_A, D_A), vh[k].reshape(D_G, D_G)
        sign = -1.0 if left.trace() < 0 else 1.0
        found.append(Triplet(s[k], sign * left, sign * right))
    return found


def close(one: Any, other: Any, tolerance: float = 1e-9) -> None:
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def leading(a: Tensor, g: Tensor) -> Triplet:
    return power(*operator(a, g), g.mT @ g, 200, 1e-13)


def several(a: Tensor, g: Tensor) -> list[Triplet]:
    return golub_kahan(*operator(a, g), g.mT @ g, 3, 8)


def test_power_is_the_leading_singular_triplet(generator: torch.Generator) -> None:
    a, g = rows(generator)
    close(leading(a, g), singular(dense(a, g), 1)[0])
    assert leading(a, g).left.trace() > 0
    assert (torch.linalg.eigvalsh(leading(a, g).right) > -1e-12).all()


def test_power_counts_its_iterations_and_stops(generator: torch.Generator) -> None:
    a, g = rows(generator)
    forward, adjoint = operator(a, g)
    calls: list[int] = []

    def counted(v: Tensor) -> Tensor:
        calls.append(1)
        return forward(v)

    power(counted, adjoint, g.mT @ g, 5, 0.0)
    assert len(calls) == 5
    loose = power(counted, adjoint, g.mT @ g, 500, 1e-3)
    assert 5 < len(calls) < 30
    exact = singular(dense(a, g), 1)[0]
    assert 1e-12 < (loose.right - exact.right).norm() < 1e-2


@pytest.mark.parametrize("method", [lambda a, g: [leading(a, g)], several])
def test_scaled_rows_scale_the_values_only(method: Any, generator: torch.Generator) -> None:
    a, g = rows(generator)
    for plain, scaled in zip(method(a, g), method(1e4 * a, 1e-4 * g), strict=True):
        close(plain, scaled)
    for plain, scaled in zip(method(a, g), method(a, 1e-40 * g), strict=True):
        close(plain._replace(sigma=plain.sigma * 1e-80), scaled)
        torch.testing.assert_close(plain.sigma * 1e-80, scaled.sigma, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("method", [lambda a, g: [leading(a, g)], several])
def test_a_zero_operator_has_zero_triplets(method: Any, generator: torch.Generator) -> None:
    a, g = rows(generator)
    for one in [*method(0 * a, g), *method(a, 0 * g)]:
        assert all((x == 0).all() for x in one)


@pytest.mark.parametrize("steps", [RANK, RANK + 1, RANK + 5])
def test_golub_kahan_is_the_dense_svd_and_zero_beyond_the_rank(steps: int, generator: torch.Generator) -> None:
    a, g = rows(generator)
    found = golub_kahan(*operator(a, g), start_matrix(D_G, g), steps, steps)
    assert len(found) == steps
    for one, exact in zip(found[:RANK], singular(dense(a, g), RANK), strict=True):
        assert exact.sigma > 1e-4
        close(one, exact)
    for one in found[RANK:]:
        assert all((x == 0).all() for x in one)


def test_golub_kahan_below_the_rank_bounds_the_values_from_below(generator: torch.Generator) -> None:
    a, g = rows(generator)
    exact = singular(dense(a, g), 2)
    last = 0.0
    for steps in (2, 3, 4, 5):
        found = golub_kahan(*operator(a, g), g.mT @ g, 2, steps)
        assert last < found[0].sigma <= exact[0].sigma + 1e-12
        assert found[1].sigma <= exact[1].sigma + 1e-12
        last = found[0].sigma
    close(found[0], exact[0], 1e-4)


def test_golub_kahan_finds_a_rank_below_the_number_of_rows(generator: torch.Generator) -> None:
    a, g = rows(generator)
    a, g = a[[0, 1, 0, 1, 0, 1]], g[[0, 1, 0, 1, 0, 1]]
    one, two, three = golub_kahan(*operator(a, g), start_matrix(D_G, g), 3, 6)
    close(one, singular(dense(a, g), 2)[0])
    close(two, singular(dense(a, g), 2)[1])
    assert all((x == 0).all() for x in three)


def test_float32_triplets_beyond_the_rank_are_zero(generator: torch.Generator) -> None:
    a, g = rows(generator)
    found = golub_kahan(*operator(a.float(), g.float()), start_matrix(D_G, g.float()), RANK + 2, RANK + 2)
    for one, exact in zip(found[:2], singular(dense(a, g), 2), strict=True):
        close(one, Triplet(*(x.float() for x in exact)), 1e-4)
    assert all((x == 0).all() for one in found[RANK:] for x in one)


def test_the_triplets_found_are_orthonormal_and_sum_to_the_operator(generator: torch.Generator) -> None:
    a, g = rows(generator)
    found = golub_kahan(*operator(a, g), start_matrix(D_G, g), RANK, RANK)
    for side in ("left", "right"):
        every = torch.stack([getattr(one, side).flatten() for one in found])
        torch.testing.assert_close(every @ every.T, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-10)
    total = sum(torch.outer(one.sigma * one.left.flatten(), one.right.flatten()) for one in found)
    torch.testing.assert_close(total, dense(a, g), rtol=0, atol=1e-10)


def test_power_on_the_deflated_operator_is_the_second_triplet(generator: torch.Generator) -> None:
    a, g = rows(generator)
    rest = deflated(*operator(a, g), [leading(a, g)])
    close(power(*rest, start_matrix(D_G, g), 2000, 1e-13), singular(dense(a, g), 2)[1], 1e-7)
    u = start_matrix(D_A, g)
    exact = dense(a, g).T @ u.flatten()
    first = singular(dense(a, g), 1)[0]
    exact = exact - first.sigma * (first.left * u).sum() * first.right.flatten()
    torch.testing.assert_close(rest[1](u).flatten(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [lambda a, g: [leading(a, g)], several])
def test_batches_and_vmap_are_loops_and_repeatable(method: Any, generator: torch.Generator) -> None:
    a, g = rows(generator, 3)
    g[1] = 0.0
    batch, again, mapped = method(a, g), method(a, g), torch.vmap(method)(a, g)
    for k, one in enumerate(batch):
        assert all(torch.equal(x, y) for x, y in zip(one, again[k], strict=True))
        close(one, mapped[k], 1e-10)
        for q in range(3):
            close([x[q] for x in one], method(a[q], g[q])[k], 1e-10)


def test_a_converged_operator_of_a_batch_waits_for_the_others(generator: torch.Generator) -> None:
    a, g = rows(generator, 3)

    def loose(a: Tensor, g: Tensor) -> Triplet:
        return power(*operator(a, g), g.mT @ g, 50, 1e-2)

    close(loose(a, g), torch.vmap(loose)(a, g), 1e-12)
    for q in range(3):
        close([x[q] for x in loose(a, g)], loose(a[q], g[q]), 1e-12)


@pytest.mark.parametrize("method", [lambda a, g: leading(a, g).sigma, lambda a, g: several(a, g)[1].sigma])
def test_derivatives_are_those_of_the_singular_value(method: Any, generator: torch.Generator) -> None:
    a, g = rows(generator)
    index = int(method(a, g) < 0.999 * torch.linalg.svdvals(dense(a, g))[0])
    exact = torch.func.grad(lambda a: torch.linalg.svdvals(dense(a, g))[index])(a)
    found = torch.func.grad(lambda a: method(a, g))(a)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_the_start_is_symmetric_generic_and_fixed() -> None:
    like = torch.zeros((), dtype=torch.float64)
    for size in (1, 2, 3, 40):
        start = start_matrix(size, like)
        assert torch.equal(start, start.mT)
        assert torch.equal(start, start_matrix(size, like))
        torch.testing.assert_close(start.norm(), torch.ones_like(like))
        assert torch.linalg.eigvalsh(start).diff().gt(1e-6).all()
        assert start.abs().min() > 1e-7
    assert start_matrix(3, like.float()).dtype == torch.float32


def pairs(generator: torch.Generator, size: int, *batch: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, *batch, size, size, generator=generator, dtype=torch.float64)
    return x @ x.mT + 0.5 * torch.eye(size, dtype=torch.float64), y + y.mT


def dense_inverse(k1: Tensor, k2: Tensor, denominator: Tensor) -> Tensor:
    k = torch.kron(k2, k1)
    return k @ (k / denominator.flatten()).mT


def test_two_term_is_the_dense_inverse(generator: torch.Generator) -> None:
    (p, r2), (q, s2) = pairs(generator, D_A, 2), pairs(generator, D_G, 2)
    s2 = 0.02 * s2
    k1, k2, denominator = two_term(p, q, r2, s2, 1e-6)
    assert denominator.shape == (2, D_G, D_A)
    assert denominator.min() > 1e-6
    v = torch.randn(2, D_G, D_A, generator=generator, dtype=torch.float64)
    for n in range(2):
        inverse = torch.linalg.inv(torch.kron(q[n], p[n]) + torch.kron(s2[n], r2[n]))
        torch.testing.assert_close(dense_inverse(k1[n], k2[n], denominator[n]), inverse, rtol=1e-9, atol=1e-9)
        applied = k2[n] @ ((k2[n].mT @ v[n] @ k1[n]) / denominator[n]) @ k1[n].mT
        torch.testing.assert_close(applied.flatten(), inverse @ v[n].flatten(), rtol=1e-9, atol=1e-9)
    mapped = torch.vmap(lambda p, q, r2, s2: two_term(p, q, r2, s2, 1e-6))(p, q, r2, s2)
    close([dense_inverse(*(x[1] for x in mapped))], [dense_inverse(k1[1], k2[1], denominator[1])])


def test_two_term_is_definite_where_the_sum_is_not(generator: torch.Generator) -> None:
    (p, r2), (q, s2) = pairs(generator, D_A), pairs(generator, D_G)
    assert torch.linalg.eigvalsh(torch.kron(q, p) + torch.kron(s2, r2)).min() < 0
    k1, k2, denominator = two_term(p, q, r2, s2, 0.1)
    assert denominator.min() == 0.1
    assert torch.linalg.eigvalsh(dense_inverse(k1, k2, denominator)).min() > 0


def test_two_term_is_nan_where_the_first_term_is_not_definite(generator: torch.Generator) -> None:
    (p, r2), (q, s2) = pairs(generator, D_A, 3), pairs(generator, D_G, 3)
    p[1], r2[2, 0, 0] = -p[1], torch.inf
    k1, k2, denominator = two_term(p, q, r2, s2, 0.1)
    assert k1[1:].isnan().all()
    assert denominator[1:].isnan().all()
    assert all(x[0].isfinite().all() for x in (k1, k2, denominator))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_one_graph_equal_to_eager(generator: torch.Generator) -> None:
    a, g = rows(generator)

    def everything(a: Tensor, g: Tensor) -> list[Tensor]:
        first = power(*operator(a, g), g.mT @ g, 4, 1e-3)
        p, q = torch.eye(D_A, dtype=a.dtype) + first.left, torch.eye(D_G, dtype=a.dtype) + first.right
        _, (sigma, left, right) = golub_kahan(*operator(a, g), start_matrix(D_G, g), 2, 3)
        return [*first, sigma, left, right, *two_term(p, q, left, right, 0.1)]

    close(torch.compile(everything, fullgraph=True, backend="aot_eager")(a, g), everything(a, g))
