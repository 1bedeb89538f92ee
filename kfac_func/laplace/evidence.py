r"""How well a prior precision explains the data, and the one that does best.

    log p(data) ≈ −Σ_n l_n(θ*) + Σ_b [½ P_b log τ_b − ½ τ_b ‖θ*_b‖² − ½ log det(N F̂_b + τ_b I)]

With θ* and F̂ fixed, the derivative of the terms of a block in log τ is ½ (γ(τ) − τ ‖θ*‖²), where γ(τ) = Σ N S/(N S + τ)
counts the parameters that the data determine (MacKay 1992). γ falls and τ ‖θ*‖² rises, so there is one maximum, where
they meet, and bisection finds it from anywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func._typing import Scalar
from kfac_func.laplace.posterior import Posterior, Prior, precisions, weight, with_prior


def log_marginal_likelihood(
    posterior: Posterior, prior_precision: Prior | None = None, *, noise: Scalar | None = None
) -> Tensor:
    r"""The Laplace approximation of log p(data), the evidence of the prior N(0, 1/τ), 0-dim float64, in nats.

        −Σ_n l_n(θ*) − ½ τ ‖θ*‖² + ½ P log τ − ½ log det(N F̂ + τ I)

    prior_precision  τ in place of the posterior's own: one number or by pattern of block names
    noise            σ² in place of the posterior's own; then −Σ_n l_n/σ² − ½ N D log 2πσ², and N F̂/σ²

    P counts the parameters that the posterior covers and ‖θ*‖² is over them. The (2π)^P/2 of the prior and of the
    Gaussian integral cancel; nothing else is left out but what the loss leaves out of −log p(y | z): without a noise,
    the constant of a squared error. θ* does not move with τ. Differentiable in τ and σ², and good under vmap: the
    eigenvalues are there already. Raises as `with_prior`. Source: Immer et al. 2021 (2104.04975), §3.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> posterior = kf.laplace.fit(fn, kf.losses.cross_entropy(), params, batches)
        >>> evidence = lambda tau: kf.laplace.log_marginal_likelihood(posterior, tau)
        >>> torch.func.vmap(evidence)(torch.tensor([0.1, 1.0, 10.0])).shape
        torch.Size([3])
        >>> torch.func.grad(evidence)(torch.tensor(1.0)).shape
        torch.Size([])
    """
    posterior = with_prior(posterior, prior_precision, noise=noise)
    fit = -posterior.nll
    if isinstance(posterior.noise, Tensor):
        fit = fit / posterior.noise - 0.5 * posterior.outputs * (2 * math.pi * posterior.noise).log()
    tau, norms, found = posterior.prior_precision, _norms(posterior), precisions(posterior)

    def complexity(name: str) -> Tensor:
        values = found[name].values.double()
        return 0.5 * (values.log() - tau[name].log()).sum() + 0.5 * tau[name] * norms[name]

    return fit - torch.stack([complexity(name) for name in found]).sum()


def tune_prior_precision(
    posterior: Posterior, *, by_block: bool = False, bounds: tuple[float, float] = (1e-8, 1e8), steps: int = 60
) -> Posterior:
    r"""The posterior with the prior precision of the largest marginal likelihood: τ ‖θ*‖² = γ(τ).

        γ(τ) = Σ N S/(N S + τ)        S the eigenvalues of F̂

    by_block   one τ for every block; else one for all
    bounds     where τ is looked for; a maximum outside ends at the bound (θ* = 0 at the upper, F̂ = 0 at the lower one)
    steps      halvings of log(bounds): 60 are exact to rounding

    θ* stays; training on with the new τ as weight decay τ/N and tuning again is the full procedure. A fixed number of
    steps without a look at values, so it works under vmap. Raises HyperparameterError for bounds that are not
    0 < low < high and steps below 1.      Source: MacKay 1992, §2; Immer et al. 2021 (2104.04975).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> posterior = kf.laplace.fit(fn, kf.losses.cross_entropy(), params, batches)
        >>> tuned = kf.laplace.tune_prior_precision(posterior)
        >>> bool(kf.laplace.log_marginal_likelihood(tuned) > kf.laplace.log_marginal_likelihood(posterior))
        True
    """
    at_least(1, steps=steps)
    low, high = bounds
    if not 0 < low < high < float("inf"):
        raise HyperparameterError(explain("bounds must be positive and ascending.", got=bounds, options="(1e-8, 1e8)"))
    norms, scale = _norms(posterior), weight(posterior)
    groups = [[name] for name in posterior.spectra] if by_block else [list(posterior.spectra)]
    found: dict[str, Tensor] = {}
    for names in groups:
        values = torch.cat([scale * posterior.spectra[name].values.double().flatten() for name in names])
        norm = torch.stack([norms[name] for name in names]).sum()
        found |= dict.fromkeys(names, _balanced(values, norm, math.log(low), math.log(high), steps))
    return posterior._replace(prior_precision=found)


def _balanced(values: Tensor, norm: Tensor, low: float, high: float, steps: int) -> Tensor:
    """The τ with τ ‖θ*‖² = Σ values/(values + τ), between exp(low) and exp(high)."""
    at = torch.full_like(norm, (low + high) / 2)
    for k in range(steps):
        tau = at.exp()
        rising = (values / (values + tau)).sum() > tau * norm
        at = at + (2 * rising.to(at.dtype) - 1) * (high - low) / 2 ** (k + 2)
    return at.exp()


def _norms(posterior: Posterior) -> dict[str, Tensor]:
    """‖θ*_b‖² of every block, float64."""
    leaves = _tree.unique_paths(posterior.params)
    return {
        layout.name: torch.stack([leaves[path].double().square().sum() for path in layout.leaves]).sum()
        for layout in posterior.layouts.value
    }
