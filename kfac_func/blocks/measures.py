"""What structures ask a block for: factors A and G, the exact diagonal, per-example gradients; and the gradient
itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_func.blocks.base import Block, Diagonal, Factor, Layout, Moments, Use
from kfac_func.blocks.factors import add, scaled
from kfac_func.blocks.rows import (
    examples_first,
    input_rows,
    kept_rows,
    output_rows,
    precise,
    second_moment,
    with_constant,
)


def kronecker_moments(block: Block) -> tuple[Moments, ...]:
    """The moments of a block: one set, or two when some uses see the transposed matrix (an embedding tied to an
    output head).

    In the second set a and g have exchanged their roles, so that both describe the same V.
    """
    sides = ([use for use in block.uses if use.rule.transposed is side] for side in (False, True))
    plain, turned = (_moments(block, uses) if uses else () for uses in sides)
    return (*plain, *(Moments(m.g, m.a, m.positions, m.kept) for m in turned))


def _moments(block: Block, uses: list[Use]) -> tuple[Moments]:
    total = len(uses) if block.sharing == "reduce" else sum(use.rule.positions for use in uses)
    bias = block.layout.bias is not None
    a = add([scaled(_input_moment(use, block.sharing, bias), 1 / (_batch(block, use) * total)) for use in uses])
    like = a.values if isinstance(a, Diagonal) else a
    positions = torch.full((), float(total), dtype=like.dtype, device=like.device)
    kept = sum((_kept(block, use, positions) for use in uses), start=torch.zeros_like(positions))
    if uses[0].grads is None:
        width = uses[0].rule.width
        shape = (block.layout.groups, width) if block.layout.groups > 1 else (width,)
        g = Diagonal(torch.ones(shape, dtype=like.dtype, device=like.device) * (kept / positions))
        return (Moments(a, g, positions, kept),)
    outputs = [output_rows(use, block.sharing).flatten(0, 2) for use in uses]
    g = add([second_moment(rows) for rows in outputs]) / (block.examples * total)
    return (Moments(a, g, positions, kept),)


def _batch(block: Block, use: Use) -> int:
    return 1 if use.rule.where is None else block.examples


def _kept(block: Block, use: Use, like: Tensor) -> Tensor:
    """Rows of one example that are not padding."""
    if block.sharing == "reduce":
        return torch.ones_like(like)
    if use.rule.kind.kept is None:
        return torch.full_like(like, float(use.rule.positions))
    return kept_rows(use).sum().to(like.dtype) / _batch(block, use)


def _input_moment(use: Use, sharing: str, bias: bool) -> Factor:
    if sharing == "reduce" or use.rule.kind.moment is None:
        return second_moment(with_constant(input_rows(use, sharing), bias).flatten(0, 1))
    return use.rule.kind.moment(examples_first(use.inputs, use.rule.where), use.rule.options, bias)


def per_example(block: Block) -> Tensor:
    """The gradients V_{v,n} of every output vector and example, [V, B, *V]. Large: structures use it in chunks or not
    at all.

    B = N; but B = 1, the sum over the examples, as soon as one use is shared by all of them. Its vectors have mean
    zero then, so that squares of the sum estimate the sum of squares.
    """
    if block.layout.matrix:
        parts = [_matrix_gradients(use, block) for use in block.uses]
    else:
        parts = [_vector_gradients(use) for use in block.uses]
    if any(use.rule.where is None for use in block.uses):
        parts = [part.sum(dim=1, keepdim=True) for part in parts]
    return add(parts)


def _vector_gradients(use: Use) -> Tensor:
    kind, options, where = use.rule.kind, use.rule.options, use.rule.where
    assert kind.per_example is not None
    assert use.grads is not None
    x, g = examples_first(use.inputs, where), examples_first(use.grads, where, lead=1)
    found = kind.per_example(precise(x), precise(g), options)
    return found if where is None else found.unflatten(1, (-1, where.fold)).sum(dim=2)


def _matrix_gradients(use: Use, block: Block) -> Tensor:
    a = with_constant(input_rows(use, block.sharing), block.layout.bias is not None)
    v = torch.einsum("vbs...o,bs...i->vb...oi", output_rows(use, block.sharing), a)
    return v.mT if use.rule.transposed else v


def squares(block: Block) -> Tensor:
    """The exact diagonal (1/N) Σ_{v,n} V_{v,n}∘V_{v,n}, with the shape of V. Gradients of one example are summed
    before squaring.
    """
    if block.uses[0].grads is None:
        return _squares_without_vectors(block)
    single = len(block.uses) == 1 and (block.sharing == "reduce" or block.uses[0].rule.positions == 1)
    if single and block.layout.matrix and not block.uses[0].rule.transposed:
        use = block.uses[0]
        g = output_rows(use, block.sharing).square().sum(dim=(0, 2))
        a = with_constant(input_rows(use, block.sharing), block.layout.bias is not None).square().sum(dim=1)
        return torch.einsum("b...o,b...i->...oi", g, a) / block.examples
    return per_example(block).square().sum(dim=(0, 1)) / block.examples


def _squares_without_vectors(block: Block) -> Tensor:
    """G = I (`forward_only`): the diagonal T · (1 ⊗ diag A); ones for a vector block."""
    like = block.uses[0].inputs
    dtype = torch.float32 if not like.is_floating_point() or like.itemsize < 4 else like.dtype
    if not block.layout.matrix:
        return torch.ones(block.layout.outputs, dtype=dtype, device=like.device)
    sides = [
        m.positions**2 / m.kept.clamp(min=1) * _diagonal(m.g).unsqueeze(-1) * _diagonal(m.a).unsqueeze(-2)
        for m in kronecker_moments(block)
    ]
    return add(sides)


def _diagonal(factor: Factor) -> Tensor:
    return factor.values if isinstance(factor, Diagonal) else factor.diagonal(dim1=-2, dim2=-1)


def gradient(layout: Layout, uses: tuple[Use, ...]) -> Tensor:
    """The gradient V of a block for ONE output vector (grads [1, *output]), summed over its uses and their examples."""
    return add([_use_gradient(layout, use) for use in uses])


def _use_gradient(layout: Layout, use: Use) -> Tensor:
    rule = use.rule
    assert use.grads is not None
    x = examples_first(use.inputs, rule.where)
    g = examples_first(use.grads[0], rule.where)
    v = rule.kind.gradient(x, g, rule.options)
    if layout.matrix and layout.bias is not None:
        assert rule.kind.output_rows is not None
        column = rule.kind.output_rows(g.unsqueeze(0), rule.options).sum(dim=(0, 1, 2)).unsqueeze(-1)
        v = column if layout.weight is None else torch.cat([v, column], dim=-1)
    return v.mT if rule.transposed else v
