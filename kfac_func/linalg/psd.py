"""Symmetric positive semi-definite factors: damped inverses and eigenbases, in every form that a factor has."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kfac_func._tracing import at_hand
from kfac_func.blocks import (
    Blocks,
    Diagonal,
    Factor,
    Thin,
    diagonal_of,
    mapped,
    multiplied,
    shifted,
    transpose,
    widened,
)

Solver = Literal["cholesky", "eigh"]


def damped_inverse(factor: Factor, shift: Tensor, solver: Solver = "cholesky") -> Factor:
    """(factor + shift · I)⁻¹, `shift` a number or one per group [q].

    "cholesky" gives NaN where the damped factor is not positive definite in this precision; "eigh" cuts negative
    eigenvalues at 0.
    """
    damped = shifted(factor, shift)
    if isinstance(damped, Diagonal) or isinstance(factor, Diagonal):
        return Diagonal(1 / diagonal_of(damped))
    if solver == "eigh":
        return mapped(lambda block: _by_eigh(block, widened(shift.to(block.dtype), block)), factor)
    return mapped(_by_cholesky, damped)


def _by_eigh(block: Tensor, shift: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(block)
    return (basis / (values.clamp(min=0).unsqueeze(-2) + shift)) @ basis.mT


def _by_cholesky(block: Tensor) -> Tensor:
    lower, info = torch.linalg.cholesky_ex(block)
    if at_hand(block) and torch.get_num_threads() == 1 and not info.any():
        return torch.cholesky_inverse(lower)  # a third of the work; more threads slow it down, and a zero raises
    eye = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device)
    inverse = torch.cholesky_solve(eye.expand_as(block), lower)
    return torch.where((info == 0)[..., None, None], inverse, torch.nan)


def eigenbasis(factor: Factor) -> tuple[Tensor, Factor]:
    """Eigenvalues [..., d], cut at 0, and the orthogonal basis U of the same form with factor = U diag(values) Uᵀ (the
    identity for a diagonal).
    """
    if isinstance(factor, Diagonal):
        return factor.values, Diagonal(torch.ones_like(factor.values))
    if isinstance(factor, Tensor):
        values, basis = torch.linalg.eigh(factor)
        return values.clamp(min=0), basis
    (main, main_basis), (rest, rest_basis) = (torch.linalg.eigh(block) for block in factor)
    main = main if isinstance(factor, Blocks) else main.mT
    values = torch.cat([main.flatten(-2), rest], dim=-1)
    return values.clamp(min=0), type(factor)(main_basis, rest_basis)


def times(left: Factor, v: Tensor | Thin, right: Factor) -> Tensor:
    """left · v · right for matrices v [..., (q), o, i], or for one given by its rows."""
    if isinstance(v, Thin):
        return v.times(left, right)
    v = left @ v if isinstance(left, Tensor) else multiplied(v.mT, transpose(left)).mT
    return multiplied(v, right)
