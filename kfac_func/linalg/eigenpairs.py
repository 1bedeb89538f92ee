r"""Extreme eigenpairs of a symmetric operator on rows, by a block Krylov space with thick restarts.

    H = V A Vᵀ = Y diag(θ) Yᵀ        x_j = Y_jᵀ V        r_j = A x_j − θ_j x_j        V ← [V; orth(r_1 … r_b)]

All residuals of a Krylov space lie in one block, so that expanding by those of the best b pairs gives the next Krylov
space, also after a restart that keeps Ritz vectors only. A V is kept beside V: residuals cost no product. A block of b
random vectors sees b copies of a repeated eigenvalue; a single one would see one.
Sources: Wu & Simon 2000, Thick-restart Lanczos; Zhou & Saad 2008, block Krylov-Schur, §2.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kfac_func._tracing import readable
from kfac_func._typing import Progress
from kfac_func.linalg.inner import inner, norm, orthonormal
from kfac_func.linalg.tridiagonal import Rows, require_symmetric

Which = Literal["largest", "smallest", "magnitude"]
"""Which end of the spectrum comes first."""


class Pairs(NamedTuple):
    """Values [k], the wanted end first; unit vectors [k, P]; ‖A x − θ x‖ [k]; whether that meets the tolerance [k]."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k p"]
    residuals: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]


class Space(NamedTuple):
    """Orthonormal rows V [m, P], their images V A [m, P] and H = V A Vᵀ [m, m]."""

    basis: Tensor
    images: Tensor
    projected: Tensor


class Best(NamedTuple):
    """The Ritz pairs of a space in the wanted order: θ [m], Y [m, m], and of the first few x and r [., P]."""

    values: Tensor
    rotation: Tensor
    vectors: Tensor
    residuals: Tensor


def eigenpairs(
    products: Rows,
    start: Float[Tensor, "b p"],
    k: int,
    *,
    which: Which,
    tolerance: float,
    max_steps: int,
    room: int,
    symmetry: float,
    progress: Progress | None = None,
) -> Pairs:
    """The first k pairs by at most max(max_steps, ⌈k/b⌉) block products; V has at most `room` ≥ k + b rows, or P.

    Ends where every ‖r_j‖ ≤ tolerance · max |θ|, if that can be read. Raises HyperparameterError where H is not
    symmetric.
    """
    b, p = start.shape
    empty = start.new_zeros(0, p)
    space = _extended(products, Space(empty, empty, start.new_zeros(0, 0)), start, symmetry)
    best = _best(space, which, max(k, b))
    for _ in (progress or iter)(range(max(max_steps, -(-k // b)) - 1)):
        done = _converged(best, tolerance)
        if len(space.basis) == p or (len(space.basis) >= k and readable(done) and bool(done[:k].all())):
            break
        late_first = torch.argsort(done, stable=True)[:b]
        if len(space.basis) + b > room < p:
            space = _restarted(space, best, (room - b + k) // 2)
        space = _extended(products, space, best.residuals[late_first][: p - len(space.basis)], symmetry)
        best = _best(space, which, max(k, b))
    return Pairs(best.values[:k], best.vectors[:k], norm(best.residuals)[:k], _converged(best, tolerance)[:k])


def _best(space: Space, which: Which, count: int) -> Best:
    values, rotation = torch.linalg.eigh(space.projected)
    order = torch.argsort({"largest": -values, "smallest": values, "magnitude": -values.abs()}[which], stable=True)
    values, rotation = values[order], rotation[:, order]
    first = rotation[:, :count].mT
    vectors = first @ space.basis
    return Best(values, rotation, vectors, first @ space.images - values[:count].unsqueeze(-1) * vectors)


def _converged(best: Best, tolerance: float) -> Tensor:
    return norm(best.residuals) <= tolerance * best.values.abs().amax()


def _restarted(space: Space, best: Best, keep: int) -> Space:
    """The best Ritz vectors in place of the basis."""
    first = best.rotation[:, :keep].mT
    return Space(first @ space.basis, first @ space.images, torch.diag(best.values[:keep]))


def _extended(products: Rows, space: Space, rows: Tensor, symmetry: float) -> Space:
    new = _directions(rows, space.basis)
    images = products(new)
    across, corner = inner(new, space.images), inner(new, images)
    scale = torch.cat([norm(images), space.projected.diagonal().abs()]).amax()
    require_symmetric(torch.cat([across - inner(images, space.basis), corner - corner.mT], 1), scale, symmetry)
    top = torch.cat([space.projected, across.mT], 1)
    bottom = torch.cat([across, (corner + corner.mT) / 2], 1)
    return Space(torch.cat([space.basis, new]), torch.cat([space.images, images]), torch.cat([top, bottom]))


def _directions(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows that extend the basis by the span of `rows`; directions are made up where that is too small."""
    norms = norm(rows).unsqueeze(-1)
    rows = rows / torch.where(norms > 0, norms, 1.0)
    rows, _ = orthonormal(rows - rows @ basis.mT @ basis)
    for _ in range(2):  # what the first pass found among rounding errors may lie in the basis
        rows, _ = orthonormal(rows - inner(rows, basis) @ basis)
    return rows
