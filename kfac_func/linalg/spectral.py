r"""A symmetric operator on the array V of a block, in an orthonormal basis that is a product of two.

    V ↦ U_G [ S ∘ (U_Gᵀ V U_A) ] U_Aᵀ

Whatever is a function of the operator is the same function of S: its inverse, its roots, its logarithm. The action on
per-example gradients V_n = Σ_s left[n,s] right[n,s]ᵀ is computed from their rows, so that no V_n is formed where S = 1
(one shared position), and only some at a time elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_func._tree import storable
from kfac_func.blocks import Diagonal, Factor, Pairs, chunks, densify, matrices, rotated, transpose
from kfac_func.linalg.kron import kron
from kfac_func.linalg.psd import times


class Spectral(NamedTuple):
    """Bases U_A [(q), i, i] and U_G [(q), o, o] in any form of a factor, and eigenvalues S [(q), o, i].

    S has the shape of V, or [p, 1] for a vector block and for a basis that is no product; V is reshaped to S then.
    """

    a: Factor
    g: Factor
    values: Tensor

    def coordinates(self, v: Tensor) -> Tensor:
        """U_Gᵀ V U_A, of the shape of S."""
        return times(transpose(self.g), v.reshape(self.values.shape), self.a)

    def restored(self, x: Tensor) -> Tensor:
        """U_G X U_Aᵀ: the way back, of the shape of S."""
        return times(self.g, x, transpose(self.a))

    def applied(self, fn: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """fn(operator) V, of the shape of V."""
        return self.restored(fn(self.values) * self.coordinates(v)).reshape(v.shape)

    def dense(self) -> Tensor:
        """The matrix [p, p] on row-major vec(V).

        >>> elementwise(torch.tensor([1.0, 2.0])).dense()
        tensor([[1., 0.],
                [0., 2.]])
        """
        u = kron(densify(self.g), densify(self.a))
        return (u * self.values.flatten()) @ u.mT


storable(Spectral)


def elementwise(values: Tensor) -> Spectral:
    """The operator V ↦ S ∘ V, for S [(q), o, i] or [p].

    >>> elementwise(torch.tensor([2.0, 3.0])).applied(torch.reciprocal, torch.ones(2))
    tensor([0.5000, 0.3333])
    """
    values = values.unsqueeze(-1) if values.ndim == 1 else values
    a, g = (values.new_ones(values.shape[:-2] + values.shape[dim:][:1]) for dim in (-1, -2))
    return Spectral(Diagonal(a), Diagonal(g), values)


def decomposed(matrix: Tensor) -> Spectral:
    """The operator of a symmetric matrix [p, p] on vec(V); negative eigenvalues are cut at 0.

    >>> decomposed(torch.diag(torch.tensor([2.0, -1.0]))).values.flatten()
    tensor([0., 2.])
    """
    values, basis = torch.linalg.eigh(matrix)
    return Spectral(Diagonal(values.new_ones(1)), basis, values.clamp(min=0).unsqueeze(-1))


# ------------------------------------------------------------------ per-example gradients in the basis


def seen_in(spectral: Spectral, rows: Pairs) -> Pairs:
    """The rows of U_Gᵀ V_n U_A, for rows [V, B, S, (q), o] and [V or 1, B, S, (q), i]."""
    if not _fits(spectral, rows):
        flat = matrices(rows).flatten(2).unsqueeze(2)
        rows = Pairs(flat, flat.new_ones(1, flat.shape[1], 1, 1))
    grouped = rows.left.ndim > 4
    return Pairs(rotated(rows.left, spectral.g, grouped), rotated(rows.right, spectral.a, grouped))


def _fits(spectral: Spectral, rows: Pairs) -> bool:
    return spectral.values.shape == (*rows.left.shape[3:], rows.right.shape[-1])


def inner(rows: Pairs, weights: Tensor) -> Tensor:
    """⟨V_{v,n}, W ∘ V_{w,n}⟩ over the output vectors of one example, [B, V, V]; rows as of `seen_in`, W like S.

    >>> inner(Pairs(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 4)), torch.ones(3, 4)).flatten()
    tensor([12., 12.])
    """
    if rows.left.shape[2] > 1:
        parts = (matrices(part).flatten(2) for part in chunks(rows))
        return torch.cat([torch.einsum("vbp,p,wbp->bvw", v, weights.flatten(), v) for v in parts])
    left, right = (side.squeeze(2) for side in rows)
    if right.shape[0] == 1:  # all output vectors share their other side
        met = torch.einsum("b...i,...oi->b...o", right[0].square(), weights)
        return torch.einsum("vb...o,b...o,wb...o->bvw", left, met, left)
    return torch.einsum("vb...o,wb...o,vb...i,wb...i,...oi->bvw", left, left, right, right, weights)


def squared(rows: Pairs, weights: Tensor) -> Tensor:
    """⟨V_{v,n}, W ∘ V_{v,n}⟩ for every output vector and example, [V, B].

    >>> squared(Pairs(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 4)), torch.ones(3, 4))
    tensor([[12., 12.]])
    """
    if rows.left.shape[2] > 1:
        parts = (matrices(part).square().flatten(2) @ weights.flatten() for part in chunks(rows))
        return torch.cat(list(parts), dim=1)
    left, right = (side.squeeze(2).square() for side in rows)
    met = torch.einsum("vb...i,...oi->vb...o", right, weights)
    return (left * met).flatten(2).sum(-1)
