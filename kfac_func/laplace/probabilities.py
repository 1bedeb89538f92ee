"""From a Gaussian over outputs to class probabilities."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func.laplace.predict import Prediction

Link: TypeAlias = Literal["softmax", "sigmoid", "identity"]
"""From outputs to what is averaged: class probabilities, one probability per output, or the outputs themselves."""

Method: TypeAlias = Literal["probit", "sampled"]


def probabilities(
    prediction: Prediction,
    method: Method = "probit",
    *,
    link: Link = "softmax",
    class_dim: int = 1,
    samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The expected probabilities E[softmax(f)] or E[sigmoid(f)] under f ~ N(m, C), in the shape of m [N, *out].

        "probit"    softmax(m / √(1 + π v/8)),   v = diag C        MacKay's approximation, for softmax output by output
        "sampled"   (1/K) Σ_k softmax(m + R ε_k),   R Rᵀ = C,  ε standard normal        right as K grows

    link        "softmax" over dimension `class_dim` of m, or "sigmoid" of every output (Bernoulli)
    samples     K, for "sampled", which needs a `generator`; its numbers K·N·D are there at once

    Probit is exact in the limit of a small C, is fast and draws nothing; it ignores correlations between classes. A
    common shift of all outputs, which softmax does not see, still adds to v. Raises HyperparameterError for unknown
    names, samples below 1, and "sampled" without a generator.
    Source: MacKay 1992 (The evidence framework applied to classification networks); Gibbs 1998; Daxberger et al. 2021
    (2106.14806), §2.3.

        >>> unsure = kf.laplace.Prediction(torch.tensor([[2.0, 0.0]]), 9 * torch.eye(2)[None])
        >>> unsure.mean.softmax(1), kf.laplace.probabilities(unsure)
        (tensor([[0.8808, 0.1192]]), tensor([[0.7189, 0.2811]]))
        >>> drawn = kf.laplace.probabilities(unsure, "sampled", generator=torch.Generator().manual_seed(0))
        >>> bool((drawn[0, 0] - 0.66).abs() < 0.05)
        True
    """
    mean, covariance = prediction
    if method not in get_args(Method):
        raise HyperparameterError(
            explain("unknown method.", got=repr(method), wanted=" or ".join(map(repr, get_args(Method))))
        )
    if method == "probit":
        variance = covariance.diagonal(dim1=-2, dim2=-1).reshape(mean.shape)
        return linked(mean / (1 + math.pi / 8 * variance).sqrt(), link, class_dim)
    at_least(1, samples=samples)
    values, basis = torch.linalg.eigh(covariance)
    root = basis * values.clamp(min=0).sqrt().unsqueeze(-2)
    noise = normal((samples, *covariance.shape[:2]), covariance, generator)
    drawn = mean + torch.einsum("nvw,knw->knv", root, noise).reshape(samples, *mean.shape)
    return linked(drawn, link, class_dim + 1 if class_dim >= 0 else class_dim).mean(0)


def linked(z: Tensor, link: Link, class_dim: int) -> Tensor:
    """softmax, sigmoid or the outputs themselves. Raises HyperparameterError for an unknown link.

    >>> linked(torch.zeros(1, 2), "softmax", 1)
    tensor([[0.5000, 0.5000]])
    """
    if link not in get_args(Link):
        raise HyperparameterError(
            explain("unknown link.", got=repr(link), wanted=" or ".join(map(repr, get_args(Link))))
        )
    return z.softmax(class_dim) if link == "softmax" else z.sigmoid() if link == "sigmoid" else z


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers. Raises HyperparameterError without a generator.

    >>> normal((2, 3), torch.zeros(()), torch.Generator()).shape
    torch.Size([2, 3])
    """
    if generator is None:
        raise HyperparameterError(
            explain(
                "draws need random numbers and got no generator.",
                why="the global generator is never touched",
                options="generator=torch.Generator().manual_seed(0)",
            )
        )
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
