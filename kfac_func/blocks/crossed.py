"""Kronecker factors between different blocks, as far as the sums of their entries."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func.blocks.base import Block
from kfac_func.blocks.pairs import Pairs
from kfac_func.blocks.rows import examples_first


class CrossFactors(NamedTuple):
    """The entries' sums of A_lm and G_lm for every pair of blocks, means over examples and over the positions that were
    matched, and the number of those; all [K, K]. Groups count as positions.
    """

    a: Tensor
    g: Tensor
    positions: Tensor


def crossed(rows: dict[str, Pairs], sizes: dict[str, tuple[int, ...]], resample: str) -> CrossFactors:
    """The sums of all entries of A_lm = mean ā_l ā_mᵀ and G_lm = mean g_l g_mᵀ, over examples and matched positions.

    Maps of different size: the smaller one is spread over the larger ("nearest"), or the larger one averaged to the
    smaller ("area"); either way as many pairs of positions count as the larger has.
    """
    groups: dict[Any, list[str]] = {}
    for name in sorted(rows):
        alike = sizes[name], rows[name].left.shape[:-1], rows[name].right.shape[:-1]
        groups.setdefault(alike, []).append(name)
    parts = [
        (size, [torch.stack([rows[name][side].sum(-1).flatten(2) for name in some]) for side in (1, 0)])
        for (size, *_), some in groups.items()
    ]
    cells = [[_cell(one, two, size, other, resample) for other, two in parts] for size, one in parts]
    names = [name for some in groups.values() for name in some]
    order = [names.index(name) for name in sorted(names)]
    whole = (torch.cat([torch.cat([cell[k] for cell in row], 1) for row in cells]) for k in range(3))
    return CrossFactors(*(x[order][:, order] for x in whole))


def _cell(
    one: list[Tensor], two: list[Tensor], size: tuple[int, ...], other: tuple[int, ...], resample: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A, G and the number of positions between two groups of blocks, whose sums are alike: [K, V or 1, B, S]."""
    (a, a_), (g, g_) = (matched(x, y, size, other, resample) for x, y in zip(one, two, strict=True))
    width, count = max(a.shape[1], a_.shape[1]), a.shape[2] * a.shape[3]
    a, a_ = (x.expand(-1, width, -1, -1).flatten(1) for x in (a, a_))
    positions = float(max(one[0].shape[3], two[0].shape[3]))
    found_a, found_g = a @ a_.mT / (width * count), g.flatten(1) @ g_.flatten(1).mT / g.shape[3]
    return found_a, found_g, torch.full_like(found_a, positions)


def map_sizes(rows: dict[str, Pairs], blocks: dict[str, Block]) -> dict[str, tuple[int, ...]]:
    """The size of the map that the positions of a block lie on, (S,) where there is none or there are several."""
    return {name: _map_size(part.left.shape[2:-1].numel(), blocks[name]) for name, part in rows.items()}


def _map_size(positions: int, block: Block) -> tuple[int, ...]:
    use, *others = block.uses
    kind, where = use.rule.kind, use.rule.where
    if others or kind.grid is None or where is None or use.grads is None or block.sharing == "reduce":
        return (positions,)
    size = kind.grid(examples_first(use.grads, where, lead=1))
    return size if torch.Size(size).numel() == positions else (positions,)


def matched(
    x: Tensor, y: Tensor, size: tuple[int, ...], other: tuple[int, ...], resample: str
) -> tuple[Tensor, Tensor]:
    """x [..., S] and y [..., S'] on maps of one size."""
    if size == other:
        return x, y
    if len(size) != len(other):
        size, other = (x.shape[-1],), (y.shape[-1],)
    choose = max if resample == "nearest" else min
    target = tuple(choose(pair) for pair in zip(size, other, strict=True))

    def resized(part: Tensor, own: tuple[int, ...]) -> Tensor:
        maps = part.reshape(-1, 1, *own)
        return F.interpolate(maps, target, mode=resample).reshape(*part.shape[:-1], -1)

    return resized(x, size), resized(y, other)
