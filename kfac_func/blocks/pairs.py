"""The exact block as pairs of rows: V_m = Σ_s left[m, s] right[m, s]ᵀ and F = (1/N) Σ_m vec(V_m) vec(V_m)ᵀ.

m runs over output vectors and examples. Everything that a structure wants to know beyond A and G (exact diagonals,
Gram matrices, the action of F on Kronecker products) comes from these rows; a matrix V_m is formed for a few m only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import StateError, explain
from kfac_func.blocks.base import Block, Use
from kfac_func.blocks.rows import examples_first, input_rows, output_rows, precise, with_constant

BUDGET = 2**24  # numbers that a chunk of matrices V_m may hold


class Pairs(NamedTuple):
    """left [V, B, S, (q), o] and right [V or 1, B, S, (q), i]; N is in `left` as 1/√N, so F = Σ_m vec V_m vec V_mᵀ.

    A vector block has o = p, i = 1 and S = 1. B = N; but B = 1, with the rows of all examples, when a use is shared
    by all of them or gradients cross from one to another: vectors have mean zero then, so that products of the sum
    estimate the sum of products, cross-example terms included.
    """

    left: Tensor
    right: Tensor


def pairs(block: Block, sharing: str = "expand") -> Pairs:
    """The rows of all uses of a block side by side. Raises StateError when there are no output vectors.

    The sharing of a block is about its factors A and G alone: V_m is the gradient of an example under either. With
    "reduce" the rows are those of such factors, one per use.
    """
    if block.uses[0].grads is None:
        raise StateError(
            explain(
                f"block {block.layout.name!r} has no output vectors.",
                why="the estimator forward_only makes none, and this structure needs per-example gradients",
                options="use monte_carlo(), exact() or empirical(); or kronecker() and diagonal() with forward_only()",
            )
        )
    sides = [_sides(block, use, sharing) if block.layout.matrix else _vector(use) for use in block.uses]
    if block.crossed or any(use.rule.where is None for use in block.uses):
        sides = [tuple(x.flatten(1, 2).unsqueeze(1) for x in side) for side in sides]
    if len(sides) > 1:
        width = max(x.shape[0] for side in sides for x in side)
        sides = [tuple(x.expand(width, *x.shape[1:]) for x in side) for side in sides]
    left, right = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in zip(*sides, strict=True))
    return Pairs(left * block.examples**-0.5, right)


def apart(block: Block, user: str) -> Block:
    """The block itself, for `user` who promises what is exact.

    Raises StateError when gradients go from the output of one example to the rows of another.
    """
    if block.crossed and block.examples > 1:
        raise StateError(
            explain(
                f"{user} promises block {block.layout.name!r} itself, and the examples of the batch see each other.",
                why="the gradient of one example's output reaches the rows of another (a batch norm, another order)",
                options="kronecker() or eigen(), which are right in expectation; GroupNorm or LayerNorm for batch norm",
            )
        )
    return block


def pairs_by_example(blocks: dict[str, Block], user: str, *, of_factors: bool = False) -> dict[str, Pairs]:
    """The rows of all blocks, alike in V, B and precision, so that a column of M is one example of the whole net;
    `of_factors`: those that A and G are made of.

    Raises StateError, in the name of `user`, for a block without rows of its own for every example.
    """
    filled = {name: block for name, block in blocks.items() if not block.layout.empty}
    found = {name: pairs(block, block.sharing if of_factors else "expand") for name, block in filled.items()}
    if not found:
        raise StateError(
            explain(
                f"there is no block for {user}.",
                why="no parameter of the statistics has numbers and curvature",
                options="kronecker() or another structure, which may have nothing to do",
            )
        )
    for name, rows in found.items():
        if rows.left.shape[1] != blocks[name].examples:
            raise StateError(
                explain(
                    f"block {name!r} has no rows of its own for every example, so {user} cannot combine it.",
                    why="all examples share a use of it or see each other in it, or no layer kind can see it",
                    got=f"rows of {rows.left.shape[1]} example(s)",
                    wanted=f"rows of {blocks[name].examples} examples",
                    options="block_diagonal() or another blockwise curvature; give the shared use the batch dimension "
                    f"(expand its input); or unclaimed={{{name!r}: 'identity'}}",
                )
            )
    wide = reduce(torch.promote_types, (side.dtype for rows in found.values() for side in rows))
    return {name: Pairs(*(side.to(wide) for side in rows)) for name, rows in found.items()}


def _sides(block: Block, use: Use, sharing: str) -> tuple[Tensor, ...]:
    a = with_constant(input_rows(use, sharing), block.layout.bias is not None).unsqueeze(0)
    g = output_rows(use, sharing)
    return (a, g) if use.rule.transposed else (g, a)


def _vector(use: Use) -> tuple[Tensor, ...]:
    kind, options, where = use.rule.kind, use.rule.options, use.rule.where
    assert kind.per_example is not None
    assert use.grads is not None
    x, g = examples_first(use.inputs, where), examples_first(use.grads, where, lead=1)
    found = kind.per_example(precise(x), precise(g), options)
    found = found if where is None else found.unflatten(1, (-1, where.fold)).sum(dim=2)
    return found.unsqueeze(2), found.new_ones(1, found.shape[1], 1, 1)


def matrices(rows: Pairs) -> Tensor:
    """All V_m/√N at once, [V, B, (q), o, i]."""
    return torch.einsum("vbs...o,vbs...i->vb...oi", rows.left, rows.right)


def chunks(rows: Pairs, numbers: int | None = None) -> Iterator[Pairs]:
    """The same rows for a few examples at a time, so that V·(numbers per example) stays in the budget.

    `numbers` defaults to the entries of a V_m.
    """
    left, right = rows
    each = left.shape[0] * (left.shape[3:].numel() * right.shape[-1] if numbers is None else numbers)
    size = max(1, BUDGET // max(each, 1))
    if size >= left.shape[1]:
        yield rows
        return
    yield from (Pairs(x, y) for x, y in zip(left.split(size, dim=1), right.split(size, dim=1), strict=True))
