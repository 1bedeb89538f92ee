r"""The exact block rearranged (Van Loan): the operator whose singular triplets are the block's best Kronecker products.

    F = Σ_m vec(V_m) vec(V_m)ᵀ        Z V̂ = Σ_m V_mᵀ V̂ V_m  [i, i]        Zᵀ Û = Σ_m V_m Û V_mᵀ  [o, o]

    ⟨Û, Z V̂⟩ = ⟨F, V̂ ⊗ Û⟩, so that  ‖F − S ⊗ R‖ = ‖Z − vec(R) vec(S)ᵀ‖

F and Z are never formed. F is the whole block with all its positions: no factor T stands before S ⊗ R. Source: Van Loan
& Pitsianis 1993; for curvature: Koroko et al. 2022 (2201.10285), §3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func.blocks.base import Block, Use
from kfac_func.blocks.factors import add
from kfac_func.blocks.pairs import Pairs, apart, chunks, matrices, pairs
from kfac_func.blocks.rows import examples_first


class Rearranged(NamedTuple):
    """Z of a batch: its rows, and the pairs of positions that count, 1 or 0 in [S, S]; () when all do."""

    rows: Pairs
    near: Any = ()


def rearranged(block: Block, radius: int | None = None) -> Rearranged:
    """Z of a matrix block, groups [q] side by side.

    radius    pairs of positions that are further apart on the map (in any of its dimensions), or on maps of different
              images or uses, are left out. Blocks without a map (`Kind.grid`) keep all pairs. None: all
    """
    rows, masks = pairs(apart(block, "the nearest sum of Kronecker products")), _near(block, radius)
    if masks == []:
        return Rearranged(rows)
    if radius == 0:  # positions are as good as examples
        return Rearranged(Pairs(*(side.flatten(1, 2).unsqueeze(2) for side in rows)))
    return Rearranged(rows, torch.block_diag(*masks).to(rows.left.dtype))


def _near(block: Block, radius: int | None) -> list[Tensor]:
    """One mask per image of every use; none where all pairs count."""
    if radius is None:
        return []
    shared = any(use.rule.where is None for use in block.uses)
    maps = [size for use in block.uses for size in _maps(use, shared)]
    if () in maps or (len(maps) == 1 and max(maps[0]) <= radius + 1):
        return []
    return [_close(size, radius, block.uses[0].inputs.device) for size in maps]


def _maps(use: Use, shared: bool) -> list[tuple[int, ...]]:
    """The sizes (height, width, ...) of every image among the positions; () for a use without a map.

    One example owns `fold` of them; but where a use is shared, its positions are those of the whole batch (`pairs`).
    """
    kind, where = use.rule.kind, use.rule.where
    if kind.grid is None or use.grads is None:
        return [()]
    g = use.grads if where is None else examples_first(use.grads, where, lead=1)
    return [kind.grid(g)] * (g.shape[1] if shared or where is None else where.fold)


def _close(size: tuple[int, ...], radius: int, device: torch.device) -> Tensor:
    place = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij"), -1)
    place = place.flatten(0, -2)
    return (place.unsqueeze(1) - place).abs().amax(-1) <= radius


def output_moment(z: Rearranged) -> Tensor:
    """Σ_m Σ_s left leftᵀ [(q), o, o], a good first V̂."""
    return torch.einsum("vbs...o,vbs...p->...op", z.rows.left, z.rows.left)


def to_inputs(z: Rearranged, v: Tensor) -> Tensor:
    """Z V̂ [(q), i, i] for V̂ [(q), o, o]."""
    return _applied(z, v, to_inputs=True)


def to_outputs(z: Rearranged, u: Tensor) -> Tensor:
    """Zᵀ Û [(q), o, o] for Û [(q), i, i]."""
    return _applied(z, u, to_inputs=False)


def _applied(z: Rearranged, x: Tensor, *, to_inputs: bool) -> Tensor:
    form = _by_matrices if _matrices_are_cheaper(z, to_inputs) else _by_positions
    numbers = None if form is _by_matrices else _numbers(z.rows)
    parts = (Pairs(*(part if to_inputs else part[::-1])) for part in chunks(z.rows, numbers))
    return add([form(part, x, z.near) for part in parts])


def _by_matrices(rows: Pairs, x: Tensor, near: Any) -> Tensor:
    """Σ_m V_mᵀ X V_m, with the V_m formed."""
    del near
    v = matrices(rows)
    return torch.einsum("vb...oi,vb...oj->...ij", v, torch.einsum("...op,vb...pj->vb...oj", x, v))


def _by_positions(rows: Pairs, x: Tensor, near: Any) -> Tensor:
    """Σ_m R_mᵀ M_m R_m with M_m = L_m X L_mᵀ [S, S], masked."""
    left, right = rows
    met = torch.einsum("vbs...o,...op->vbs...p", left, x)
    if left.shape[2] == 1:
        met = _shared((met * left).sum(-1, keepdim=True), right)
        return torch.einsum("vbs...i,vbs...j->...ij", met * right, right)
    met = _shared(torch.einsum("vbs...o,vbt...o->vb...st", met, left), right)
    met = met if isinstance(near, tuple) else met * near
    return torch.einsum("vbs...i,vbs...j->...ij", right, torch.einsum("vb...st,vbt...j->vbs...j", met, right))


def _shared(met: Tensor, right: Tensor) -> Tensor:
    """Output vectors that share their other side are summed at once."""
    return met.sum(0, keepdim=True) if right.shape[0] == 1 else met


def _numbers(rows: Pairs) -> int:
    s, o, i = rows.left.shape[2], rows.left.shape[-1], rows.right.shape[-1]
    return rows.left.shape[3:-1].numel() * s * (max(o, i) + (s if s > 1 else 0))


def _matrices_are_cheaper(z: Rearranged, to_inputs: bool) -> bool:
    s = z.rows.left.shape[2]
    if s == 1 or not isinstance(z.near, tuple):
        return False
    (v, d), (w, e) = ((side.shape[0], side.shape[-1]) for side in (z.rows if to_inputs else z.rows[::-1]))
    return max(v, w) * d * e * (s + d + e) < v * s * d * (d + s) + w * s * e * (e + s)
