"""A block-diagonal curvature: every block by a structure of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from kfac_func import _tree
from kfac_func._tree import storable
from kfac_func.blocks import Block
from kfac_func.curvature.base import Curvature, Structure, zeros


class Blockwise(NamedTuple):
    """Something per block: matrix blocks (weights) and vector blocks (scale and shift, unclaimed leaves)."""

    matrix: dict[str, Any]
    vector: dict[str, Any]


storable(Blockwise)


def _like(factored: Any, v: Tensor) -> Tensor:
    """V in the precision of the factors: gradients may have another."""
    leaves = _tree.leaves(factored)
    return v.to(leaves[0].dtype) if leaves else v


def blockwise(structure: Structure, vector: Structure) -> Curvature:
    """Lift structures from a block to the tree: `structure` for matrix blocks, `vector` for scale-and-shift and
    unclaimed leaves.

    >>> kf.curvature.blockwise(kf.curvature.kronecker(), kf.curvature.diagonal()).name
    'blockwise(kronecker[cholesky], diagonal)'
    """
    both = (structure, vector)

    def each(fn: Any, things: Blockwise, *more: Any) -> Blockwise:
        def one(k: int) -> dict[str, Any]:
            return {name: fn(both[k], item, *(m[k][name] for m in more)) for name, item in things[k].items()}

        return Blockwise(one(0), one(1))

    def measure(blocks: dict[str, Block]) -> Blockwise:
        split = Blockwise(
            {name: block for name, block in blocks.items() if block.layout.matrix},
            {name: block for name, block in blocks.items() if not block.layout.matrix},
        )
        return each(lambda own, block: own.measure(block), split)

    def absorb(state: Blockwise, moments: Blockwise, fraction: Tensor) -> Blockwise:
        return each(lambda own, one, other: own.absorb(one, other, fraction), state, moments)

    def factorize(state: Blockwise, damping: Tensor, split: str) -> Blockwise:
        return each(lambda own, one: own.factorize(one, damping, split), state)

    def solve(factored: Blockwise, vs: dict[str, Tensor]) -> dict[str, Tensor]:
        solved = {}
        for own, items in zip(both, factored, strict=True):
            for name, item in items.items():
                if name in vs:
                    solved[name] = own.solve(item, _like(item, vs[name]))
        return solved

    def dense(state: Blockwise) -> dict[str, Tensor]:
        found = each(lambda own, one: own.dense(one), state)
        return found.matrix | found.vector

    return Curvature(f"blockwise({structure.name}, {vector.name})", zeros, measure, absorb, factorize, solve, dense)
