"""The table of structures: a row is a structure, the dense damped matrix that it claims to invert, and its theorems."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import Block, densify, merged
from kfac_func.curvature import Structure
from tests import oracles
from tests.zoo import CASES, Case, measured, subset, vectors

DAMPING = 0.03
BLOCKS = {
    "linear": ("mlp", "first.w"),
    "no bias": ("recurrent", "input"),
    "several uses": ("recurrent", "hidden"),
    "conv": ("conv", "first.weight"),
    "groups": ("grouped", "conv.weight"),
    "embedding": ("tokens", "embedding.weight"),
    "tied": ("tied", "embedding"),
    "norm": ("tokens", "norm.weight"),
}
FACTORED = ("pi", "none")


class Row(NamedTuple):
    """A structure and what it promises.

    matrix       (state, λ, split) -> the dense matrix that `solve` inverts, written out from the state
    splits       the splits that it knows (one, when the split has no meaning)
    damps        whether λ does anything
    means        whether the moments of a batch are the mean of those of its parts (False is checked too)
    exact        whether it is F wherever F is one Kronecker product ("product"), or always ("always")
    below        the row that it is never worse than, ‖F − F̂‖ in Frobenius norm
    short        the same structure with few iterations: a compiler unrolls them all
    """

    structure: Structure
    matrix: Callable[[Any, float, str], Tensor]
    splits: tuple[str, ...] = ("exact",)
    damps: bool = True
    means: bool = True
    exact: str = ""
    below: str = ""
    short: Structure | None = None


def identity(state: Any, damping: float, split: str) -> Tensor:
    del damping, split
    return torch.eye(int(state.size), dtype=torch.float64)


def diagonal(state: Any, damping: float, split: str) -> Tensor:
    del split
    return torch.diag(state.squares.flatten() + damping)


def product(state: Any, damping: float, split: str) -> Tensor:
    a, g, t = merged(state)
    return oracles.damped(densify(a), densify(g), float(t), damping, split)


def eigen(state: Any, damping: float, split: str) -> Tensor:
    del split
    u = oracles.kron(*(densify(x).contiguous() for x in (state.bases.g, state.bases.a)))
    return (u * (state.scalings.flatten() + damping)) @ u.T


def nearest(state: Any, damping: float, split: str) -> Tensor:
    return oracles.damped(state.r[0], state.s[0], 1.0, damping, split)


def terms(state: Any, damping: float, split: str) -> Tensor:
    """Two terms, the first one damped; what the second takes away relative to the first is floored at 0.1, and at λ."""
    return summed(state.r, state.s, damping, split)


def summed(r: Tensor, s: Tensor, damping: float, split: str) -> Tensor:
    if r.ndim == 4:
        return torch.block_diag(*(summed(*pair, damping, split) for pair in zip(r.unbind(1), s.unbind(1), strict=True)))
    lower = torch.linalg.cholesky(oracles.damped(r[0], s[0], 1.0, damping, split))
    half = torch.linalg.solve_triangular(lower, oracles.kron(s[1], r[1]), upper=False)
    values, basis = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.T, upper=False))
    k = torch.linalg.solve_triangular(lower.T, basis, upper=True)
    floor = (damping * k.square().sum(0)).clamp(min=0.1)
    back = torch.linalg.inv(k)
    return back.T @ (torch.maximum(1 + values, floor)[:, None] * back)


def corrected(state: Any, damping: float, split: str) -> Tensor:
    a, g, t = merged(state.kronecker)
    r, s = (torch.stack([x, y[0]]) for x, y in zip((t * densify(a), densify(g)), state.correction, strict=True))
    return summed(r, s, damping, split)


def exact(state: Any, damping: float, split: str) -> Tensor:
    del split
    left, right = (x[0] for x in state.rows)
    m = torch.einsum("vbs...o,vbs...i->vb...oi", left, right.expand(left.shape[0], *right.shape[1:]))
    m = m.flatten(0, 1).flatten(1)
    return m.T @ m + damping * torch.eye(m.shape[1], dtype=m.dtype)


def rooted(state: Any, damping: float, split: str) -> Tensor:
    """Converged roots: the damped factors as far as the structure of the roots sees them."""
    return product(state.factors, damping, split)


def adaptively_rooted(state: Any, damping: float, split: str) -> Tensor:
    del damping, split
    k, c = (densify(root) for root in state.roots)
    return merged(state.factors)[2] * oracles.kron(torch.linalg.inv(c @ c.mT), torch.linalg.inv(k @ k.mT))


C = kf.curvature
SPLITS = (*FACTORED, "exact")
ROWS = {
    "identity": Row(C.identity(), identity, damps=False),
    "diagonal": Row(C.diagonal(), diagonal),
    "kronecker": Row(C.kronecker(), product, SPLITS, exact="product"),
    "kronecker eigh": Row(C.kronecker("eigh"), product, SPLITS, exact="product"),
    "kronecker sua": Row(C.kronecker(sua=True), product, SPLITS),
    "kronecker input": Row(C.kronecker(sides="input"), product, SPLITS),
    "kronecker blocks": Row(C.kronecker(max_dim=3), product, SPLITS),
    "kronecker diagonal": Row(C.kronecker(max_dim=3, oversize="diagonal"), product, SPLITS),
    "kronecker centred": Row(C.kronecker(centred=True), product, SPLITS),
    "eigen": Row(C.eigen(), eigen, exact="product", below="kronecker"),
    "eigen iteration": Row(C.eigen("intra_batch", basis="iteration"), eigen, exact="product", below="kronecker"),
    "eigen mean_gradient": Row(C.eigen("mean_gradient"), eigen, means=False),
    "eigen sua": Row(C.eigen(sua=True), eigen, below="kronecker sua"),
    "kpsvd": Row(C.kpsvd(), nearest, SPLITS, exact="product", below="kronecker", short=C.kpsvd(iterations=2)),
    "deflation": Row(C.deflation(), terms, FACTORED, exact="product", below="kpsvd", short=C.deflation(iterations=2)),
    "corrected": Row(
        C.corrected(), corrected, FACTORED, exact="product", below="kronecker", short=C.corrected(iterations=2)
    ),
    "lanczos": Row(C.lanczos(), terms, FACTORED, exact="product", below="kronecker", short=C.lanczos(steps=2)),
    "inverse_free": Row(C.inverse_free(), rooted, FACTORED, exact="product", short=C.inverse_free(warm_steps=2)),
    "inverse_free lower": Row(
        C.inverse_free("lower_triangular"),
        rooted,
        FACTORED,
        exact="product",
        short=C.inverse_free("lower_triangular", warm_steps=2),
    ),
    "inverse_free blocks": Row(
        C.inverse_free("block_diagonal", block_size=3),
        rooted,
        FACTORED,
        short=C.inverse_free("block_diagonal", block_size=3, warm_steps=2),
    ),
    "inverse_free diagonal": Row(
        C.inverse_free("diagonal"), rooted, FACTORED, short=C.inverse_free("diagonal", warm_steps=2)
    ),
    "inverse_free adaptive": Row(
        C.inverse_free(adaptive=True), adaptively_rooted, short=C.inverse_free(adaptive=True, warm_steps=2)
    ),
    "block_diagonal": Row(C.block_diagonal(), exact, means=False, exact="always", below="deflation"),
}


@cache
def block_of(name: str) -> Block:
    case, block = BLOCKS[name]
    return measured(CASES[case])[block]


def fits(row: Row, block: Block) -> bool:
    """Whether a structure can be used for a block."""
    return block.layout.matrix or not row.structure.matrix


def shape_of(block: Block) -> torch.Size:
    """The shape of V."""
    return C.diagonal().measure(block).squares.shape


# ------------------------------------------------------------------ adversarial layers


def _dead(block: Block) -> Block:
    """No gradient reaches any output."""
    return block._replace(uses=tuple(use._replace(grads=0 * vectors(use)) for use in block.uses))


def _one_dead(block: Block) -> Block:
    """No gradient reaches the first output, and the second feature is never active."""
    (use,) = block.uses
    grads, inputs = vectors(use).clone(), use.inputs.clone()
    grads[..., 0], inputs[..., 1] = 0, 0
    return block._replace(uses=(use._replace(grads=grads, inputs=inputs),))


def _unequal(block: Block) -> Block:
    """Gradients 1e-4 and activations 1e4 times as large."""
    return block._replace(
        uses=tuple(use._replace(grads=1e-4 * vectors(use), inputs=1e4 * use.inputs) for use in block.uses)
    )


def _opposed(block: Block) -> Block:
    """Two kinds of examples that excite opposite corners: far from any Kronecker product."""
    (use,) = block.uses
    grads, inputs = vectors(use).clone(), use.inputs.clone()
    grads[:, ::2, 0], grads[:, 1::2, 1], inputs[::2, 0], inputs[1::2, 1] = 30, 30, 0.01, 40
    return block._replace(uses=(use._replace(grads=grads, inputs=inputs),))


def _one_example(case: Case) -> dict[str, Block]:
    return measured(subset(case, 0, 1))


ADVERSARIAL = {
    "dead": _dead(block_of("conv")),
    "one unit dead": _one_dead(block_of("linear")),
    "unequal scales": _unequal(block_of("conv")),
    "opposed": _opposed(block_of("linear")),
    "one example": _one_example(CASES["mlp"])["first.w"],
    "one image": _one_example(CASES["conv"])["first.weight"],
}
