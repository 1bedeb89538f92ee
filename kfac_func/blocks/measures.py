"""What structures ask a block for: factors A and G, the exact diagonal, per-example gradients; and the gradient
itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_func.blocks.base import Block, Diagonal, Factor, Layout, Part, Use
from kfac_func.blocks.factors import add, densify, diagonal_of, multiplied, rotated
from kfac_func.blocks.leaves import unpack, weight_leaf
from kfac_func.blocks.pairs import Pairs, chunks, matrices, pairs
from kfac_func.blocks.products import kronecker_state, merged
from kfac_func.blocks.rows import alike, examples_first, placed


def per_example(block: Block) -> Tensor:
    """The gradients V_{v,n} of every output vector and example, [V, B, *V]. Large: for tests and small blocks; see
    `Pairs` for B and for the rows that they are made of.
    """
    found = matrices(pairs(block)) * block.examples**0.5
    return found if block.layout.matrix else found.squeeze(-1)


def squares(block: Block, a_basis: Factor | None = None, g_basis: Factor | None = None) -> Tensor:
    """The exact diagonal (1/N) Σ_{v,n} V'_{v,n}∘V'_{v,n} with V' = U_Gᵀ V U_A (V itself without bases), of the shape
    of V.

    Gradients of one example are summed over its positions before squaring.
    """
    if block.uses[0].grads is None:
        return _squares_without_vectors(block, a_basis, g_basis)
    rows = pairs(block)
    found = squares_of(rows, a_basis, g_basis)
    return found if block.layout.matrix else found.squeeze(-1)


def squares_of(rows: Pairs, a_basis: Factor | None = None, g_basis: Factor | None = None) -> Tensor:
    """Σ_m V'_m∘V'_m from pairs of rows; rows or matrices are rotated, whichever costs less."""
    s, o, i = rows.left.shape[2], rows.left.shape[-1], rows.right.shape[-1]
    grouped = rows.left.ndim > 4
    late = s > 1 and a_basis is not None and s * (o * o + i * i) > o * i * (o + i)
    if not late:
        rows = Pairs(rotated(rows.left, g_basis, grouped), rotated(rows.right, a_basis, grouped))
    if s == 1:
        left, right = rows.left.square(), rows.right.square()
        left = left.sum(dim=0, keepdim=True) if right.shape[0] == 1 else left
        return torch.einsum("vbs...o,vbs...i->...oi", left, right)
    found = []
    for part in chunks(rows):
        v = matrices(part)
        if late and a_basis is not None and g_basis is not None:
            v = multiplied(multiplied(v, a_basis).mT, g_basis).mT
        found.append(v.square().sum(dim=(0, 1)))
    return add(found)


def mean_squares(block: Block, a_basis: Factor, g_basis: Factor) -> Tensor:
    """N Σ_v (U_Gᵀ V̄_v U_A)² with V̄_v = (1/N) Σ_n V_{v,n}: what one batch's mean gradients say about the diagonal."""
    if block.uses[0].grads is None:
        return _squares_without_vectors(block, a_basis, g_basis)
    rows = pairs(block)
    total = torch.einsum("vbs...o,vbs...i->v...oi", *(x.expand(rows.left.shape[0], *x.shape[1:]) for x in rows))
    return multiplied(multiplied(total, a_basis).mT, g_basis).mT.square().sum(dim=0)


def _squares_without_vectors(block: Block, a_basis: Factor | None, g_basis: Factor | None) -> Tensor:
    """G = I (`forward_only`): the diagonal T · (1 ⊗ diag A); ones for a vector block."""
    like = block.uses[0].inputs
    dtype = torch.float32 if not like.is_floating_point() or like.itemsize < 4 else like.dtype
    if not block.layout.matrix:
        return torch.ones(block.layout.outputs, dtype=dtype, device=like.device)
    a, g, t = merged(kronecker_state(block))
    a, g = (diagonal_of(x) if u is None else within(x, u) for x, u in ((a, a_basis), (g, g_basis)))
    return t * g.unsqueeze(-1) * a.unsqueeze(-2)


def within(factor: Factor, basis: Factor) -> Tensor:
    """The diagonal of Uᵀ · factor · U."""
    if isinstance(factor, Diagonal) and isinstance(basis, Diagonal):
        return factor.values
    u = densify(basis)
    return (u * (densify(factor) @ u)).sum(dim=-2)


def gradients(layout: Layout, uses: Sequence[Use], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The gradients of a block's leaves for ONE output vector (grads [1, *output]), summed over its uses and their
    examples.
    """
    if not layout.matrix:
        return unpack(layout, add([_weight_gradient(use) for use in uses]), shapes)
    found = {}
    if layout.weight is not None:
        found[layout.weight] = weight_leaf(layout, add([_weight_gradient(use) for use in uses]), shapes[layout.weight])
    if layout.bias is not None:
        found[layout.bias] = add([_bias_gradient(use) for use in uses]).reshape(shapes[layout.bias])
    return found


def _weight_gradient(use: Use) -> Tensor:
    rule = use.rule
    assert use.grads is not None
    x, g = alike(examples_first(use.inputs, rule.where), examples_first(use.grads[0], rule.where))
    v = rule.kind.gradient(x, g, rule.options)
    if rule.part != Part():
        v = placed(placed(v, rule.part.columns).mT, rule.part.rows).mT
    return v.mT if rule.transposed else v


def _bias_gradient(use: Use) -> Tensor:
    rule = use.rule
    assert use.grads is not None
    assert rule.kind.output_rows is not None
    rows = rule.kind.output_rows(examples_first(use.grads, rule.where, lead=1), rule.options)
    return placed(rows.sum(dim=(0, 1, 2)), rule.part.rows)
