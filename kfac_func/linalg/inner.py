"""Inner products, norms and orthonormal bases of long rows [.., P].

A float32 sum of a million products keeps three to five digits, and a basis with it its orthogonality; here it is made
in float64, piece by piece where it can be.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PIECE = 1 << 16


def inner(x: Float[Tensor, "*n k p"], y: Float[Tensor, "*n m p"]) -> Float[Tensor, "*n k m"]:
    """x yᵀ, summed in float64.

    >>> inner(torch.tensor([[1.0, 1e-5]]), torch.ones(1, 2)) - 1
    tensor([[1.0014e-05]])
    """
    parts = zip(x.split(PIECE, -1), y.split(PIECE, -1), strict=True)
    return sum((a.double() @ b.double().mT for a, b in parts), start=x.new_zeros((), dtype=torch.float64)).to(x.dtype)


def norm(x: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    """‖x‖, scaled first, since the squares of small entries underflow.

    >>> norm(torch.tensor([3e-30, 4e-30]))
    tensor(5.0000e-30)
    """
    scale = x.detach().abs().amax(-1)
    scaled = x / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return scale * scaled.square().sum(-1).sqrt()


def orthonormal(rows: Float[Tensor, "k p"]) -> tuple[Float[Tensor, "m p"], Float[Tensor, "m k"]]:
    """Q [m, P] and upper triangular R [m, k] with rows = RᵀQ, QQᵀ = I and m = min(k, P), by way of float64.

    Directions are made up where the rows are dependent.

    >>> q, r = orthonormal(torch.tensor([[3.0, 4.0]]))
    >>> q.abs(), r.abs()
    (tensor([[0.6000, 0.8000]]), tensor([[5.]]))
    """
    q, r = torch.linalg.qr(rows.mT.double())
    return q.mT.to(rows.dtype), r.to(rows.dtype)
