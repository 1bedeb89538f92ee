"""Eigenvalues and eigenvectors by Krylov spaces."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func._tree import storable
from kfac_func._typing import Progress, PyTree
from kfac_func.linalg.eigenpairs import Which, eigenpairs
from kfac_func.linalg.tridiagonal import ritz, tridiagonal
from kfac_func.spectra.flat import MatVec, flattened, known, positive


class Lanczos(NamedTuple):
    """Ritz values θ [m], ascending; weights [m] ≥ 0 of the start's spectral measure, Σ = 1; residual norms [m];
    vectors, a tree with leading m, or None; T = tridiag(off_diagonal, diagonal, off_diagonal), [m] and [m-1]; the
    dimension of the Krylov space; and whether it is invariant, so that every θ is an eigenvalue.
    """

    values: Tensor
    weights: Tensor
    residuals: Tensor
    vectors: PyTree
    diagonal: Tensor
    off_diagonal: Tensor
    steps: Tensor
    exhausted: Tensor


class Eigenpairs(NamedTuple):
    """Values [k], the wanted end first; vectors of norm 1, a tree like the parameters with leading k; residual norms
    ‖A x − θ x‖ [k]; whether each meets the tolerance [k].
    """

    values: Tensor
    vectors: PyTree
    residuals: Tensor
    converged: Tensor


storable(Lanczos, Eigenpairs)


def lanczos(
    matvec: MatVec,
    like: PyTree,
    steps: int,
    *,
    generator: torch.Generator,
    vectors: bool = False,
    progress: Progress | None = None,
) -> Lanczos:
    r"""Tridiagonalise a symmetric operator from a random start.

        A V = V T + β_m v_{m+1} e_mᵀ,   VᵀV = I,   T = tridiag(β, α, β) = U diag(θ) Uᵀ        Ritz vectors  x_j = V U_j

    matvec     v -> A v on trees like the parameters; P entries in all, units of A
    like       the parameters, or any tree with their structure, shapes, dtypes and devices (values are not used)
    steps      m ≤ P at most, one product each; memory m P
    generator  draws the start (standard normal, scaled to norm 1), on its own device
    vectors    whether to return the Ritz vectors
    progress   wraps the loop over steps, as `tqdm.tqdm` does

    V is fully re-orthogonalised. The loop ends early when the Krylov space is exhausted (`exhausted`): after
    r + 1 steps for an operator of rank r < P, and with one copy of each eigenvalue. `residuals[j]` bounds the distance
    of θ_j from the nearest eigenvalue. Composes with torch.func; under vmap the loop cannot end early, and what follows
    an exhausted space has weight 0 and vector 0.

    Raises HyperparameterError for steps < 1, an operator that is not symmetric, products that are not finite and a
    `like` without parameters; TreeMismatchError where matvec returns another tree.
    Source: Golub & Van Loan 2013, Matrix Computations, §10.1; Golub & Meurant 2010, §3.

        >>> like = {"w": torch.zeros(2), "b": torch.zeros(1)}
        >>> found = kf.spectra.lanczos(
        ...     lambda v: {"w": 2 * v["w"], "b": v["b"]}, like, 3, generator=torch.Generator().manual_seed(0)
        ... )
        >>> [round(value, 4) for value in found.values.tolist()], bool(found.exhausted)
        ([1.0, 2.0], True)
    """
    at_least(1, steps=steps)
    flat = flattened(matvec, like, generator)
    found = tridiagonal(flat.products, flat.normals(1), min(steps, flat.size), flat.symmetry, progress)
    values = ritz(found)
    lifted = flat.tree(values.rotation[0].mT @ found.basis[0]) if vectors else None
    return Lanczos(
        values.values[0],
        values.weights[0],
        values.residuals[0],
        lifted,
        found.alpha[0],
        found.beta[0, :-1],
        found.steps[0],
        found.beta[0, -1] == 0,
    )


def top_eigenpairs(
    matvec: MatVec,
    like: PyTree,
    k: int,
    *,
    generator: torch.Generator,
    which: Which = "largest",
    tolerance: float = 1e-5,
    max_steps: int = 100,
    block: int | None = None,
    room: int | None = None,
    chunk_size: int | None = 1,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""The k largest eigenvalues of a symmetric operator with their eigenvectors, by a block Krylov space.

        A x_j = θ_j x_j + r_j,   ‖x_j‖ = 1,   converged where ‖r_j‖ ≤ tolerance · max |θ|

    matvec      v -> A v on trees like the parameters; P entries in all, units of A
    like        the parameters, or any tree with their structure, shapes, dtypes and devices (values are not used)
    k           pairs wanted, at most P
    generator   draws the b starts (standard normal), on its own device
    which       "largest", "smallest" (slow where that end is crowded, as at 0 for a GGN) or "magnitude"
    tolerance   of the residuals, relative to the largest |θ|; an eigenvalue lies within ‖r_j‖ of θ_j
    max_steps   block products at most (b products each); at least ⌈k/b⌉ are made
    block       b, k by default: sees b copies of a repeated eigenvalue; 1 needs the fewest products
    room        vectors kept before a restart, at least k + b, default max(3 k + 2 b, 40); memory 2 room P
    chunk_size  products under one torch.func.vmap; 1 loops without it, None takes a block at once
    progress    wraps the loop over steps, as `tqdm.tqdm` does; it ends early at convergence

    What has not converged is returned with its residual and `converged` False. Vectors are one tree whose leaves have
    a leading dimension k; signs are arbitrary.

    Raises HyperparameterError for k < 1 or k > P, an unknown `which`, tolerance ≤ 0, max_steps, block or chunk_size
    < 1, room < k + b, an operator that is not symmetric, products that are not finite and a `like` without parameters;
    TreeMismatchError where matvec returns another tree.
    Sources: Wu & Simon 2000, Thick-restart Lanczos; Zhou & Saad 2008, block Krylov-Schur, §2.

        >>> like = {"w": torch.zeros(3)}
        >>> top = kf.spectra.top_eigenpairs(
        ...     lambda v: {"w": torch.tensor([3.0, 1.0, 2.0]) * v["w"]},
        ...     like,
        ...     2,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> [round(value, 4) for value in top.values.tolist()], top.vectors["w"].shape, top.converged.tolist()
        ([3.0, 2.0], torch.Size([2, 3]), [True, True])
    """
    at_least(1, k=k, max_steps=max_steps, block=block)
    known("end of the spectrum", which, get_args(Which))
    positive(tolerance=tolerance)
    flat = flattened(matvec, like, generator, chunk_size)
    if k > flat.size:
        raise HyperparameterError(explain("k exceeds the number of eigenvalues.", got=k, wanted=f"at most {flat.size}"))
    b = min(block or k, flat.size)
    room = max(3 * k + 2 * b, 40) if room is None else room
    at_least(k + b, room=room)
    found = eigenpairs(
        flat.products,
        flat.normals(b),
        k,
        which=which,
        tolerance=tolerance,
        max_steps=max_steps,
        room=room,
        symmetry=flat.symmetry,
        progress=progress,
    )
    return Eigenpairs(found.values, flat.tree(found.vectors), found.residuals, found.converged)
