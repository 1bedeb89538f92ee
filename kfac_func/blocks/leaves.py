"""From parameter leaves to the array V of a block, and back."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kfac_func._errors import TreeMismatchError, explain
from kfac_func.blocks.base import Layout


def pack(layout: Layout, leaves: dict[str, Tensor]) -> Tensor:
    """The block's array V from its leaves: [W | b], or the flattened leaves of a vector block."""
    for path in layout.leaves:
        if path not in leaves:
            raise TreeMismatchError(
                explain(
                    f"the tree has no leaf {path!r}, which block {layout.name!r} needs.",
                    got=", ".join(map(repr, list(leaves)[:20])),
                    options="pass gradients with the structure of the parameters that the statistics were taken on",
                )
            )
    count = sum(leaves[path].numel() for path in layout.leaves)
    if count != prod(layout.size):
        raise TreeMismatchError(
            explain(
                f"the leaves of block {layout.name!r} are not those that the statistics were taken on.",
                got=", ".join(f"{path!r} of shape {list(leaves[path].shape)}" for path in layout.leaves),
                wanted=f"{prod(layout.size)} numbers, V {list(layout.size)}",
                options="gradients of the model that the state has seen; or a new state",
            )
        )
    if not layout.matrix:
        return torch.cat([leaves[path].reshape(-1) for path in layout.leaves])
    lead = (layout.groups, layout.outputs) if layout.groups > 1 else (layout.outputs,)
    parts = []
    if layout.weight is not None:
        columns = layout.columns - (layout.bias is not None)
        parts.append(leaves[layout.weight].reshape(layout.shape).permute(layout.order).reshape(*lead, columns))
    if layout.bias is not None:
        parts.append(leaves[layout.bias].reshape(*lead, 1))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def unpack(layout: Layout, v: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The inverse of `pack`: leaves with their own shapes, sharing no storage with each other."""
    if not layout.matrix:
        sizes = [shapes[path].numel() for path in layout.leaves]
        return {p: part.reshape(shapes[p]).clone() for p, part in zip(layout.leaves, v.split(sizes), strict=True)}
    found = {}
    if layout.weight is not None:
        columns = v.shape[-1] - (layout.bias is not None)
        weight = v[..., :columns].clone(memory_format=torch.contiguous_format)
        found[layout.weight] = weight_leaf(layout, weight, shapes[layout.weight])
    if layout.bias is not None:
        found[layout.bias] = v[..., -1].reshape(shapes[layout.bias]).clone()
    return found


def weight_leaf(layout: Layout, v: Tensor, shape: torch.Size) -> Tensor:
    """The leaf of a matrix block's weight from its part [(q), o, i] of V; a view where it can be one."""
    permuted = [layout.shape[d] for d in layout.order]
    inverse = sorted(range(len(layout.order)), key=layout.order.__getitem__)
    return v.reshape(permuted).permute(inverse).contiguous().reshape(shape)
