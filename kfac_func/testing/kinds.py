"""Layer kinds against differentiation of the whole model."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import PyTree
from kfac_func.blocks import Block, Kind, Use, densify, gradients, pack, per_example, with_constant
from kfac_func.blocks.rows import examples_first
from kfac_func.testing.setting import Setting, compare, example_gradients


def check_kind(kind: Kind | str | None, setting: Setting) -> None:
    """Check the blocks with a use of a kind (None: all); a `Kind` replaces the one of its name in them.

    Raises AssertionError, or HyperparameterError when the regime does not use the kind.
    """
    name = kind.name if isinstance(kind, Kind) else kind
    blocks = [block for block in setting.blocks.values() if name is None or name in _kinds(block)]
    if not blocks:
        raise HyperparameterError(
            explain(
                f"{setting.name} has no layer of kind {name!r}.",
                got=", ".join(sorted({repr(one) for block in setting.blocks.values() for one in _kinds(block)})),
                options="a regime whose model uses the layer: Regime(fn, params, batch, loss)",
            )
        )
    _, targets = setting.regime.batch
    every = example_gradients(setting, setting.regime.loss.factor(setting.problem.z, targets))
    for block in blocks:
        _check(_swapped(block, kind) if isinstance(kind, Kind) else block, setting, every)


def _kinds(block: Block) -> set[str]:
    return {use.rule.kind.name for use in block.uses}


def _swapped(block: Block, kind: Kind) -> Block:
    def swap(use: Use) -> Use:
        return use._replace(rule=use.rule._replace(kind=kind)) if use.rule.kind.name == kind.name else use

    return block._replace(uses=tuple(map(swap, block.uses)))


def _check(block: Block, setting: Setting, every: Tensor) -> None:
    name = block.layout.name
    who = f"kind {'/'.join(sorted(_kinds(block)))} is not exact for block {name!r}"
    wanted = every[..., setting.problem.wanted[name]]
    compare(setting, who, "V[v, n] = Σ_s g[s] ā[s]ᵀ, per-example gradients", per_example(block).flatten(2), wanted)
    compare(setting, who, "gradient[v] = Σ_n V[v, n]", _gradients(block, setting.regime.params), wanted.sum(1))
    for use in block.uses:
        if use.rule.kind.moment is not None:
            compare(setting, who, "moment = Σ_{n,s} ā[n, s] ā[n, s]ᵀ", *_moments(use, block.layout.bias is not None))


def _gradients(block: Block, params: PyTree) -> Tensor:
    """The summed gradient of every output vector, [V, p], in the order of the block's array."""
    shapes = {path: leaf.shape for path, leaf in _tree.unique_paths(params).items()}

    def one(v: int) -> Tensor:
        uses = [use._replace(grads=use.grads[v : v + 1]) for use in block.uses if use.grads is not None]
        return pack(block.layout, gradients(block.layout, uses, shapes)).flatten()

    return torch.stack([one(v) for v in range(max(len(use.grads) for use in block.uses if use.grads is not None))])


def _moments(use: Use, bias: bool) -> tuple[Tensor, Tensor]:
    """Σ ā āᵀ of a use, as the kind takes it and from its rows."""
    kind, options, where = use.rule.kind, use.rule.options, use.rule.where
    assert kind.moment is not None
    assert kind.rows is not None
    x = examples_first(use.inputs, where)
    rows = with_constant(kind.rows(x, options), bias).flatten(0, 1)
    return densify(kind.moment(x, options, bias)), torch.einsum("k...i,k...j->...ij", rows, rows)
