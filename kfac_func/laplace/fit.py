"""From a trained net and its data to a posterior."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, HyperparameterError, explain
from kfac_func._tracing import readable
from kfac_func._tree import Static
from kfac_func._typing import Model, Progress, PyTree, Scalar, shown
from kfac_func.capture import Unclaimed, as_pair, chosen_leaves, rereadable, restricted, tensor_of
from kfac_func.curvature import Curvature, Structure
from kfac_func.estimators import Estimator
from kfac_func.estimators.stats import Sharing
from kfac_func.laplace.posterior import Posterior, Prior, by_block, positive
from kfac_func.losses import Loss, checked_loss
from kfac_func.losses.base import example_weight
from kfac_func.operators import linear_operator
from kfac_func.precondition import fit_curvature
from kfac_func.products.linear import careful


def fit(
    fn: Model,
    loss: Loss,
    params: PyTree,
    batches: Iterable[Any],
    *,
    curvature: Structure | Curvature | None = None,
    estimator: Estimator | None = None,
    only: Sequence[str] | None = None,
    prior_precision: Prior = 1.0,
    noise: Scalar | None = None,
    sharing: Sharing = "expand",
    unclaimed: Unclaimed | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Posterior:
    r"""The Laplace approximation of the posterior around trained parameters θ*.

        p(θ | data) ∝ exp(−Σ_n l_n(θ)) N(θ; 0, 1/τ)  ≈  N(θ*, P⁻¹)        P = N F̂ + τ I,   F̂ ≈ (1/N) Σ_n J_nᵀ Λ_n J_n

    fn, loss         as in `value_grad_and_stats`. The log-likelihood is −Σ_n l_n, l_n the loss of one example: the
                     value of "sum", N times that of "mean" and "batchmean". A loss that also averages over the outputs
                     or positions of an example is no log-likelihood and is refused: take "batchmean" or "sum", also
                     with class weights or ignored targets
    params           θ*, any tree; P is that of the posterior only where θ* is (nearly) a maximum
    batches          a list of (inputs, targets), or a loader that does not shuffle: gone through twice, or three times
                     for `eigen`
    curvature        F̂, block by block; default `eigen()` (EKFAC). Any with an eigenbasis (see `kf.linear_operator`)
    estimator        default `exact()`, the Gauss-Newton matrix; those that draw need a `generator`
    only             patterns of parameter paths: a posterior over these leaves, all others fixed at θ*. Last-layer
                     Laplace is only=("head.*",), and costs no backward pass below the head
    prior_precision  τ, one number or by pattern of block names; `tune_prior_precision` finds a better one
    noise            σ² of a Gaussian y ~ N(z, σ²): then l_n must be ½‖z_n − y_n‖², mse("batchmean", scale=0.5), and the
                     log-likelihood is −Σ_n l_n/σ² − ½ N D log 2πσ², the precision N F̂/σ² + τ I (N F̂/σ⁴ + τ I with
                     `empirical()`, whose gradients have a σ² each). None: as above, which is the same thing without the
                     constant for mse("batchmean", scale=1/(2σ²))
    sharing, unclaimed, progress   as in `fit_curvature`. A leaf with the policy "identity" has no curvature and is
                     refused: leave it out by `only`, or choose "diagonal"

    A parameter that the model never reads keeps its prior. Raises HyperparameterError for what the arguments forbid,
    BatchError when there is no batch and for a loss that is NaN or infinite; and what `fit_curvature` and
    `linear_operator` raise. Source: Ritter et al. 2018; Daxberger et al. 2021 (2106.14806), §2.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> posterior = kf.laplace.fit(fn, kf.losses.cross_entropy(), params, batches)
        >>> posterior.examples, list(posterior.spectra)
        (tensor(3., dtype=torch.float64), ['weight'])
    """
    loss = checked_loss(loss)
    batches = rereadable(batches, "the loss and the curvature are measured in passes of their own")
    fn, free = restricted(careful(fn), params, chosen_leaves(params, only))
    examples, outputs, nll = _likelihood(fn, loss, free, batches, noise is not None, progress)
    state = fit_curvature(
        fn, loss, free, batches, curvature=curvature, estimator=estimator, sharing=sharing, unclaimed=unclaimed,
        generator=generator, progress=progress,
    )  # fmt: skip
    _refuse_identity(dict(state.rules.value.unclaimed))
    operator = linear_operator(state, free, damping=0.0)
    return Posterior(
        params=params,
        examples=nll.new_tensor(examples),
        outputs=nll.new_tensor(outputs),
        nll=nll,
        spectra=operator.spectra,
        prior_precision=by_block(prior_precision, operator.spectra, nll),
        noise=() if noise is None else positive(noise, nll, "noise"),
        layouts=Static(operator.layouts.value),
        power=Static(2 if estimator is not None and estimator.own else 1),
    )


def _likelihood(
    fn: Model, loss: Loss, params: PyTree, batches: Iterable[Any], gaussian: bool, progress: Progress | None
) -> tuple[int, int, Tensor]:
    """N, the numbers in all outputs, and Σ_n l_n."""
    examples = outputs = 0
    nll = torch.zeros((), dtype=torch.float64, device=_tree.leaves(params)[0].device)
    for index, batch in enumerate(shown(batches, progress)):
        inputs, targets = as_pair(batch)
        z = tensor_of(fn(params, inputs))
        value = loss.value(z, targets)
        if readable(value) and not bool(value.isfinite()):
            raise BatchError(
                explain(
                    f"the loss of batch {index} is not finite.",
                    got=value.item(),
                    options="look for NaN or infinities in the parameters, the inputs and the targets",
                )
            )
        _check_likelihood(loss, z, targets, gaussian)
        examples, outputs = examples + len(z), outputs + z.numel()
        nll = nll + value.double() / example_weight(loss, len(z))
    return examples, outputs, nll


def _check_likelihood(loss: Loss, z: Tensor, targets: Tensor, gaussian: bool) -> None:
    terms = math.prod(loss.noise_shape(z)[1:])
    if loss.reduction == "mean" and terms > 1:
        raise HyperparameterError(
            explain(
                "the loss averages over the outputs of an example, so it is no negative log-likelihood.",
                got=f"reduction 'mean' over {terms} terms per example",
                options="reduction='batchmean' or 'sum': their l_n is the sum over the terms",
            )
        )
    if gaussian and readable(z) and not _half_square(loss, z, targets):
        raise HyperparameterError(
            explain(
                "noise= is the variance of a Gaussian, and the loss is not ½‖z − y‖² per example.",
                wanted="mse('batchmean', scale=0.5)",
                options="another loss without noise=: its likelihood is exp(-Σ l_n)",
            )
        )


def _half_square(loss: Loss, z: Tensor, targets: Tensor) -> bool:
    if targets.shape != z.shape:
        return False
    return torch.allclose(loss.score(z, targets), (z - targets).to(z.dtype), rtol=1e-3, atol=1e-3)


def _refuse_identity(policies: dict[str, str]) -> None:
    for path, policy in policies.items():
        if policy == "identity":
            raise HyperparameterError(
                explain(
                    f"parameter {path!r} has no curvature, so it has no posterior.",
                    why="its policy is 'identity'",
                    options=f"only=, without it; or unclaimed={{{path!r}: 'diagonal'}}",
                )
            )
