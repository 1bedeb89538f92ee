"""Squared error: a Gaussian likelihood with constant variance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tracing import readable
from kfac_func._typing import Scalar
from kfac_func.losses.base import Loss, assemble, check_reduction, diagonal_family, outputs_per_example


def mse(reduction: str = "mean", scale: Scalar = 1.0) -> Loss:
    r"""Squared error, times `scale`.

        l_n = scale ‖z_n − y_n‖² / k,        Λ_n = (2 scale / k) I,        B_n = √(2 scale / k) I

    with k = D, the number of outputs per example, for "mean" (torch averages over all N·D elements), and k = 1 for
    "batchmean" (sum over outputs, mean over examples) and "sum". `scale=0.5` gives half squared error, the negative
    log-likelihood of unit variance. Draws are y ~ N(z, 1/(2 scale)) by inverse CDF, in at least float32; the sampled
    score is 2 scale (z − y) / √k.

    Shapes: outputs and targets [N, …], the same for both: nothing is broadcast (torch only warns). Noise has the
    shape of z. `scale` is a number or a 0-dim tensor, through which gradients flow.

    Raises HyperparameterError for an unknown reduction or a scale that is not positive and finite (where that can be
    read), TargetError for targets that do not fit, BatchError without examples.
    Source: Martens & Grosse 2015 (arXiv 1503.05671), §2.

    >>> import torch
    >>> loss = mse("batchmean", scale=0.5)
    >>> z, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    >>> loss.value(z, y), loss.score(z, y)
    (tensor(2.5000), tensor([[1., 2.]]))
    >>> loss.hessian(z, y)
    tensor([[[1., 0.],
             [0., 1.]]])
    """
    check_reduction(reduction)
    _check_scale(scale)
    doubled = 2 * scale
    root = doubled.sqrt() if isinstance(doubled, Tensor) else math.sqrt(doubled)

    def value(z: Tensor, targets: Tensor) -> Tensor:
        # as torch does inside, but forward-over-reverse fails on torch's own "mean"
        squares = F.mse_loss(z, targets, reduction="none")
        total = squares.mean() if reduction == "mean" else squares.sum()
        return _like(scale, total) * (total / z.shape[0] if reduction == "batchmean" else total)

    def weights(z: Tensor, targets: Tensor) -> float:
        del targets
        return 1 / outputs_per_example(z) if reduction == "mean" else 1.0

    def sample(z: Tensor, noise: Tensor) -> Tensor:
        rounding = torch.finfo(z.dtype).eps / 2
        return z + torch.special.ndtri(noise.to(z.dtype).clamp(rounding, 1 - rounding)) / _like(root, z)

    def residual(z: Tensor, drawn: Tensor) -> Tensor:
        return _like(doubled, z) * (z - drawn)

    def deviation(z: Tensor) -> Tensor:
        return torch.ones_like(z) * _like(root, z)

    family = diagonal_family(value, weights, sample, residual, deviation)

    def curve(z: Tensor, v: Tensor) -> Tensor:  # without the rounding of a root
        return torch.ones_like(z) * _like(doubled, z) * v

    return assemble(family._replace(curve=curve), reduction)


def _like(number: Scalar, z: Tensor) -> Scalar:
    return number.to(z) if isinstance(number, Tensor) else number


def _check_scale(scale: Scalar) -> None:
    if isinstance(scale, Tensor) and scale.dim():
        raise HyperparameterError(
            explain("scale must be a number or a 0-dim tensor.", got=f"a tensor of shape {list(scale.shape)}")
        )
    known = not isinstance(scale, Tensor) or readable(scale)
    if known and not (math.isfinite(scale) and scale > 0):
        raise HyperparameterError(
            explain("scale must be a positive number.", got=scale, why="the curvature would have no square root")
        )
