r"""Estimators: where the output vectors c come from that turn one backward pass into curvature.

An estimator is a rule for vectors c_v [N, *out] whose second moment is the output Hessian of each example's loss,

    (exact)  Σ_v c_v c_vᵀ = Λ_n          (sampled)  E Σ_v c_v c_vᵀ = Λ_n          (empirical)  c = ∂l_n/∂z_n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func.losses import Loss


class Estimator(NamedTuple):
    """A source of output vectors.

    noise      (loss, z) -> the shape of the uniform noise in [0, 1) that `vectors` needs, or None
    vectors    (loss, z, targets, noise) -> iterator over chunks [K, N, *out]; the vectors of all chunks together are
               the estimate
    chunks     (loss, z) -> the number of chunks
    zero_mean  whether the vectors of different examples are independent with mean zero
    own        whether the one vector is the gradient of the loss itself, so that no pass of its own is needed
    whole      whether the vectors are those of a whole square root of Λ, so that products may take Λ itself
    """

    name: str
    noise: Callable[[Loss, Tensor], tuple[int, ...] | None]
    vectors: Callable[[Loss, Tensor, Tensor, Tensor | None], Iterator[Tensor]]
    chunks: Callable[[Loss, Tensor], int]
    zero_mean: bool = False
    own: bool = False
    whole: bool = False


def _silent(loss: Loss, z: Tensor) -> None:
    del loss, z


def _number(count: int) -> Callable[[Loss, Tensor], int]:
    return lambda loss, z: count


def exact(chunk_size: int | None = None) -> Estimator:
    r"""All columns of a square root of the output Hessian: the GGN, which is the Fisher for the losses of this library.

        Σ_v c_v c_vᵀ = Λ_n,        one column per (position, class)

    chunk_size    how many columns go back at once (a vmap over the pullback); 1 loops without vmap; None takes them
                  all. Bounds the memory of the pass; the statistics themselves stay small only with `measure=` of
                  `value_grad_and_stats`.

    Columns of different positions are never excited together, so models that mix positions (attention) are exact too.
    Raises HyperparameterError for a chunk_size below 1. Source: Martens & Grosse 2015 (1503.05671), §3; Dangel et al.
    2020 (1912.10985).

        >>> kf.estimators.exact(chunk_size=16).name
        'exact'
    """
    at_least(1, chunk_size=chunk_size)

    def vectors(loss: Loss, z: Tensor, targets: Tensor, noise: Tensor | None) -> Iterator[Tensor]:
        del noise
        total = loss.columns(z)
        size = chunk_size or total
        for start in range(0, total, size):
            yield loss.factor(z, targets, range(start, min(start + size, total)))

    def chunks(loss: Loss, z: Tensor) -> int:
        return 1 if chunk_size is None else -(-loss.columns(z) // chunk_size)

    return Estimator("exact", _silent, vectors, chunks, whole=True)


def monte_carlo(samples: int = 1) -> Estimator:
    r"""Scores at targets drawn from the model's own predictive distribution, the default of K-FAC.

        c_j = ∂l_n/∂z_n at y_j,   y_j ~ p(y | z_n),   scaled by 1/√m,   j = 1 … m         E Σ_j c_j c_jᵀ = Λ_n

    samples    m, draws per example; positions are drawn independently

    Raises HyperparameterError for samples below 1. Source: Martens & Grosse 2015 (1503.05671), §5.

        >>> kf.estimators.monte_carlo(samples=2).name
        'monte_carlo'
    """
    at_least(1, samples=samples)

    def noise(loss: Loss, z: Tensor) -> tuple[int, ...]:
        return (samples, *loss.noise_shape(z))

    def vectors(loss: Loss, z: Tensor, targets: Tensor, noise: Tensor | None) -> Iterator[Tensor]:
        assert noise is not None
        for u in noise:
            yield loss.sampled_score(z, targets, loss.sample(z, targets, u)).unsqueeze(0) * samples**-0.5

    return Estimator("monte_carlo", noise, vectors, _number(samples), zero_mean=True)


def curvature_prop(samples: int = 1) -> Estimator:
    r"""Random signs through a square root B of the output Hessian.

        c_j = B ε_j / √m,   ε Rademacher, independent for every column and position         E Σ_j c_j c_jᵀ = B Bᵀ = Λ_n

    Raises HyperparameterError for samples below 1. Source: Martens, Sutskever & Swersky 2012 (1206.6464).

        >>> kf.estimators.curvature_prop().name
        'curvature_prop'
    """
    at_least(1, samples=samples)

    def noise(loss: Loss, z: Tensor) -> tuple[int, ...]:
        del loss
        return (samples, *z.shape)

    def vectors(loss: Loss, z: Tensor, targets: Tensor, noise: Tensor | None) -> Iterator[Tensor]:
        assert noise is not None
        for u in noise:
            yield loss.signs(z, targets, u).unsqueeze(0) * samples**-0.5

    return Estimator("curvature_prop", noise, vectors, _number(samples), zero_mean=True)


def empirical() -> Estimator:
    r"""The gradient of each example's own loss: the empirical Fisher. Not the GGN, not even near the optimum of a
    misfit model.

        c = ∂l_n/∂z_n

    Costs no backward pass of its own. Source: Kunstner, Balles & Hennig 2019 (1905.12558) on when it is not enough.

        >>> kf.estimators.empirical().own
        True
    """

    def vectors(loss: Loss, z: Tensor, targets: Tensor, noise: Tensor | None) -> Iterator[Tensor]:
        del noise
        yield loss.score(z, targets).unsqueeze(0)

    return Estimator("empirical", _silent, vectors, _number(1), own=True)


def forward_only() -> Estimator:
    r"""No output vectors: G = I, so that only the inputs precondition (one-sided K-FAC). Scale and shift blocks get
    curvature 1.

    Source: Benzing 2022 (2201.12250), FOOF; Petersen et al. 2023 (2310.00137), ISAAC.

        >>> kf.estimators.forward_only().name
        'forward_only'
    """

    def vectors(loss: Loss, z: Tensor, targets: Tensor, noise: Tensor | None) -> Iterator[Tensor]:
        del loss, z, targets, noise
        return iter(())

    return Estimator("forward_only", _silent, vectors, _number(0), zero_mean=True)


def uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None, name: str) -> Tensor:
    """Noise in [0, 1) from a generator. Raises HyperparameterError, in the name of an estimator, when there is none.

    >>> uniform((2,), torch.device("cpu"), torch.Generator().manual_seed(0), "monte_carlo").shape
    torch.Size([2])
    """
    if generator is None:
        raise HyperparameterError(
            explain(
                f"the estimator {name} draws random numbers and got no generator.",
                why="the global generator is never touched",
                options="step(..., generator=torch.Generator(device).manual_seed(0)); or noise=, the numbers",
            )
        )
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def noise_for(
    estimator: Estimator, loss: Loss, z: Tensor, generator: torch.Generator | None, noise: Tensor | None
) -> Tensor | None:
    """The noise of one estimate: the numbers that were passed, or drawn from the generator, or None for estimators
    that draw nothing.

    Raises HyperparameterError when there is neither, or the numbers have the wrong shape.

    >>> noise_for(monte_carlo(2), kf.losses.mse(), torch.ones(4, 3), torch.Generator().manual_seed(0), None).shape
    torch.Size([2, 4, 3])
    """
    shape = estimator.noise(loss, z)
    if shape is None:
        return noise
    if noise is None:
        return uniform(shape, z.device, generator, estimator.name)
    if tuple(noise.shape) != tuple(shape):
        raise HyperparameterError(explain("the noise has the wrong shape.", got=list(noise.shape), wanted=list(shape)))
    return noise
