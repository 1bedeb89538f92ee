r"""Lanczos tridiagonalisation of a symmetric operator that is only known by its products, for several starts at once.

    A V = V T + β_m v_{m+1} e_mᵀ        T = tridiag(β, α, β) = U diag(θ) Uᵀ        vᵀ f(A) v ≈ Σ_j U[0,j]² f(θ_j)

Vectors are rows: an operator maps [K, P] to [K, P], row by row. The quadrature on the right is Gauss's: exact for
polynomials of degree 2m − 1. Sources: Golub & Meurant 2010, Matrices, Moments and Quadrature, §§3, 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tracing import readable
from kfac_func._typing import Progress, shown
from kfac_func.linalg.inner import inner, norm

Rows: TypeAlias = Callable[[Tensor], Tensor]
"""A linear operator on rows: [K, P] -> [K, P]."""


class Tridiagonal(NamedTuple):
    """α [K, m]; β [K, m], the last one the norm of the remainder; V [K, m, P]; steps [K], the sizes of the spaces.

    Past `steps` the rows of V and the β are zero and α repeats its first value, so that what is added to the spectrum
    of T lies inside that of A and has no weight.
    """

    alpha: Tensor
    beta: Tensor
    basis: Tensor
    steps: Tensor


class Ritz(NamedTuple):
    """Eigenvalues θ [K, m] of T, ascending; weights U[0,j]² [K, m], Σ = 1; residuals β_m |U[m-1,j]| [K, m]; U."""

    values: Tensor
    weights: Tensor
    residuals: Tensor
    rotation: Tensor


def tridiagonal(
    products: Rows,
    start: Float[Tensor, "k p"],
    steps: int,
    symmetry: float,
    progress: Progress | None = None,
) -> Tridiagonal:
    """At most `steps` ≥ 1 steps from every row of `start`, fully re-orthogonalised.

    A row ends where β falls to ε^¾ of the largest |α| or β: its Krylov space is exhausted, and the θ are eigenvalues.
    The loop ends with the last row, where that can be read.
    Raises HyperparameterError where the products are not symmetric, by more than `symmetry` relative to the largest.
    """
    cut = torch.finfo(start.dtype).eps ** 0.75
    vector = start / norm(start).unsqueeze(-1)
    beta = scale = start.new_zeros(len(start))
    alive, taken = beta == 0, torch.zeros_like(beta, dtype=torch.long)
    basis, alphas, betas = [], [], []
    for _ in shown(range(steps), progress):
        basis.append(vector)
        components, rest = orthogonalised(products(vector), torch.stack(basis, 1))
        alpha = components[:, -1]
        expected = torch.zeros_like(components[:, :-1])
        if len(basis) > 1:
            expected = torch.cat([expected[:, 1:], beta.unsqueeze(-1)], -1)
        size = norm(rest)
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), size))
        gap = torch.where(alive.unsqueeze(-1), components[:, :-1] - expected, 0.0)
        require_symmetric(gap, scale.unsqueeze(-1), symmetry)
        alphas.append(torch.where(alive, alpha, alphas[0] if alphas else alpha))
        taken, alive = taken + alive, alive & (size > cut * scale)
        beta = torch.where(alive, size, 0.0)
        betas.append(beta)
        if readable(alive) and not bool(alive.any()):
            break
        vector = torch.where(alive.unsqueeze(-1), rest / torch.where(alive, size, 1.0).unsqueeze(-1), 0.0)
    return Tridiagonal(torch.stack(alphas, -1), torch.stack(betas, -1), torch.stack(basis, 1), taken)


def ritz(found: Tridiagonal) -> Ritz:
    """The spectral decomposition of T, with the quadrature of the start vector's measure."""
    matrix = torch.diag_embed(found.alpha)
    if found.alpha.shape[-1] > 1:
        off = torch.diag_embed(found.beta[..., :-1], offset=1)
        matrix = matrix + off + off.mT
    values, rotation = torch.linalg.eigh(matrix)
    residuals = found.beta[..., -1:] * rotation[..., -1, :].abs()
    return Ritz(values, rotation[..., 0, :].square(), residuals, rotation)


def orthogonalised(
    rows: Float[Tensor, "k p"], basis: Float[Tensor, "k m p"]
) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k p"]]:
    """Components of each row along its orthonormal basis, and what is left; a second pass removes rounding errors."""
    rows = rows.unsqueeze(1)
    first = rows @ basis.mT
    rows = rows - first @ basis
    second = inner(rows, basis)
    return (first + second).squeeze(1), (rows - second @ basis).squeeze(1)


def require_symmetric(gap: Tensor, scale: Tensor, symmetry: float) -> None:
    """Raise HyperparameterError where |gap| > symmetry · scale, and it can be read."""
    if readable(gap) and bool((gap.abs() > symmetry * scale).any()):
        raise HyperparameterError(
            explain(
                "the operator is not symmetric.",
                got=f"⟨u, A v⟩ − ⟨A u, v⟩ up to {float((gap.abs() / scale).max()):.1e} of the largest product",
                wanted=f"at most {symmetry:.1e}",
                why="Lanczos and Rayleigh-Ritz hold for symmetric operators",
                options="fix the noise of the model (dropout, sampled labels) in one matvec; or higher precision",
            )
        )
