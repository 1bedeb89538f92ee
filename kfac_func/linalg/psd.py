"""Symmetric positive semi-definite factors: damped inverses and eigenbases, dense or diagonal, with group dimensions
in front.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kfac_func.blocks import Diagonal, Factor

Solver = Literal["cholesky", "eigh"]


def damped_inverse(factor: Factor, shift: Tensor, solver: Solver = "cholesky") -> Factor:
    """(factor + shift · I)⁻¹, `shift` a number or one per group [q].

    "cholesky" gives NaN where the damped factor is not positive definite in this precision; "eigh" cuts negative
    eigenvalues at 0.
    """
    if isinstance(factor, Diagonal):
        return Diagonal(1 / (factor.values + shift.to(factor.values.dtype)[..., None]))
    shift = shift.to(factor.dtype)
    if solver == "eigh":
        values, basis = torch.linalg.eigh(factor)
        return (basis / (values.clamp(min=0) + shift[..., None]).unsqueeze(-2)) @ basis.mT
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    lower, info = torch.linalg.cholesky_ex(factor + shift[..., None, None] * eye)
    inverse = torch.cholesky_solve(eye.expand_as(factor), lower)
    return torch.where((info == 0)[..., None, None], inverse, torch.nan)


def eigenbasis(factor: Factor) -> tuple[Tensor, Factor]:
    """Eigenvalues [..., d], cut at 0, and the orthogonal basis U with factor = U diag(values) Uᵀ (the identity for a
    diagonal).
    """
    if isinstance(factor, Diagonal):
        return factor.values, Diagonal(torch.ones_like(factor.values))
    values, basis = torch.linalg.eigh(factor)
    return values.clamp(min=0), basis


def times(left: Factor, v: Tensor, right: Factor) -> Tensor:
    """left · v · right for symmetric or square factors."""
    v = v * left.values.unsqueeze(-1) if isinstance(left, Diagonal) else left @ v
    return v * right.values.unsqueeze(-2) if isinstance(right, Diagonal) else v @ right


def transpose(factor: Factor) -> Factor:
    """The transpose of a factor."""
    return factor if isinstance(factor, Diagonal) else factor.mT


def densify(factor: Factor) -> Tensor:
    """The factor as a dense matrix."""
    return torch.diag_embed(factor.values) if isinstance(factor, Diagonal) else factor
