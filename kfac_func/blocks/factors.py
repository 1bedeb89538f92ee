"""Arithmetic on factors: symmetric matrices that are dense or diagonal, with an optional group dimension [q] in
front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_func.blocks.base import Diagonal, Factor


def scaled(factor: Factor, c: Tensor | float) -> Factor:
    """c · factor, for a number or one number per group [q]."""
    if isinstance(factor, Diagonal):
        return Diagonal(factor.values * (c.unsqueeze(-1) if isinstance(c, Tensor) else c))
    return factor * (c[..., None, None] if isinstance(c, Tensor) else c)


def mean_eigenvalue(factor: Factor) -> Tensor:
    """trace / dimension, one number per group."""
    if isinstance(factor, Diagonal):
        return factor.values.mean(dim=-1)
    return factor.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def balanced(a: Factor, g: Factor) -> tuple[Factor, Factor]:
    """(A·c, G/c) with equal mean eigenvalues: the same Kronecker product in one unit. A dead factor gives c = 1."""
    top, bottom = mean_eigenvalue(g), mean_eigenvalue(a)
    dead = (top <= 0) | (bottom <= 0)
    c = torch.where(dead, 1.0, top / torch.where(dead, 1.0, bottom)).sqrt()
    return scaled(a, c), scaled(g, 1 / c)


def add(items: list) -> Any:
    """The sum of factors; dense as soon as one of them is."""
    dense = [item for item in items if not isinstance(item, Diagonal)]
    diagonal = [item.values for item in items if isinstance(item, Diagonal)]
    if not dense:
        return Diagonal(sum(diagonal[1:], diagonal[0]))
    total = sum(dense[1:], dense[0])
    return total + torch.diag_embed(sum(diagonal[1:], diagonal[0])) if diagonal else total
