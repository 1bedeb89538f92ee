"""Symmetric matrices with known spectra, as operators on a tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIKE = {"layer": (torch.zeros(3, 2, dtype=torch.float64), None), "head": [torch.zeros(4, 5, dtype=torch.float64)]}
P = 26


def symmetric(values: Tensor, seed: int = 1) -> Tensor:
    """A dense matrix with these eigenvalues in a random basis."""
    noise = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    return basis * values @ basis.mT


def on_tree(matrix: Tensor) -> Callable[[Any], Any]:
    """The matrix as a matvec on trees like LIKE, whose dictionaries come back in another order."""

    def matvec(v: Any) -> Any:
        out = matrix @ flat(v)
        return {"layer": (out[20:].reshape(3, 2), None), "head": [out[:20].reshape(4, 5)]}

    return matvec


def flat(v: Any) -> Tensor:
    """The tree as a vector, leaves in the order of sorted keys."""
    return torch.cat([v["head"][0].reshape(-1), v["layer"][0].reshape(-1)])


def rows(v: Any) -> Tensor:
    """A tree with a leading dimension as rows."""
    return torch.cat([v["head"][0].flatten(1), v["layer"][0].flatten(1)], 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
