"""The posterior as a value: where it is centred, and its precision in an eigenbasis of every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._patterns import first_match, useful
from kfac_func._tracing import readable
from kfac_func._tree import Static, storable
from kfac_func._typing import PyTree, Scalar
from kfac_func.blocks import Layout
from kfac_func.capture import restricted
from kfac_func.linalg import Spectral
from kfac_func.operators import LinearOperator

Prior: TypeAlias = Scalar | Mapping[str, Scalar]
"""A prior precision τ > 0 of all blocks, or by pattern of block names: the first pattern that matches decides."""


class Posterior(NamedTuple):
    r"""N(θ*, P⁻¹) with P = N F̂ / σ² + τ I, block diagonal: tensors only. Made by `kf.laplace.fit`.

    params           θ*, the whole tree, leaves without a posterior included: those stay as they are
    examples         N, 0-dim float64
    outputs          numbers in all outputs, N·D, 0-dim float64
    nll              Σ_n l_n at θ*, 0-dim float64, with l_n as the loss defines it
    spectra          eigenbases and eigenvalues S of F̂ = (1/N) Σ_n J_nᵀ Λ_n J_n by block, neither damped nor times N
    prior_precision  τ by block, 0-dim float64
    noise            σ², 0-dim float64, for ½‖z − y‖² with a Gaussian of this variance; () for all other losses, σ² = 1
    layouts          which leaves form which block
    power            k of N F̂ / σ²ᵏ: 2 for an empirical Fisher, whose gradients have a σ² each, else 1
    """

    params: PyTree
    examples: Tensor
    outputs: Tensor
    nll: Tensor
    spectra: dict[str, Spectral]
    prior_precision: dict[str, Tensor]
    noise: Tensor | tuple[()]
    layouts: Static[tuple[Layout, ...]]
    power: Static[int] = Static(1)


storable(Posterior)


def with_prior(posterior: Posterior, prior_precision: Prior | None = None, *, noise: Scalar | None = None) -> Posterior:
    r"""The same posterior under another prior N(0, 1/τ), or another variance of the noise; None keeps what there is.

    prior_precision  τ > 0, a number or a 0-dim tensor, for all blocks or by pattern of block names
    noise            σ² > 0, of a posterior that was fitted with a noise

    θ* stays where it is: this is the Laplace approximation around the same point. Differentiable in both, and good
    under vmap. Raises HyperparameterError for what is not positive and finite (where it can be read), a pattern
    without a block, a block without a pattern, and a noise where there was none.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> loss, data = kf.losses.mse("batchmean"), [(torch.eye(3), torch.zeros(3, 2))]
        >>> posterior = kf.laplace.fit(fn, loss, params, data)
        >>> {name: tau.item() for name, tau in kf.laplace.with_prior(posterior, 4.0).prior_precision.items()}
        {'weight': 4.0}
    """
    if prior_precision is not None:
        tau = by_block(prior_precision, posterior.spectra, posterior.nll)
        posterior = posterior._replace(prior_precision=tau)
    if noise is None:
        return posterior
    if not isinstance(posterior.noise, Tensor):
        raise HyperparameterError(
            explain(
                "the posterior has no noise that could be changed.",
                got=f"noise={noise}",
                why="its likelihood is exp(-Σ l_n), whatever the loss is",
                options="fit(..., noise=...) with mse('batchmean', scale=0.5)",
            )
        )
    return posterior._replace(noise=positive(noise, posterior.nll, "noise"))


def precision(posterior: Posterior) -> LinearOperator:
    r"""The posterior precision P = N F̂ / σ² + τ I as a linear operator on {path: leaf}, the leaves that it covers.

    Its `solve` is the posterior covariance, `logdet` log det P, `sample` a draw of θ − θ*, `to_dense` the matrix.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> loss, data = kf.losses.mse("batchmean"), [(torch.eye(3), torch.zeros(3, 2))]
        >>> operator = kf.laplace.precision(kf.laplace.fit(fn, loss, params, data, prior_precision=0.5))
        >>> operator.to_dense().diagonal()  # 2 for every input, 6 for the bias that all three examples share
        tensor([6.5000, 6.5000, 2.5000, 2.5000, 2.5000, 2.5000, 2.5000, 2.5000])
    """
    chosen = restricted(lambda p, _: p, posterior.params, covered(posterior))[1]
    return LinearOperator(precisions(posterior), chosen, posterior.layouts)


def precisions(posterior: Posterior) -> dict[str, Spectral]:
    """The spectra of P = N F̂ / σ² + τ I."""
    scale = weight(posterior)

    def one(name: str, spectral: Spectral) -> Spectral:
        s = spectral.values
        return spectral._replace(values=scale.to(s) * s + posterior.prior_precision[name].to(s))

    return {name: one(name, spectral) for name, spectral in posterior.spectra.items()}


def weight(posterior: Posterior) -> Tensor:
    """The number that F̂ is multiplied with in P: N, or N/σ²ᵏ."""
    if not isinstance(posterior.noise, Tensor):
        return posterior.examples
    return posterior.examples / posterior.noise**posterior.power.value


def covered(posterior: Posterior) -> tuple[str, ...]:
    """The paths of the leaves that have a posterior."""
    return tuple(path for layout in posterior.layouts.value for path in layout.leaves)


def by_block(prior: Prior, names: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """τ of every block. Raises as `with_prior`."""
    if not isinstance(prior, Mapping):
        return dict.fromkeys(names, positive(prior, like, "prior_precision"))
    useful(prior, names, "prior_precision")
    known = {pattern: positive(value, like, f"prior_precision of {pattern!r}") for pattern, value in prior.items()}
    return {name: known[name if name in known else first_match(known, name, "prior_precision")] for name in names}


def positive(value: Scalar, like: Tensor, what: str) -> Tensor:
    """A number as a 0-dim tensor in float64. Raises HyperparameterError unless it is positive and finite."""
    number = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if number.ndim or (readable(number) and not bool((number > 0) & number.isfinite())):
        raise HyperparameterError(
            explain(
                f"{what} must be a positive, finite number.",
                got=list(number.shape) if number.ndim else number.item(),
                options="a mapping from patterns to numbers for different blocks; vmap for several values"
                if number.ndim
                else "tune_prior_precision finds a good one",
            )
        )
    return number
