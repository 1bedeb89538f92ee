"""Kronecker products in the row-major convention of the house: (G ⊗ A) vec(V) = vec(G V A) for symmetric G, A and V
[o, i].
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kron(g: Float[Tensor, "*q o o"], a: Float[Tensor, "*q i i"]) -> Float[Tensor, "p p"]:
    """The dense G ⊗ A, p = o·i; with a group dimension, the block-diagonal matrix of the groups."""
    if g.ndim == 2:
        return torch.kron(g.contiguous(), a.contiguous())  # torch.kron views its operands
    return torch.block_diag(*(kron(one, other) for one, other in zip(g, a, strict=True)))
