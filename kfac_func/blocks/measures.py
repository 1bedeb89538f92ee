"""What structures ask a block for: factors A and G, the exact diagonal, per-example gradients; and the gradient itself."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_func.blocks.base import Block, Diagonal, Factor, Layout, Use
from kfac_func.blocks.factors import add, balanced, scaled
from kfac_func.blocks.rows import examples_first, input_rows, output_rows, second_moment, with_constant


def kronecker_moments(block: Block) -> tuple[Factor, Factor]:
    """The factors A [(q), i(+1), i(+1)] and G [(q), o, o] of a block, means over examples and positions.

    Uses that see the transposed matrix (an embedding tied to an output head) exchange the roles of a and g. Their pair and the pair of
    the other uses are first scaled to equal mean eigenvalues, (A·c, G/c), so that activations and gradients are added in one unit.
    """
    plain = [use for use in block.uses if not use.rule.transposed]
    turned = [use for use in block.uses if use.rule.transposed]
    if not turned:
        return _moments(block, plain)
    pairs = [(_positions(block, turned), *reversed(balanced(*_moments(block, turned))))]
    if plain:
        pairs.append((_positions(block, plain), *balanced(*_moments(block, plain))))
    return (
        add([scaled(a, t / block.positions) for t, a, _ in pairs]),
        add([scaled(g, t / block.positions) for t, _, g in pairs]),
    )


def _positions(block: Block, uses: list[Use]) -> int:
    return len(uses) if block.sharing == "reduce" else sum(use.rule.positions for use in uses)


def _moments(block: Block, uses: list[Use]) -> tuple[Factor, Factor]:
    total = _positions(block, uses)
    bias = block.layout.bias is not None
    inputs = add([scaled(_input_moment(use, block.sharing, bias), 1 / (_batch(block, use) * total)) for use in uses])
    if uses[0].grads is None:
        like = inputs.values if isinstance(inputs, Diagonal) else inputs
        shape = (block.layout.groups, block.layout.outputs) if block.layout.groups > 1 else (block.layout.outputs,)
        return inputs, Diagonal(torch.ones(shape, dtype=like.dtype, device=like.device))
    outputs = [output_rows(use, block.sharing).flatten(0, 2) for use in uses]
    return inputs, add([second_moment(rows) for rows in outputs]) / (block.examples * total)


def _batch(block: Block, use: Use) -> int:
    return 1 if use.rule.where is None else block.examples


def _input_moment(use: Use, sharing: str, bias: bool) -> Factor:
    if sharing == "reduce" or use.rule.kind.moment is None:
        return second_moment(with_constant(input_rows(use, sharing), bias).flatten(0, 1))
    return use.rule.kind.moment(examples_first(use.inputs, use.rule.where), use.rule.options, bias)


def per_example(block: Block) -> Tensor:
    """The gradients V_{v,n} of every output vector and example, [V, B, *V]. Large: structures use it in chunks or not at all."""
    if not block.layout.matrix:
        return add([_vector_gradients(use) for use in block.uses])
    return add([_matrix_gradients(use, block) for use in block.uses])


def _vector_gradients(use: Use) -> Tensor:
    kind, options, where = use.rule.kind, use.rule.options, use.rule.where
    assert kind.per_example is not None and use.grads is not None
    found = kind.per_example(examples_first(use.inputs, where), examples_first(use.grads, where, lead=1), options)
    return found if where is None else found.unflatten(1, (-1, where.fold)).sum(dim=2)


def _matrix_gradients(use: Use, block: Block) -> Tensor:
    a = with_constant(input_rows(use, block.sharing), block.layout.bias is not None)
    v = torch.einsum("vbs...o,bs...i->vb...oi", output_rows(use, block.sharing), a)
    return v.mT if use.rule.transposed else v


def squares(block: Block) -> Tensor:
    """The exact diagonal (1/N) Σ_{v,n} V_{v,n}∘V_{v,n}, with the shape of V. Gradients of one example are summed before squaring."""
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
    a, _ = kronecker_moments(block)
    diagonal = a.values if isinstance(a, Diagonal) else a.diagonal(dim1=-2, dim2=-1)
    return block.positions * diagonal.unsqueeze(-2).repeat_interleave(block.layout.outputs, dim=-2)


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
