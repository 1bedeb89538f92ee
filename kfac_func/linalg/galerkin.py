r"""The coarse problem of a two-level method: R₀ has a few vectors z_k as rows, each on the coordinates of its block.

    F_c = R₀ (F + λI) R₀ᵀ        u_k[m] = ⟨z_k, V_m⟩        (R₀FR₀ᵀ)[k, k'] = u_k · u_k'        (R₀F)_k = Σ_m u_k[m] V_m

1/√N is in V_m. Vectors are dictionaries by block name of [k, *shape], with the shape of the block's V; K counts the
vectors of all blocks, by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kfac_func._tracing import readable
from kfac_func._tree import storable
from kfac_func.blocks import CrossFactors, Pairs
from kfac_func.linalg.gram import combinations, onto

Vectors: TypeAlias = dict[str, Tensor]


class Coarse(NamedTuple):
    """R₀FR₀ᵀ [K, K], a mean over examples, and R₀F as [K, *shape] by block (() where nobody asks for it)."""

    matrix: Tensor
    products: Any = ()


storable(Coarse, CrossFactors)


def restricted(zs: Vectors, vs: Vectors) -> Tensor:
    """R₀ v [K]; blocks that are not given are zero."""
    return torch.cat(
        [
            zs[name].flatten(1) @ vs[name].to(zs[name].dtype).flatten()
            if name in vs
            else zs[name].new_zeros(len(zs[name]))
            for name in sorted(zs)
        ]
    )


def prolonged(zs: Vectors, c: Tensor) -> Vectors:
    """R₀ᵀ c by block, for c [K]."""
    names = sorted(zs)
    parts = c.split([len(zs[name]) for name in names])
    return {name: torch.einsum("k,k...->...", part, zs[name]) for name, part in zip(names, parts, strict=True)}


def hits(rows: dict[str, Pairs], vs: Vectors) -> Tensor:
    """Σ_l ⟨v_l, V_{l,m}⟩ for every output vector and example m, [V, B]."""
    found = [onto(rows[name], v.unsqueeze(-1) if v.ndim == 1 else v) for name, v in vs.items()]
    return torch.stack(found).sum(0)


def seen(rows: dict[str, Pairs], zs: Vectors) -> Tensor:
    """u [K, V, B]."""
    return torch.stack([hits({name: rows[name]}, {name: z}) for name in sorted(zs) for z in zs[name]])


def measured(rows: dict[str, Pairs], zs: Vectors, products: bool) -> Coarse:
    """What F does to the vectors."""
    u = seen(rows, zs)
    matrix = torch.einsum("kvb,lvb->kl", u, u)
    if not products:
        return Coarse(matrix)
    return Coarse(matrix, {name: combinations(part, u) for name, part in rows.items()})


def weighed(products: Vectors, vs: Vectors) -> Tensor:
    """R₀ F v [K], from R₀F."""
    found = [(products[name].flatten(1) @ v.to(products[name].dtype).flatten()) for name, v in vs.items()]
    return torch.stack(found).sum(0)


# ------------------------------------------------------------------ F_c and its inverse


def coarse_matrix(found: Coarse | CrossFactors, zs: Vectors, damping: dict[str, Tensor]) -> Tensor:
    """F_c = R₀FR₀ᵀ + R₀ΛR₀ᵀ [K, K], symmetric; Λ = λ_l on block l."""
    matrix = found.matrix if isinstance(found, Coarse) else found.positions * found.a * found.g
    flat = [(damping[name].to(matrix.dtype), zs[name].flatten(1)) for name in sorted(zs)]
    return matrix + torch.block_diag(*(own * (z @ z.mT) for own, z in flat))


def inverse(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric positive semi-definite F_c [K, K] by Cholesky, scaled to a unit diagonal before.

    Named fallback, "pseudo-inverse": where that fails (vectors that depend on one another, or are zero; cross factors
    that are not definite) by eigh without the eigenvalues that are not positive beyond rounding. R₀ᵀF_c⁺R₀ does not
    depend on how dependent vectors are written.
    """
    d = matrix.diagonal()
    s = torch.where(d > 0, d, torch.inf).rsqrt()
    scales = s * s.unsqueeze(-1)
    unit = matrix * scales + torch.diag((d <= 0).to(d.dtype))
    noise = 10 * len(d) * torch.finfo(d.dtype).eps
    lower, info = torch.linalg.cholesky_ex(unit.detach())
    good = (info == 0) & (lower.diagonal().square().amin() > noise)
    if readable(good) and good:
        found = torch.cholesky_inverse(torch.linalg.cholesky_ex(unit)[0])
    else:  # each way gets a matrix that it can differentiate where the other one is taken
        plain = torch.diag(torch.arange(1, len(d) + 1, dtype=d.dtype, device=d.device))
        found = torch.cholesky_inverse(torch.linalg.cholesky_ex(torch.where(good, unit, plain))[0])
        found = torch.where(good, found, _pseudo_inverse(torch.where(good, plain, torch.nan_to_num(unit)), noise))
    return torch.where(matrix.isfinite().all(), (found + found.mT) / 2 * scales, torch.nan)


def _pseudo_inverse(matrix: Tensor, noise: float) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    kept = values > noise * values[-1:]
    return (basis * torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)) @ basis.mT
