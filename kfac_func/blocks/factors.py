"""Arithmetic on factors: symmetric matrices [..., d, d] that are dense, diagonal, or dense in blocks (`Factor`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func.blocks.base import Blocks, Diagonal, Factor, Offsets


def mapped(fn: Callable[..., Tensor], factor: Tensor | Blocks | Offsets, *others: Any) -> Tensor | Blocks | Offsets:
    """A function of dense matrices [..., d, d], on every block of its own; `others` are factors of the same form."""
    if isinstance(factor, Tensor):
        return fn(factor, *others)
    return type(factor)(*(fn(*blocks) for blocks in zip(factor, *others, strict=True)))


def widened(c: Tensor, block: Tensor) -> Tensor:
    """One number per group [q], ready to be multiplied with the matrices [q, ..., d, d] of a factor."""
    return c[(..., *[None] * (block.ndim - c.ndim))]


def scaled(factor: Factor, c: Tensor | float) -> Factor:
    """c · factor, for a number or one number per group [q]."""
    if isinstance(factor, Diagonal):
        return Diagonal(factor.values * (c.unsqueeze(-1) if isinstance(c, Tensor) else c))
    return mapped(lambda block: block * (widened(c, block) if isinstance(c, Tensor) else c), factor)


def shifted(factor: Factor, c: Tensor) -> Factor:
    """factor + c · I, for a number or one number per group [q]."""
    if isinstance(factor, Diagonal):
        return Diagonal(factor.values + c.to(factor.values.dtype)[..., None])

    def one(block: Tensor) -> Tensor:
        diagonal = block.diagonal(dim1=-2, dim2=-1)
        return block.diagonal_scatter(diagonal + widened(c.to(block.dtype), diagonal), dim1=-2, dim2=-1)

    return mapped(one, factor)


def diagonal_of(factor: Factor) -> Tensor:
    """The diagonal [..., d]."""
    if isinstance(factor, Diagonal):
        return factor.values
    if isinstance(factor, Tensor):
        return factor.diagonal(dim1=-2, dim2=-1)
    main, rest = (block.diagonal(dim1=-2, dim2=-1) for block in factor)
    main = main.mT if isinstance(factor, Offsets) else main
    return torch.cat([main.flatten(-2), rest], dim=-1)


def mean_eigenvalue(factor: Factor) -> Tensor:
    """trace / dimension, one number per group."""
    return diagonal_of(factor).mean(dim=-1)


def balanced(a: Factor, g: Factor) -> tuple[Factor, Factor]:
    """(A·c, G/c) with equal mean eigenvalues: the same Kronecker product in one unit. A dead factor gives c = 1."""
    top, bottom = mean_eigenvalue(g), mean_eigenvalue(a)
    dead = (top <= 0) | (bottom <= 0)
    c = torch.where(dead, 1.0, top / torch.where(dead, 1.0, bottom)).sqrt()
    return scaled(a, c), scaled(g, 1 / c)


def densify(factor: Factor) -> Tensor:
    """The factor as a dense matrix [..., d, d]."""
    if isinstance(factor, Diagonal):
        return torch.diag_embed(factor.values)
    if isinstance(factor, Tensor):
        return factor
    count, size = factor.values.shape[-3], factor.values.shape[-1]
    whole = torch.diag_embed(factor.values.movedim(-3, -1))  # [..., b, b, k, k]
    order = (-2, -4, -1, -3) if isinstance(factor, Blocks) else (-4, -2, -3, -1)
    lead, d, c = range(whole.ndim - 4), count * size, factor.rest.shape[-1]
    whole = whole.permute(*lead, *(whole.ndim + k for k in order)).reshape(*whole.shape[:-4], d, d)
    return F.pad(whole, (0, c, 0, c)) + F.pad(factor.rest, (d, 0, d, 0))


def add(items: list) -> Any:
    """The sum of factors (or of plain tensors) of one form; dense where forms differ."""
    first, *more = items
    if any(type(item) is not type(first) for item in more):
        first, *more = (densify(item) for item in items)
    for item in more:
        first = (
            first + item
            if isinstance(first, Tensor)
            else type(first)(*(x + y for x, y in zip(first, item, strict=True)))
        )
    return first


def transpose(factor: Factor) -> Factor:
    """The transpose of a factor (a basis, say)."""
    return factor if isinstance(factor, Diagonal) else mapped(lambda block: block.mT, factor)


def multiplied(v: Tensor, factor: Factor) -> Tensor:
    """v · factor for matrices v [..., (q), n, d]."""
    if isinstance(factor, Diagonal):
        return v * factor.values.unsqueeze(-2)
    if isinstance(factor, Tensor):
        return v @ factor
    count, size = factor.values.shape[-3], factor.values.shape[-1]
    main, rest = v[..., : count * size], v[..., count * size :]
    if isinstance(factor, Blocks):
        main = torch.einsum("...nki,...kij->...nkj", main.unflatten(-1, (count, size)), factor.values)
    else:
        main = torch.einsum("...nik,...kij->...njk", main.unflatten(-1, (size, count)), factor.values)
    return torch.cat([main.flatten(-2), rest @ factor.rest], dim=-1)


def rotated(rows: Tensor, factor: Factor | None, grouped: bool) -> Tensor:
    """row · factor for rows [..., n, d], or [..., n, q, d] when grouped; None is the identity."""
    if factor is None:
        return rows
    return multiplied(rows.movedim(-2, -3), factor).movedim(-3, -2) if grouped else multiplied(rows, factor)
