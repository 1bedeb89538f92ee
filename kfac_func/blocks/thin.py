"""The gradient of a block before its sum: V = Σ_r left_r right_rᵀ, two thin factors of R rows.

There is one row per example and position. What multiplies V from both sides costs o i (o + i), on its rows R (o² + i²):
where a layer is wider than the batch is long, rows are cheaper, and V itself is never needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_func.blocks.base import Factor, Layout, Use, UseRule
from kfac_func.blocks.factors import rotated, transpose
from kfac_func.blocks.rows import input_rows, output_rows, with_constant


class Thin(NamedTuple):
    """V [(q), o, i] = Σ_r left[r] right[r]ᵀ with left [R, (q), o] and right [R, (q), i]."""

    left: Tensor
    right: Tensor

    def times(self, left: Factor, right: Factor) -> Tensor:
        """left · V · right, for factors on both sides.

        >>> Thin(torch.ones(1, 2), torch.ones(1, 3)).times(2 * torch.eye(2), torch.eye(3))
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
        """
        grouped = self.left.ndim > 2
        rows = rotated(self.left, transpose(left), grouped), rotated(self.right, right, grouped)
        return torch.einsum("kqo,kqi->qoi", *rows) if grouped else rows[0].mT @ rows[1]

    def to(self, dtype: torch.dtype) -> Thin:
        """The same rows in another precision."""
        return Thin(self.left.to(dtype), self.right.to(dtype))


def pays(layout: Layout, rules: Sequence[UseRule], examples: int) -> bool:
    """Whether the gradient of a block is cheaper to solve for as rows: R (o² + i²) < o i (o + i), where the product
    of the solved rows stands for the sum that nobody needs. Vector blocks and embeddings have no rows.
    """
    if not layout.matrix or any(rule.kind.diagonal or rule.where is None for rule in rules):
        return False
    rows, i, o = examples * sum(rule.positions for rule in rules), layout.columns, layout.outputs
    return rows * (o * o + i * i) < o * i * (o + i)


def thin(layout: Layout, uses: Sequence[Use]) -> Thin:
    """The gradient of a block as rows, from the inputs and the gradients [1, *output] of its uses."""
    found = [_rows(layout, use) for use in uses]
    return Thin(*(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True)))


def _rows(layout: Layout, use: Use) -> tuple[Tensor, Tensor]:
    right = with_constant(input_rows(use, "expand"), layout.bias is not None).flatten(0, 1)
    left = output_rows(use, "expand").flatten(0, 2)
    return (right, left) if use.rule.transposed else (left, right)
