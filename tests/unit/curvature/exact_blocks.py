"""What the tests of sums of Kronecker products share: dense matrices, structures, one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kfac_func.blocks import Block, densify, merged, per_example
from kfac_func.curvature import Structure
from kfac_func.curvature.corrected import corrected
from kfac_func.curvature.deflation import deflation
from kfac_func.curvature.kpsvd import kpsvd
from kfac_func.curvature.lanczos import lanczos
from kfac_func.linalg.sums import Terms
from tests.contracts import structures as contracts
from tests.zoo import CASES, batch_of, measured, subset

BLOCKS = {k: v for k, v in contracts.BLOCKS.items() if k != "norm"} | {"positions": ("attention", "query")}
TIGHT = {"iterations": 3000, "tolerance": 1e-13}
ONE = torch.ones((), dtype=torch.float64)
DAMPING = 0.03 * ONE
SUMS: dict[str, Callable[..., Structure]] = {
    "deflation": deflation,
    "lanczos": lanczos,
    "corrected": corrected,
    "deflation 3": lambda **options: deflation(3, **options),
    "lanczos 3": lambda **options: lanczos(3, **options),
}
STRUCTURES: dict[str, Callable[..., Structure]] = {"kpsvd": kpsvd, **SUMS}


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
    return structure.absorb(state, batch_of(structure, block), fraction * ONE)


def rescaled(block: Block, a: float = 1.0, g: float = 1.0) -> Block:
    """The block of a batch whose inputs and output gradients are a and g times as large."""
    uses = (
        use._replace(inputs=a * use.inputs, grads=None if use.grads is None else g * use.grads) for use in block.uses
    )
    return block._replace(uses=tuple(uses))


def tight(structure: str) -> Structure:
    return STRUCTURES[structure](**({"steps": 60} if structure.startswith("lanczos") else TIGHT))


def halves(name: str) -> tuple[Block, Block]:
    """Two batches of one block that differ."""
    case, path = BLOCKS[name]
    n = len(CASES[case].targets)
    one, two = (measured(subset(CASES[case], *ends))[path] for ends in ((0, n // 2), (n // 2, n)))
    return one, two


def terms_of(state: Any) -> Terms:
    """All terms of a state."""
    if isinstance(state, Terms):
        return state
    a, g, t = merged(state.kronecker)
    first = t * densify(a), densify(g)
    return Terms(*(torch.cat([x[None], y]) for x, y in zip(first, state.correction, strict=True)))


def shape_of(state: Any) -> tuple[int, ...]:
    terms = terms_of(state)
    return (*terms.r.shape[1:-2], terms.s.shape[-1], terms.r.shape[-1])


def groups_of(m: Tensor, like: Tensor) -> Tensor:
    """The blocks along the diagonal of a matrix, with the shape of the groups' F: the inverse of `matrix`."""
    size = len(m) // len(like)
    return torch.stack([m[k : k + size, k : k + size] for k in range(0, len(m), size)]).reshape_as(like)


def operator(own: Structure, factored: Any, shape: tuple[int, ...]) -> Tensor:
    """`solve` as a matrix."""
    p = torch.Size(shape).numel()
    eye = torch.eye(p, dtype=torch.float64).reshape(p, *shape)
    return torch.func.vmap(lambda v: own.solve(factored, v).flatten(), out_dims=1)(eye)
