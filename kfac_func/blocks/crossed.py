"""Kronecker factors between different blocks, as far as the sums of their entries."""

from __future__ import annotations

from typing import NamedTuple

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
    names = sorted(rows)
    sums = {name: tuple(side.sum(-1).flatten(2) for side in rows[name]) for name in names}
    count = {name: float(g.shape[2]) for name, (g, _) in sums.items()}

    def mean(side: int, one: str, two: str) -> Tensor:
        x, y = matched(sums[one][side], sums[two][side], sizes[one], sizes[two], resample)
        return (x * y).sum((0, 1)).mean()  # of every output vector: 1/√N is in g

    like = next(iter(sums.values()))[0]
    examples = {name: float(a.shape[:2].numel()) for name, (_, a) in sums.items()}
    a = [mean(1, one, two) / max(examples[one], examples[two]) for one in names for two in names]
    g = [mean(0, one, two) for one in names for two in names]
    positions = like.new_tensor([max(count[one], count[two]) for one in names for two in names])
    return CrossFactors(*(x.reshape(len(names), -1) for x in (torch.stack(a), torch.stack(g), positions)))


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
    """x [V, B, S] and y [V, B, S'] on maps of one size."""
    if size == other:
        return x, y
    if len(size) != len(other):
        size, other = (x.shape[2],), (y.shape[2],)
    choose = max if resample == "nearest" else min
    target = tuple(choose(pair) for pair in zip(size, other, strict=True))
    x, y = (
        F.interpolate(part.unflatten(2, own).flatten(0, 1).unsqueeze(1), target, mode=resample)
        .flatten(1)
        .unflatten(0, part.shape[:2])
        for part, own in ((x, size), (y, other))
    )
    return x, y
