r"""The linearised predictive: what a posterior over parameters says about outputs.

    f(x; θ) ≈ f(x; θ*) + J(x) (θ − θ*)        f(x) ~ N(f(x; θ*), J(x) P⁻¹ J(x)ᵀ)

A row of J is the gradient V_v of one output, and in the eigenbasis of P

    (J P⁻¹ Jᵀ)_vw = Σ_blocks ⟨U_Gᵀ V_v U_A ∘ (N S + τ)⁻¹, U_Gᵀ V_w U_A⟩

which rows give without forming any V_v where a layer has one shared position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from glob import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func._patterns import chosen
from kfac_func._tracing import without_autocast
from kfac_func._tree import storable
from kfac_func._typing import Model, Scalar
from kfac_func.blocks import Pairs
from kfac_func.laplace.posterior import Posterior, Prior, positive, precisions, with_prior
from kfac_func.linalg import Spectral
from kfac_func.linalg.spectral import inner, seen_in, squared
from kfac_func.products.regroup import regrouped
from kfac_func.products.routes import Route
from kfac_func.products.rows import reader, whole
from kfac_func.products.sources import once, unit_vectors


class Prediction(NamedTuple):
    """A Gaussian over the outputs of every example: mean [N, *out], covariance [N, D, D] in row-major order of out."""

    mean: Tensor
    covariance: Tensor


storable(Prediction)


def predict(
    posterior: Posterior,
    fn: Model,
    inputs: Any,
    *,
    prior_precision: Prior | None = None,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
) -> Prediction:
    r"""The predictive of the linearised model (the GLM predictive): a Gaussian over the outputs of every example.

        f(x_n) ~ N(f(x_n; θ*), J_n P⁻¹ J_nᵀ)        J_n = ∂f(x_n)/∂θ [D, P],   P = N F̂/σ² + τ I

    fn, inputs       the model of `fit`, and new inputs of it
    prior_precision  τ in place of the posterior's own; differentiable, good under vmap
    route            how the rows of J are had, as in `kf.products.per_example_grads`: "auto" is the tape, or what can
                     take a model that it refuses
    chunk_size       examples at a time (None: all)
    only             patterns of block names: the others are fixed at θ*

    Returns mean [N, *out] and covariance [N, D, D] with D = prod(out), in the units of the outputs, without the noise
    of an observation: see `observed` and `probabilities`. The rows of all D outputs are there at once, D times the
    memory of a backward pass; `functional_variance` has no D².

    Raises StateError for a model with other blocks; and what `with_prior` and the rows raise: CaptureError for examples
    that see each other, and for what an explicit route cannot take, BatchError for an empty batch and NaN.
    Source: Immer et al. 2021 (2008.08400), §3; Daxberger et al. 2021 (2106.14806), §2.3.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> posterior = kf.laplace.fit(fn, kf.losses.cross_entropy(), params, batches)
        >>> found = kf.laplace.predict(posterior, fn, torch.randn(5, 3))
        >>> found.mean.shape, found.covariance.shape
        (torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """
    means, parts = zip(*_reduced(posterior, fn, inputs, inner, prior_precision, route, chunk_size, only), strict=True)
    return Prediction(torch.cat(means), torch.cat(parts))


def functional_variance(
    posterior: Posterior,
    fn: Model,
    inputs: Any,
    *,
    prior_precision: Prior | None = None,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
) -> Tensor:
    r"""The variance of every output under the linearised model, [N, *out]: the diagonal of `predict`'s covariance.

        σ²_nv = Σ_blocks ⟨V_nv, P⁻¹ V_nv⟩        V_nv the gradient of output v of example n

    Arguments and errors as of `predict`.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> posterior = kf.laplace.fit(fn, kf.losses.cross_entropy(), params, batches)
        >>> near, far = kf.laplace.functional_variance(posterior, fn, torch.tensor([[1.0, 0, 0], [9.0, 9, 9]]))
        >>> bool((near < far).all())
        True
    """
    means, parts = zip(*_reduced(posterior, fn, inputs, squared, prior_precision, route, chunk_size, only), strict=True)
    return torch.cat([part.mT.reshape(z.shape) for z, part in zip(means, parts, strict=True)])


def observed(prediction: Prediction, noise: Scalar) -> Prediction:
    r"""The prediction of an observation y = f + ε with ε ~ N(0, σ² I): the same mean, the covariance plus σ² I.

    noise   σ² > 0, e.g. that of the posterior. Raises HyperparameterError where it is not positive and finite.

        >>> certain = kf.laplace.Prediction(torch.zeros(1, 2), torch.zeros(1, 2, 2))
        >>> observed(certain, 0.5).covariance
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    mean, covariance = prediction
    variance = positive(noise, covariance, "noise")
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return Prediction(mean, covariance + variance * eye)


Reduction = Callable[[Pairs, Tensor], Tensor]


def _reduced(
    posterior: Posterior,
    fn: Model,
    inputs: Any,
    reduction: Reduction,
    prior_precision: Prior | None,
    route: Route,
    chunk_size: int | None,
    only: Sequence[str] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and Σ_blocks reduction(rows of J in the eigenbasis, 1/eigenvalues of P), chunk by chunk of examples."""
    posterior = with_prior(posterior, prior_precision)
    spectra = precisions(posterior)
    names = chosen(only, spectra, "only")
    layouts = [layout for layout in posterior.layouts.value if layout.name in names]
    read = reader(
        fn, route=route, chunk_size=chunk_size, only=[escape(path) for layout in layouts for path in layout.leaves]
    )
    for part in read(posterior.params, inputs, once(unit_vectors)):
        found = whole(part)
        yield found.outputs, _summed(spectra, regrouped(found, layouts), reduction)


@without_autocast
def _summed(spectra: dict[str, Spectral], rows: dict[str, Pairs], reduction: Reduction) -> Tensor:
    terms = [reduction(seen_in(spectra[name], one), spectra[name].values.reciprocal()) for name, one in rows.items()]
    return torch.stack(terms).sum(0)
