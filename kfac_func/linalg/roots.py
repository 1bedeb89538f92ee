r"""Roots K of an inverse, K Kᵀ → M⁻¹, moved by matrix products alone: no inverse, no decomposition.

    K ← K (I − β L̄),     L = Π(½ (Kᵀ M K − I)),     L̄ = L / max(1, 2‖L‖)

A root has the form of its M: dense, `Diagonal` or `Blocks`; a lower-triangular one is stored dense. Π projects a
symmetric matrix onto the directions in which such a K may move: its symmetric part, or (lower triangular) its diagonal
plus twice what is strictly below. With β = 1 this is Newton's step, quadratic near KᵀMK = I. Every factor I − β L̄ of a
dense root has its eigenvalues between ½ and 3/2, so that K stays invertible and no statistics, however sudden, throw it
off. Source: Lin et al. 2023 (2312.05705).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_func.blocks import Blocks, Diagonal, Factor, add, mapped, scaled, transpose


def multiple(like: Factor, c: Tensor | float) -> Factor:
    """c · I in the form of a factor, `c` a number or one per group [q]."""
    if isinstance(like, Diagonal):
        return scaled(Diagonal(torch.ones_like(like.values)), c)
    return scaled(mapped(lambda m: torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m), like), c)


def product(x: Factor, y: Factor) -> Factor:
    """The matrix product of two factors of one form."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x @ y
    if isinstance(x, Diagonal) and isinstance(y, Diagonal):
        return Diagonal(x.values * y.values)
    assert isinstance(x, Blocks)
    assert isinstance(y, Blocks)
    return Blocks(x.values @ y.values, x.rest @ y.rest)


def mean_within(root: Factor, m: Factor | None = None) -> Tensor:
    """The mean eigenvalue of Kᵀ M K (of Kᵀ K without M), one number per group."""
    other = root if m is None else product(m, root)
    if isinstance(root, Diagonal) and isinstance(other, Diagonal):
        return (root.values * other.values).mean(dim=-1)
    if isinstance(root, Tensor) and isinstance(other, Tensor):
        return (root * other).sum(dim=(-2, -1)) / root.shape[-1]
    assert isinstance(root, Blocks)
    assert isinstance(other, Blocks)
    size = root.values.shape[-3] * root.values.shape[-1] + root.rest.shape[-1]
    return ((root.values * other.values).sum(dim=(-3, -2, -1)) + (root.rest * other.rest).sum(dim=(-2, -1))) / size


def excess(root: Factor, m: Factor, lower: bool = False) -> Factor:
    """Π(½ (Kᵀ M K − I)): zero where K Kᵀ = M⁻¹."""
    seen = product(transpose(root), product(m, root))
    return projected(scaled(add([seen, multiple(seen, -1.0)]), 0.5), lower)


def moved(root: Factor, direction: Factor, step: float) -> Factor:
    """K (I − β L̄)."""
    return add([root, scaled(product(root, limited(direction)), -step)])


def projected(m: Factor, lower: bool = False) -> Factor:
    """Π(m): the symmetric part; or `lower`, its diagonal plus twice what is strictly below."""
    if isinstance(m, Diagonal):
        return m

    def one(x: Tensor) -> Tensor:
        half = (x + x.mT) / 2
        return half.tril() + half.tril(-1) if lower else half

    return mapped(one, m)


def limited(direction: Factor) -> Factor:
    """L / max(1, 2‖L‖), every block of its own, and every number of a diagonal."""
    if isinstance(direction, Diagonal):
        return Diagonal(direction.values / (2 * direction.values.abs()).clamp(min=1))
    return mapped(lambda x: x / (2 * largest(x)).clamp(min=1)[..., None, None] if x.shape[-1] else x, direction)


def largest(x: Tensor, rounds: int = 2) -> Tensor:
    """The largest singular value [...] of matrices [..., d, d] by a few power iterations from a fixed vector.

    An estimate from below; `limited` bears one that is four times too small.
    """
    unit = x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x, tiny = x / unit, torch.finfo(x.dtype).tiny
    u = torch.arange(1, x.shape[-1] + 1, dtype=torch.float32, device=x.device).square().cos().to(x.dtype).unsqueeze(-1)
    for _ in range(rounds):
        u = x.mT @ (x @ u)
        u = u / u.square().sum(-2, keepdim=True).clamp(min=tiny).sqrt()
    ratio = (x @ u).square().sum((-2, -1)) / u.square().sum((-2, -1)).clamp(min=tiny)
    return unit[..., 0, 0] * ratio.clamp(min=tiny).sqrt()
