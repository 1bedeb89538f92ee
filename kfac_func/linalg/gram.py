r"""The exact curvature of rows and its damped inverse, by the Gram matrix of all examples; F is never formed.

    F = M Mᵀ,   M = [vec V_1 … vec V_K],   V_m = Σ_t left[m,t] right[m,t]ᵀ             m = (output vector, example)

    (F + Λ)⁻¹ u = Λ⁻¹ [u − M (I + MᵀΛ⁻¹M)⁻¹ MᵀΛ⁻¹ u]                                    Λ = λ_l on block l

    (MᵀM)[m, m'] = Σ_{t,t'} (right[m,t]·right[m',t']) (left[m,t]·left[m',t'])           1/√N is in left

Sources: the identity of Sherman, Morrison and Woodbury; Ren & Goldfarb 2019 (1906.02353).
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, StateError, explain
from kfac_func._tracing import readable, without_autocast
from kfac_func._tree import leaves, storable, tree_map
from kfac_func.blocks.pairs import BUDGET, Pairs, chunks, matrices

Rule = Literal["standard", "heuristic"]
"""λ_l = λ, or λ_l = λ σ₁(A) + λ σ₁(G) + λ²."""


class Sizes(NamedTuple):
    """What a batch says at first of its rows: means over examples of Σ left² and Σ right², 0-dim."""

    left: Tensor
    right: Tensor


class Window(NamedTuple):
    """The last batches, newest first: their rows, left [window, V, B, S, (q), o] and right [window, V or 1, B, S,
    (q), i] (a dictionary of them by block name for all blocks together), and their weights [window] in the moving
    average, 0 where there was no batch yet.
    """

    rows: Any
    weights: Tensor


class Woodbury(NamedTuple):
    """The rows and λ_l of every block, and the Cholesky factor [K, K] of I + Σ_l M_lᵀM_l/λ_l."""

    rows: dict[str, Pairs]
    damping: dict[str, Tensor]
    lower: Tensor


storable(Sizes, Window, Woodbury)


def known_rule(rule: str) -> None:
    """Raise HyperparameterError for an unknown rule of damping."""
    if rule not in get_args(Rule):
        raise HyperparameterError(
            explain("unknown rule of damping.", got=repr(rule), wanted=" or ".join(map(repr, get_args(Rule))))
        )


# ------------------------------------------------------------------ the rows of the last batches


def sizes(rows: Pairs) -> Sizes:
    """The mean squares of the rows."""
    return Sizes(rows.left.square().sum(), rows.right.square().sum() / rows.right.shape[1])


def shifted(old: Any, new: Any, fraction: Tensor, window: int) -> Window:
    """The window with one more batch in front. F̂ = Σ_k w_k F_k / Σ_k w_k with the weights of the moving average: the
    new one has `fraction`, the old ones keep 1 − fraction of theirs; with fraction 0 nothing changes.

    Raises StateError for batches of different sizes, unless the window holds one batch and `fraction` can be read.
    """
    if old == ():
        empty = tree_map(lambda x: x.new_zeros(window, *x.shape), new)
        old = Window(empty, leaves(new)[0].new_zeros(window))
    same = all(x.shape == kept.shape[1:] for x, kept in zip(leaves(new), leaves(old.rows), strict=True))
    if not same and (window > 1 or not readable(fraction)):
        raise StateError(
            explain(
                "batches of different sizes cannot be kept in one window.",
                got=[list(x.shape) for x in leaves(new)[:2]],
                wanted=[list(x.shape[1:]) for x in leaves(old.rows)[:2]],
                options="keep the batch size (and the number of output vectors); window=1 may change it, but not under "
                "vmap or torch.compile",
            )
        )
    f = fraction.to(old.weights)
    weights = torch.cat([f.reshape(1), (1 - f) * old.weights[:-1]])
    rows = tree_map(lambda x, kept: _in_front(x.to(kept.dtype), kept), new, old.rows)
    if not same:
        return Window(rows, weights) if fraction > 0 else old
    return tree_map(lambda x, kept: torch.where(fraction > 0, x, kept), Window(rows, weights), old)


def _in_front(x: Tensor, kept: Tensor) -> Tensor:
    return x.unsqueeze(0) if len(kept) == 1 else torch.cat([x.unsqueeze(0), kept[:-1]])


def joined(rows: Pairs, weights: Tensor) -> Pairs:
    """The rows of F̂ = Σ_k w_k F_k / Σ_k w_k, all batches as one: [V, window · B, ...]."""
    left = rows.left * _along(_shares(weights).sqrt(), rows.left)
    return Pairs(*(x.transpose(0, 1).flatten(1, 2) for x in (left, rows.right)))


def _shares(weights: Tensor) -> Tensor:
    total = weights.sum()
    return weights / torch.where(total > 0, total, 1.0)


def _along(numbers: Tensor, x: Tensor) -> Tensor:
    """Numbers for the leading dimensions of x, ready to be multiplied with it."""
    return numbers[(..., *[None] * (x.ndim - numbers.ndim))]


def ruled(rows: Pairs, weights: Tensor, damping: Tensor, rule: str) -> Tensor:
    """λ_l of a block: λ, or λ σ₁(A) + λ σ₁(G) + λ² with the largest eigenvalues of its Kronecker factors.

    A = 1/(N T) Σ ā āᵀ and G = 1/(N T) Σ g gᵀ over the rows of the window; A = 1 for a vector block.
    """
    damping = damping.to(weights.dtype)
    if rule == "standard":
        return damping
    share, (vectors, examples, positions) = _shares(weights), rows.right.shape[1:4]
    a = _largest(rows.right * _along((share / (vectors * examples * positions)).sqrt(), rows.right))
    g = _largest(rows.left * _along((share / positions).sqrt(), rows.left))
    return damping * a + damping * g + damping**2


def _largest(rows: Tensor) -> Tensor:
    """The largest eigenvalue of Σ row rowᵀ (of any group), by the smaller of the two Gram matrices."""
    x = rows.flatten(0, 3)
    x = x.movedim(1, 0) if x.ndim == 3 else x
    return torch.linalg.eigvalsh(x.mT @ x if x.shape[-1] <= x.shape[-2] else x @ x.mT).amax()


# ------------------------------------------------------------------ M without M


def columns(rows: Pairs) -> Tensor:
    """Mᵀ as a dense matrix [K, p], row-major vec(V): the oracle."""
    return matrices(rows).flatten(2).flatten(0, 1)


def onto(rows: Pairs, v: Tensor) -> Tensor:
    """Mᵀ vec(V) as [V, B], for V [(q), o, i]."""
    return (torch.einsum("vbs...i,...oi->vbs...o", rows.right, v) * rows.left).flatten(2).sum(-1)


def combined(rows: Pairs, y: Tensor) -> Tensor:
    """M y = Σ_m y_m V_m [(q), o, i], for y [V, B]."""
    left = rows.left * _along(y, rows.left)
    left = left.sum(0, keepdim=True) if rows.right.shape[0] == 1 else left
    return torch.einsum("vbs...o,vbs...i->...oi", left, rows.right)


def combinations(rows: Pairs, ys: Tensor) -> Tensor:
    """M y for several y [K, V, B], as [K, (q), o, i]: from rows, or from the matrices V_m where many positions share
    one; memory stays bounded.
    """
    if rows.left.shape[2] == 1:
        size = max(1, BUDGET // rows.left.numel())
        return torch.func.vmap(combined, (None, 0), chunk_size=size)(rows, ys)
    shape, parts = (*rows.left.shape[3:], rows.right.shape[-1]), list(chunks(rows))
    pieces = ys.split([part.left.shape[1] for part in parts], dim=2)
    found = [piece.flatten(1) @ columns(part) for piece, part in zip(pieces, parts, strict=True)]
    return torch.stack(found).sum(0).reshape(-1, *shape)


@without_autocast
def gram(rows: Pairs, other: Pairs | None = None) -> Tensor:
    """MᵀM [K, K], or MᵀM' [K, K'] with the rows of other examples: from products of rows or from the matrices V_m,
    whichever costs less; memory stays bounded.
    """
    other = rows if other is None else other
    sides, (o, i) = (rows, other), (rows.left.shape[-1], rows.right.shape[-1])
    lefts, rights = ([x.shape[:3].numel() for x in parts] for parts in zip(*sides, strict=True))  # V · B · S
    columns = [side.left.shape[:2].numel() for side in sides]
    if not all(x.numel() for side in sides for x in side):  # a layer without inputs or without outputs
        return rows.left.new_zeros(columns)
    by_rows = prod(rights) * i + prod(lefts) * (o + 1)
    by_matrices = (lefts[0] if other is rows else sum(lefts)) * o * i + prod(columns) * o * i
    return (_by_rows if by_rows <= by_matrices else _by_matrices)(*sides).reshape(columns)


@without_autocast
def summed_gram(rows: Pairs, other: Pairs | None = None) -> Tensor:
    """Σ_v ⟨V_{v,n}, V'_{v,m}⟩ [B, B'], from products of rows or from the matrices V_m, as `gram`."""
    if rows.right.shape[0] == 1:  # V_{1,n} … V_{V,n} below each other are one tall matrix with the same right rows
        return gram(_tall(rows), None if other is None else _tall(other))
    other = rows if other is None else other
    return sum(map(gram, _one_by_one(rows), _one_by_one(other)), start=rows.left.new_zeros(()))


def _tall(rows: Pairs) -> Pairs:
    """[V, B, S, (q), o] as [1, B, S, (q), V·o]."""
    left = rows.left if rows.left.shape[0] == 1 else rows.left.movedim(0, -2).flatten(-2).unsqueeze(0)
    return Pairs(left, rows.right)


def _one_by_one(rows: Pairs) -> list[Pairs]:
    return [Pairs(*sides) for sides in zip(rows.left.split(1), rows.right.split(1), strict=True)]


@without_autocast
def squared_norms(rows: Pairs) -> Tensor:
    """‖V_m‖² as [V, B], the diagonal of MᵀM: from rows, |left|² |right|² for one position, Σ_{t,t'} (left_t·left_t')
    (right_t·right_t') for several; or from the matrices V_m, whichever costs less; memory stays bounded.
    """
    vectors, shared, s = rows.left.shape[0], rows.right.shape[0], rows.left.shape[2]
    o, i = rows.left.shape[-1], rows.right.shape[-1]
    if s == 1:
        left, right = (torch.einsum("...d,...d->...", x, x) for x in rows)
        return (left * right).flatten(2).sum(-1)
    if vectors * s * s * (o + 1) + shared * s * s * i <= vectors * (s + 1) * o * i:
        parts = chunks(rows, s * rows.left.shape[2:-1].numel())
        return torch.cat([_met(part).flatten(2).sum(-1) for part in parts], dim=1)
    return torch.cat([matrices(part).square().flatten(2).sum(-1) for part in chunks(rows)], dim=1)


def _met(rows: Pairs) -> Tensor:
    left, right = (torch.einsum("vbs...d,vbt...d->vb...st", x, x) for x in rows)
    return left * right


def _by_rows(rows: Pairs, other: Pairs) -> Tensor:
    """Some examples against some others at a time, [V, B, V', B']."""
    strips = []
    for part in chunks(rows, rows.left.shape[2] * other.left[..., 0].numel()):
        others = chunks(other, other.left.shape[2] * part.left[..., 0].numel())
        strips.append(torch.cat([_products(part, two) for two in others], dim=3))
    return torch.cat(strips, dim=1)


def _products(one: Pairs, two: Pairs) -> Tensor:
    left, right = (torch.einsum("vbs...d,wct...d->vbwc...st", x, y) for x, y in zip(one, two, strict=True))
    return (left * right).flatten(4).sum(-1)


def _by_matrices(rows: Pairs, other: Pairs) -> Tensor:
    """Some rows of all V_m at a time, [K, K']."""
    most = max(side.left[..., 0].numel() // side.left.shape[2] for side in (rows, other))
    size = max(1, BUDGET // (most * rows.right.shape[-1]))
    found = rows.left.new_zeros(())
    for left, right in zip(rows.left.split(size, dim=-1), other.left.split(size, dim=-1), strict=True):
        part = columns(Pairs(left, rows.right))
        found = found + part @ (part if other is rows else columns(Pairs(right, other.right))).mT
    return found


# ------------------------------------------------------------------ the damped inverse


def woodbury(rows: dict[str, Pairs], damping: dict[str, Tensor]) -> Woodbury:
    """What it takes to solve with F + Λ, for the rows (alike in V and B) and the λ_l > 0 of all blocks.

    I + Σ_l M_lᵀM_l/λ_l is scaled to a unit diagonal before it is factorised. Where that fails in this precision, and
    for λ = 0, the factor has NaN.
    """
    left = next(iter(rows.values())).left
    eye = torch.eye(left.shape[:2].numel(), dtype=left.dtype, device=left.device)
    total = sum((gram(part) / damping[name] for name, part in rows.items()), start=eye)
    root = total.diagonal().sqrt().unsqueeze(-1)
    lower, info = torch.linalg.cholesky_ex(total / root / root.mT)
    return Woodbury(rows, damping, torch.where(info == 0, root * lower, torch.nan))


def solve_woodbury(factored: Woodbury, vs: dict[str, Tensor]) -> dict[str, Tensor]:
    """(F + Λ)⁻¹ u for arrays [(q), o, i] or [p] by block; blocks that are not given have gradient zero."""
    rows, damping, lower = factored
    us = {name: (v.unsqueeze(-1) if v.ndim == 1 else v).to(lower.dtype) for name, v in vs.items()}
    seen = torch.stack([onto(rows[name], u) / damping[name] for name, u in us.items()]).sum(0)
    y = torch.cholesky_solve(seen.reshape(-1, 1), lower).reshape(seen.shape)
    return {name: ((u - combined(rows[name], y)) / damping[name]).reshape(vs[name].shape) for name, u in us.items()}
