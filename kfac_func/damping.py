"""How damping meets a Kronecker-factored block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kfac_func.blocks import Factor, mean_eigenvalue

Split = Literal["pi", "none", "exact"]
"""How λ meets a block: factored with π, factored with π = 1, or exactly, in the eigenbasis."""


def pi_split(a: Factor, g: Factor, damping: Tensor, split: Split = "pi") -> tuple[Tensor, Tensor]:
    r"""Split Tikhonov damping between two Kronecker factors: the shifts of A and of G.

        (G + √λ/π I) ⊗ (A + π√λ I),        π² = (tr A / dim A) / (tr G / dim G)

    Shapes: A [(q), i, i], G [(q), o, o], λ ≥ 0 in units of the curvature G ⊗ A; the shifts are numbers, one per group.
    A zero trace (a dead layer) gives π = 1, as does split="none". Source: Martens & Grosse 2015 (1503.05671), §6.3.

        >>> a, g = torch.eye(2) * 4, torch.eye(3)
        >>> [round(float(s), 3) for s in pi_split(a, g, torch.tensor(0.01))]
        [0.2, 0.05]
    """
    root = damping.sqrt()
    top, bottom = mean_eigenvalue(a), mean_eigenvalue(g)
    if split == "none":
        return root * torch.ones_like(top), root * torch.ones_like(bottom)
    dead = (top <= 0) | (bottom <= 0)
    pi = torch.where(dead, 1.0, torch.where(dead, 1.0, top) / torch.where(dead, 1.0, bottom)).sqrt()
    return root * pi, root / pi
