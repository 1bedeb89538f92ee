r"""Eigenbases that follow a slowly moving symmetric matrix A.

Only the leading k of the d columns, U = [U_r, U_k] with the leading ones last as `torch.linalg.eigh` has them, are made
anew: by Rayleigh-Ritz inside their span and one power step out of it; the others are turned along by the orthogonal
map that takes the old leading columns to the new ones.

    Uₖᵀ A Uₖ = E Θ Eᵀ      P = Uₖ E      R = (I − P Pᵀ) A P (Θ − μ)⁻¹,     its columns no longer than 1
    Z = P + R              L Lᵀ = ZᵀZ    Q = Z L⁻ᵀ                         the new leading columns, QᵀQ = I
    U ← [U_r − (P + Q) (I + L)⁻¹ Zᵀ U_r,  Q]                               a block reflector takes P to Q

The shift μ is the mean eigenvalue of the rest, at most half the smallest Ritz value. Where λ_j are the eigenvalues of
the rest, column i turns to its limit at the rate (λ_j − μ) / (λ_i − μ). R is orthogonal to P, so the eigenvalues of
ZᵀZ lie in [1, 1 + k] whatever A is: nothing can break down.
"""

from __future__ import annotations

from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 64  # a matrix with fewer rows is decomposed anew: that costs less


def refreshed_basis(
    a: Float[Tensor, "*q d d"], basis: Float[Tensor, "*q d d"], sweeps: int = 1, share: float = 0.2
) -> Tensor:
    """An orthogonal basis [..., d, d] nearer to the eigenbasis of the symmetric positive semi-definite `a` than the
    orthogonal `basis`, whose columns belong to ascending eigenvalues.

    sweeps   steps to take
    share    the part of the columns, those of the largest eigenvalues, that is refreshed; the others only stay
             orthogonal to them. With all columns, and for a small matrix, the result is that of `torch.linalg.eigh`

    A sweep costs 3 share + 5 share² products of two [d, d] matrices and the decomposition of one of [k, k],
    k = share · d. Errors of orthogonality stay at rounding level however often it is called.
    """
    d = a.shape[-1]
    k = ceil(share * d)
    if d < SMALL or k >= d:
        return torch.linalg.eigh(a)[1]
    for _ in range(sweeps):
        rest, leading = basis[..., : d - k], basis[..., d - k :]
        old, step = _ritz(a, leading)
        z = old + step
        lower = torch.linalg.cholesky_ex(z.mT @ z)[0]
        new = torch.linalg.solve_triangular(lower.mT, z, upper=True, left=False)
        shifted = lower + torch.eye(k, dtype=a.dtype, device=a.device)
        half = torch.linalg.solve_triangular(shifted, old + new, upper=False, left=False)
        basis = torch.cat([rest - half @ (z.mT @ rest), new], dim=-1)
    return basis


def _ritz(a: Tensor, leading: Tensor) -> tuple[Tensor, Tensor]:
    """P and R: the Ritz vectors of `a` in a subspace, and the power step that leads out of it."""
    product = a @ leading
    b = leading.mT @ product
    values, turn = torch.linalg.eigh((b + b.mT) / 2)
    others = (a.diagonal(dim1=-2, dim2=-1).sum(-1) - values.sum(-1)) / (a.shape[-1] - values.shape[-1])
    shift = torch.minimum(others, values[..., 0] / 2).clamp(min=0).unsqueeze(-1)
    noise = 64 * torch.finfo(a.dtype).eps * values.abs().amax(-1, keepdim=True) + torch.finfo(a.dtype).tiny
    old = leading @ turn
    step = product @ (turn / torch.maximum(values - shift, noise).unsqueeze(-2))
    step = step - old @ (old.mT @ step)
    return old, step * step.square().sum(-2, keepdim=True).clamp(min=1).rsqrt()
