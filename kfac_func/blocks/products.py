"""Kronecker factors of a block: F ≈ (T²/kept) · (G ⊗ A)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func.blocks.base import Block, Diagonal, Factor, Use
from kfac_func.blocks.factors import add, balanced, diagonal_of, scaled, shifted
from kfac_func.blocks.patterns import Form, Pattern, form_for, form_of, map_moment, moment
from kfac_func.blocks.rows import examples_first, input_rows, kept_rows, output_rows, with_constant


class KroneckerState(NamedTuple):
    """The second moments of a block, all of them MEANS over examples: F ≈ (T²/kept) · (G ⊗ A).

    a [(q), i(+1), i(+1)] and g [(q), o, o] are means over the N·T rows; `positions` is T and `kept` the mean number
    of rows per example that are not padding, both 0-dim. Rows of padding are zero in A and in G, which T²/kept makes
    good.

    `turned` is a second set for uses that see the transposed matrix (an embedding tied to a head), in which a and g
    have exchanged their roles, so that both describe the same V; () without such uses. `a_mean` [1, (q), i] and
    `g_mean` [V, (q), o] are the mean rows (of every output vector; without the homogeneous 1) when statistics are
    centred; else ().
    """

    a: Factor
    g: Factor
    positions: Tensor
    kept: Tensor
    turned: Any = ()
    a_mean: Any = ()
    g_mean: Any = ()


FULL = Pattern()


def kronecker_state(block: Block, pattern: Pattern = FULL) -> KroneckerState:
    """The factors of a batch, as far as the pattern keeps them."""
    sides = ([use for use in block.uses if use.rule.transposed is side] for side in (False, True))
    plain, turned = (_moments(block, uses, pattern) if uses else None for uses in sides)
    if turned is not None:
        a, g, t, kept, _, a_mean, g_mean = turned
        turned = KroneckerState(g, a, t, kept, (), g_mean, a_mean)
    if plain is None:
        assert turned is not None
        return turned
    return plain if turned is None else plain._replace(turned=turned)


def _moments(block: Block, uses: list[Use], pattern: Pattern) -> KroneckerState:
    total = len(uses) if block.sharing == "reduce" else sum(use.rule.positions for use in uses)
    sums = [_input_sums(block, use, pattern) for use in uses]
    weights = [1 / (_batch(block, use) * total) for use in uses]
    a = add([scaled(second, w) for (second, _), w in zip(sums, weights, strict=True)])
    a_mean = add([first * w for (_, first), w in zip(sums, weights, strict=True)]) if _centred(pattern, "input") else ()
    like = diagonal_of(a)
    positions = torch.full((), float(total), dtype=like.dtype, device=like.device)
    kept = sum((_kept(block, use, positions) for use in uses), start=torch.zeros_like(positions))
    if uses[0].grads is None:
        width = uses[0].rule.width
        shape = (block.layout.groups, width) if block.layout.groups > 1 else (width,)
        g = Diagonal(torch.ones(shape, dtype=like.dtype, device=like.device) * (kept / positions))
        return KroneckerState(a, g, positions, kept, (), a_mean)
    form = form_for(pattern, uses[0].rule.width, pattern.sides != "input")
    rows = [output_rows(use, block.sharing) for use in uses]
    count = block.examples * total
    g = scaled(add([_output_moment(use, part, form) for use, part in zip(uses, rows, strict=True)]), 1 / count)
    centred = _centred(pattern, "output")
    g_mean = add([part.sum(dim=(1, 2)) for part in rows]) / count if centred else ()
    return KroneckerState(a, g, positions, kept, (), a_mean, g_mean)


def _output_moment(use: Use, rows: Tensor, form: Form) -> Factor:
    """Σ g gᵀ over rows [V, B, S, (q), o]."""
    if use.rule.kind.grid is not None and rows.ndim == 4 and form == Form():
        return map_moment(rows)
    return moment(rows.flatten(0, 2), form)


def _centred(pattern: Pattern, side: str) -> bool:
    return pattern.centred and pattern.sides in ("both", side)


def _batch(block: Block, use: Use) -> int:
    return 1 if use.rule.where is None else block.examples


def _kept(block: Block, use: Use, like: Tensor) -> Tensor:
    """Rows of one example that are not padding."""
    if block.sharing == "reduce":
        return torch.ones_like(like)
    kept = kept_rows(use)
    if kept is None:
        return torch.full_like(like, float(use.rule.positions))
    return kept.sum().to(like.dtype) / _batch(block, use)


def _input_sums(block: Block, use: Use, pattern: Pattern) -> tuple[Factor, Any]:
    """Σ ā āᵀ and, when centred, Σ a over all rows of a use."""
    kind, options, bias = use.rule.kind, use.rule.options, block.layout.bias is not None
    form = _input_form(block, use, pattern)
    simple = block.sharing == "expand" and use.rule.part.columns is None
    direct = kind.moment if simple and (kind.diagonal or form == Form()) else None
    centred = _centred(pattern, "input")
    whole = [] if use.kept is None or block.sharing == "reduce" else [use.kept.flatten()]
    second = None if direct is None else direct(examples_first(use.inputs, use.rule.where), options, bias, *whole)
    if second is not None and not centred:
        return second, ()
    rows = with_constant(input_rows(use, block.sharing).flatten(0, 1), bias)
    for kept in whole:
        rows = rows * kept.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
    first = rows[..., : rows.shape[-1] - bias].sum(dim=0, keepdim=True) if centred else ()
    return moment(rows, form) if second is None else second, first


def _input_form(block: Block, use: Use, pattern: Pattern) -> Form:
    kind, layout = use.rule.kind, block.layout
    offsets = 1 if kind.offsets is None else kind.offsets(use.rule.options)
    size = layout.outputs if use.rule.transposed else layout.columns
    return form_for(pattern, size, pattern.sides != "output", offsets)


def merged(state: KroneckerState) -> tuple[Factor, Factor, Tensor]:
    """A, G and T of one Kronecker product T · (G ⊗ A) for all uses; T = 1 before the first statistics.

    Two sets are first scaled to equal mean eigenvalues, (A·c, G/c), so that activations and gradients are added in
    one unit. Mean rows m, where they were kept, are taken off: A − m mᵀ/κ with κ = kept/T, likewise those of
    every output vector off G, and never off the homogeneous 1.
    """
    t, a, g = _scale(state), _covariance(state, state.a, state.a_mean), _covariance(state, state.g, state.g_mean)
    if state.turned == ():
        return a, g, t
    other_a, other_g, other = merged(state.turned)
    pairs = ((t, *balanced(a, g)), (other, *balanced(other_a, other_g)))
    total = t + other
    return add([scaled(a, s / total) for s, a, _ in pairs]), add([scaled(g, s / total) for s, _, g in pairs]), total


def _scale(state: KroneckerState) -> Tensor:
    empty = state.kept <= 0  # before the first statistics
    return torch.where(empty, 1.0, state.positions**2 / torch.where(empty, 1.0, state.kept))


def _covariance(state: KroneckerState, factor: Factor, mean: Any) -> Factor:
    if isinstance(mean, tuple):
        return factor
    share = torch.where(state.kept <= 0, 1.0, state.kept / state.positions.clamp(min=1))
    bias = diagonal_of(factor).shape[-1] > mean.shape[-1]
    rows = with_constant(mean / share, bias)
    outer = moment(rows, form_of(factor))
    if bias:  # the covariance of a and the constant is zero, the moment of the constant stays
        outer = add([outer, scaled(moment(with_constant(0 * mean, bias), form_of(factor)), -1.0)])
    rounding = 4 * torch.finfo(rows.dtype).eps * diagonal_of(factor).sum(dim=-1)  # of the difference: it must stay PSD
    return shifted(add([factor, scaled(outer, -share)]), rounding)
