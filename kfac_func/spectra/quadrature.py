r"""Stochastic Lanczos quadrature: spectral density, traces of functions, log-determinant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func._tracing import readable
from kfac_func._tree import storable
from kfac_func._typing import Progress, PyTree, Scalar, shown
from kfac_func.linalg.randomized import Estimate, estimate
from kfac_func.linalg.tridiagonal import ritz, tridiagonal
from kfac_func.spectra.flat import MatVec, flattened, positive

MARGIN = 6.0
"""Widths between the outermost nodes and the ends of the grid: all but 2e-9 of the mass."""


class SpectralDensity(NamedTuple):
    """nodes θ [K, m] and weights [K, m], the quadrature of each of K probes, Σ_j weights = 1; grid [G], the centres of
    equal cells; density [G], per unit of eigenvalue, the mean over each cell: Σ density · (grid[1] − grid[0]) = 1.
    """

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    density: Tensor


storable(SpectralDensity)


def spectral_density(
    matvec: MatVec,
    like: PyTree,
    *,
    generator: torch.Generator,
    probes: int = 10,
    steps: int = 64,
    points: int = 1000,
    width: float | None = None,
    chunk_size: int | None = 1,
    progress: Progress | None = None,
) -> SpectralDensity:
    r"""The density of eigenvalues, (1/P) Σ_i δ(λ − λ_i), smoothed by a Gaussian.

        φ(λ) = (1/K) Σ_k Σ_j w_kj N(λ; θ_kj, width²)        v_kᵀ f(A) v_k / P = Σ_j w_kj f(θ_kj) for deg f < 2m

    matvec      v -> A v on trees like the parameters; P entries in all, units of A
    like        the parameters, or any tree with their structure, shapes, dtypes and devices (values are not used)
    generator   draws the signs v_k = ±1, on its own device
    probes      K, starts
    steps       m ≤ P, products for each; memory chunk_size · m P
    points      G, cells of the grid, from 6 widths below the smallest node to 6 above the largest
    width       of the Gaussian, in units of A; by default 1/100 of the range of nodes, at least ε^⅓ max |θ|
    chunk_size  probes under one torch.func.vmap; 1 loops without it, None takes all at once
    progress    wraps the loop over chunks of probes, as `tqdm.tqdm` does

    Each cell holds the Gaussians' mean over it, so the integral is 1 for every width, also below the size of a cell.
    Where a Krylov space ends early, nodes of weight 0 fill its row.

    Raises HyperparameterError for probes, steps, points or chunk_size < 1, width ≤ 0, an operator that is not
    symmetric, products that are not finite and a `like` without parameters; TreeMismatchError where matvec returns
    another tree.
    Sources: Ghorbani, Krishnan & Xiao 2019 (1901.10159), §2, Algorithms 1-2; Ubaru, Chen & Saad 2017, §3.

        >>> like = {"w": torch.zeros(4)}
        >>> found = kf.spectra.spectral_density(
        ...     lambda v: {"w": torch.tensor([0.0, 0.0, 0.0, 1.0]) * v["w"]},
        ...     like,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> cell = found.grid[1] - found.grid[0]
        >>> [round(float(x), 3) for x in (found.density.sum() * cell, (found.grid * found.density).sum() * cell)]
        [1.0, 0.25]
    """
    at_least(1, points=points)
    positive(width=width)
    nodes, weights, _ = _nodes(matvec, like, generator, probes, steps, chunk_size, progress)
    low, high = nodes.detach().amin(), nodes.detach().amax()
    sigma = (high - low) / 100 if width is None else torch.as_tensor(width).to(nodes)
    tiny = torch.finfo(nodes.dtype).eps ** (1 / 3) * torch.maximum(low.abs(), high.abs())
    sigma = torch.maximum(sigma, torch.where(tiny > 0, tiny, 1.0)) if width is None else sigma
    low, high = low - MARGIN * sigma, high + MARGIN * sigma
    edges = low + (high - low) * torch.linspace(0, 1, points + 1, dtype=nodes.dtype, device=nodes.device)
    below = torch.stack([(weights * torch.special.ndtr((x - nodes) / sigma)).sum(-1).mean() for x in edges])
    density = below.diff() * (points / (high - low))
    return SpectralDensity(nodes, weights, (edges[1:] + edges[:-1]) / 2, density)


def trace_of(
    fn: Callable[[Tensor], Tensor],
    matvec: MatVec,
    like: PyTree,
    *,
    generator: torch.Generator,
    probes: int = 10,
    steps: int = 64,
    chunk_size: int | None = 1,
    progress: Progress | None = None,
) -> Estimate:
    r"""The trace of a function of a symmetric operator, tr f(A) = Σ_i f(λ_i).

        P Σ_j w_kj f(θ_kj) ≈ v_kᵀ f(A) v_k,   E = tr f(A),   mean over k = 1 … K

    fn          f on tensors of eigenvalues, entry by entry
    The other arguments are those of `spectral_density`.

    Returns the estimate and its standard error over probes, 0-dim, in the units of f. The error does not see the bias
    of the quadrature, which falls exponentially with `steps` where f is analytic on the spectrum.

    Raises HyperparameterError for probes < 2, steps or chunk_size < 1, an fn that is not finite at a node, an operator
    that is not symmetric, products that are not finite and a `like` without parameters; TreeMismatchError where matvec
    returns another tree. Source: Ubaru, Chen & Saad 2017, Fast estimation of tr(f(A)) via SLQ, §3.

        >>> like, scales = {"w": torch.zeros(3)}, torch.tensor([1.0, 2.0, 3.0])
        >>> found = kf.spectra.trace_of(
        ...     torch.square, lambda v: {"w": scales * v["w"]}, like, generator=torch.Generator().manual_seed(0)
        ... )
        >>> round(float(found.value), 3)
        14.0
    """
    at_least(2, probes=probes)
    nodes, weights, size = _nodes(matvec, like, generator, probes, steps, chunk_size, progress)
    values = fn(nodes)
    if readable(values) and not bool(values.isfinite().all()):
        worst = float(nodes[~values.isfinite()].min())
        raise HyperparameterError(
            explain(
                "the function is not finite on the spectrum of the operator.",
                got=f"{getattr(fn, '__name__', 'fn')} at the node {worst:.3e}",
                why="a curvature that is not definite, or singular, has no logarithm and no inverse",
                options="add damping, as log_determinant(..., damping=λ) or fn(x + λ) do",
            )
        )
    return estimate(size * (weights * values).sum(-1))


def log_determinant(
    matvec: MatVec,
    like: PyTree,
    *,
    generator: torch.Generator,
    damping: Scalar = 0.0,
    probes: int = 10,
    steps: int = 64,
    chunk_size: int | None = 1,
    progress: Progress | None = None,
) -> Estimate:
    r"""log det(A + λ I) = tr log(A + λ I), by `trace_of`.

    damping     λ ≥ 0, in units of A; above 0 for a singular A, as most curvatures are
    The other arguments are those of `spectral_density`.

    Returns the estimate and its standard error over probes, 0-dim. Many steps are needed where λ is far below the
    largest eigenvalue: the bias falls like exp(−4 m / √κ), κ the condition number of A + λ I.

    Raises HyperparameterError where A + λ I is not positive definite as far as the quadrature sees, and what `trace_of`
    does. Source: Ubaru, Chen & Saad 2017, §4.

        >>> like, scales = {"w": torch.zeros(3)}, torch.tensor([1.0, 2.0, 3.0])
        >>> found = kf.spectra.log_determinant(
        ...     lambda v: {"w": scales * v["w"]}, like, damping=1.0, generator=torch.Generator().manual_seed(0)
        ... )
        >>> round(float(found.value.exp()), 2)
        24.0
    """

    def logarithm(values: Tensor) -> Tensor:
        return torch.log(values + damping)

    options: dict[str, Any] = {"probes": probes, "steps": steps, "chunk_size": chunk_size, "progress": progress}
    return trace_of(logarithm, matvec, like, generator=generator, **options)


def _nodes(
    matvec: MatVec,
    like: PyTree,
    generator: torch.Generator,
    probes: int,
    steps: int,
    chunk_size: int | None,
    progress: Progress | None,
) -> tuple[Tensor, Tensor, int]:
    """Nodes and weights [K, m] of every probe, and P."""
    at_least(1, probes=probes, steps=steps)
    flat = flattened(matvec, like, generator, chunk_size)
    nodes, weights = [], []
    for count in shown(flat.parts(probes), progress):
        found = ritz(tridiagonal(flat.products, flat.signs(count), min(steps, flat.size), flat.symmetry))
        missing = min(steps, flat.size) - found.values.shape[-1]
        nodes.append(torch.cat([found.values, found.values[:, -1:].expand(-1, missing)], -1))
        weights.append(torch.nn.functional.pad(found.weights, (0, missing)))
    return torch.cat(nodes), torch.cat(weights), flat.size
