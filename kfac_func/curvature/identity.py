r"""No curvature: the gradient as it is, in the same place of a chain.

F = I (undamped on purpose), v = V
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfac_func._tree import storable
from kfac_func.blocks import Block
from kfac_func.curvature.base import Structure
from kfac_func.linalg import Spectral, elementwise


class IdentityState(NamedTuple):
    """The number of parameters of the block, as a 0-dim tensor."""

    size: Tensor


storable(IdentityState)


def identity() -> Structure:
    """Leave every block as it is, whatever the damping: the baseline, and the choice for blocks that should not be
    preconditioned.

    >>> v = torch.ones(2, 3)
    >>> kf.curvature.identity().solve((), v) is v
    True
    """

    def measure(block: Block) -> IdentityState:
        return IdentityState(torch.full((), float(_size(block)), device=block.uses[0].inputs.device))

    def factorize(state: IdentityState, damping: Tensor, split: str) -> tuple[()]:
        del state, damping, split
        return ()

    def solve(factored: tuple[()], v: Tensor) -> Tensor:
        del factored
        return v

    def dense(state: IdentityState) -> Tensor:
        return torch.eye(_count(state))

    def spectrum(state: IdentityState, damping: Tensor, split: str) -> Spectral:
        del damping, split
        return elementwise(torch.ones(_count(state), device=state.size.device))

    return Structure("identity", measure, factorize, solve, dense, spectrum=spectrum, summable=True)


def _count(state: IdentityState) -> int:
    """The number, which a mean of equal numbers only comes close to."""
    return round(state.size.item())


def _size(block: Block) -> int:
    layout = block.layout
    if not layout.matrix:
        return layout.outputs
    weight = torch.Size(layout.shape).numel() if layout.weight is not None else 0
    return weight + (layout.groups * layout.outputs if layout.bias is not None else 0)
