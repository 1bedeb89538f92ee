"""What the tests of rearranged blocks share: the dense F, its dense rearrangement, and one batch for a structure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_func.blocks import Block, per_example
from kfac_func.curvature import Structure
from tests.zoo import CASES, measured

BLOCKS = {
    "linear": ("mlp", "first.w"),
    "no bias": ("recurrent", "input"),
    "several uses": ("recurrent", "hidden"),
    "conv": ("conv", "first.weight"),
    "groups": ("grouped", "conv.weight"),
    "positions": ("attention", "query"),
    "embedding": ("tokens", "embedding.weight"),
    "tied": ("tied", "embedding"),
}
TIGHT = {"iterations": 3000, "tolerance": 1e-13}
ONE = torch.ones((), dtype=torch.float64)


def block_of(name: str) -> Block:
    case, path = BLOCKS[name]
    return measured(CASES[case])[path]


def exact(block: Block) -> Tensor:
    """F of every group, [q, o, i, o, i] with q = 1 for a block without groups."""
    v = per_example(block)
    v = v if block.layout.groups > 1 else v.unsqueeze(2)
    return torch.einsum("vbqoi,vbqpj->qoipj", v, v) / block.examples


def matrix(f: Tensor) -> Tensor:
    """The groups' F [q, o, i, o, i] along the diagonal of one matrix."""
    return torch.block_diag(*(x.flatten(2).flatten(0, 1) for x in f))


def rearranged_matrix(f: Tensor) -> Tensor:
    """Z of one group's F [o, i, o, i], dense: [i·i, o·o]."""
    return f.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


def symmetric_part(z: Tensor) -> Tensor:
    """Z on symmetric matrices."""
    n = round(z.shape[1] ** 0.5)
    eye = torch.eye(n * n, dtype=z.dtype)
    return z @ (eye + eye.unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)) / 2


def best(f: Tensor, rank: int) -> Tensor:
    """The best sum of `rank` symmetric Kronecker products for every group's F, along the diagonal of one matrix."""
    found = []
    for one in f:
        u, s, vh = torch.linalg.svd(symmetric_part(rearranged_matrix(one)), full_matrices=False)
        z = (u[:, :rank] * s[:rank]) @ vh[:rank]
        o, i = one.shape[:2]
        found.append(z.reshape(i, i, o, o).permute(2, 0, 3, 1))
    return matrix(torch.stack(found))


def absorbed(structure: Structure, block: Block, fraction: float = 1.0, state: Any = ()) -> Any:
    prepared = structure.prepare(block)
    return structure.absorb(state, lambda frame: structure.measure(prepared, frame), fraction * ONE)


def rescaled(block: Block, a: float = 1.0, g: float = 1.0) -> Block:
    """The block of a batch whose inputs and output gradients are a and g times as large."""
    uses = (
        use._replace(inputs=a * use.inputs, grads=None if use.grads is None else g * use.grads) for use in block.uses
    )
    return block._replace(uses=tuple(uses))
