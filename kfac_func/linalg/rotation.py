"""Eigenbases that follow a slowly moving symmetric matrix A, and diagonals carried from one basis to the next.

With B = UᵀAU for the basis U at hand, every pair (j, k) asks for the Jacobi rotation that makes B_jk zero; all pairs at
once, to first order, are the skew matrix of their tangents,

    X_jk = 2 B_jk / (γ ± √(γ² + 64 B_jk²)),    γ = B_kk − B_jj  (± its sign),    |X_jk| ≤ ¼,        U ← orth(U (I + X)).

For B_jk ≪ γ this is Newton's step B_jk / γ, hence the quadratic convergence; the 64 (a lone pair would have 4) holds
back rotations among eigenvalues that are closer than the change of A, where many pairs ask for large ones at once.
I + X is never singular, and a QR decomposition keeps U orthogonal to working precision however often it is repeated.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def refreshed_basis(a: Float[Tensor, "*q d d"], basis: Float[Tensor, "*q d d"], sweeps: int = 1) -> Tensor:
    """An orthogonal basis [..., d, d] nearer to the eigenbasis of the symmetric `a` than the orthogonal `basis`.

    The columns keep their order and their signs as long as `a` moves little; a zero `a` leaves the basis alone. One
    sweep costs three matrix products and a QR decomposition: on a CPU as much as `torch.linalg.eigh`.
    """
    for _ in range(sweeps):
        q, r = torch.linalg.qr(basis + basis @ _tangents(basis.mT @ (a @ basis)))
        basis = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)
    return basis


def _tangents(b: Tensor) -> Tensor:
    """The skew matrix X of a symmetric b; 0 for the pairs that are rotated by rounding errors only."""
    values = b.diagonal(dim1=-2, dim2=-1)
    gap = values.unsqueeze(-2) - values.unsqueeze(-1)
    noise = torch.finfo(b.dtype).eps * b.detach().abs().amax((-2, -1), keepdim=True)
    order = torch.ones_like(b).triu()
    still = (b.abs() <= noise) | (order * order.mT > 0)
    b, gap = torch.where(still, 0.0, b), torch.where(still, 1.0, gap)
    side = torch.where(gap == 0, 2 * order - 1, gap.sign())
    return 2 * b / (gap + side * torch.hypot(gap, 8 * b))


def reexpressed(
    scalings: Float[Tensor, "*q o i"], g_rotation: Float[Tensor, "*q o o"], a_rotation: Float[Tensor, "*q i i"]
) -> Tensor:
    """The diagonal S [..., o, i] of the old basis as it looks in a new one: (R_G∘R_G)ᵀ S (R_A∘R_A).

    R = U_oldᵀ U_new has the new basis vectors as columns, in old coordinates; the result is the diagonal, in the new
    basis, of the matrix that is diag(S) in the old one. It keeps the sum of S, and S ≥ 0.
    """
    return (g_rotation * g_rotation).mT @ scalings @ (a_rotation * a_rotation)
