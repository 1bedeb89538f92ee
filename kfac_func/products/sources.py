r"""Output vectors c [V, N, *out] of a whole batch: what every example's Jacobian is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func.estimators import Estimator
from kfac_func.estimators.vectors import noise_for
from kfac_func.losses import Loss

Vectors: TypeAlias = Callable[[Tensor], Tensor]
"""z [N, *out] -> c [V, N, *out]."""

Sources: TypeAlias = Callable[[Tensor], Callable[[], Iterator[Tensor]]]
"""Vectors in chunks that can be made again: z -> () -> chunks [K, N, *out]."""


def once(vectors: Vectors) -> Sources:
    """All vectors in one chunk."""
    return lambda z: lambda: iter((vectors(z),))


def own_scores(loss: Loss, targets: Tensor) -> Vectors:
    """∂l_n/∂z_n, the gradient of every example's own loss: V = 1."""
    return lambda z: loss.score(z, targets).unsqueeze(0)


def unit_vectors(z: Tensor) -> Tensor:
    """e_1 … e_D for every example: V = D."""
    eye = torch.eye(z.shape[1:].numel(), dtype=z.dtype, device=z.device)
    return eye.reshape(-1, 1, *z.shape[1:]).expand(-1, *z.shape)


def estimated(
    loss: Loss, estimator: Estimator, targets: Tensor, generator: torch.Generator | None, noise: Tensor | None
) -> Sources:
    """The vectors of an estimator, Σ_v c_v c_vᵀ ≈ Λ_n. What it draws is drawn once.

    Raises HyperparameterError for an estimator without vectors, one that draws and has neither generator nor noise,
    and noise of another shape.
    """

    def sources(z: Tensor) -> Callable[[], Iterator[Tensor]]:
        if estimator.chunks(loss, z) == 0:
            raise HyperparameterError(
                explain(
                    f"the estimator {estimator.name} has no output vectors.",
                    why="per-example Fishers are made of them",
                    options="exact(), monte_carlo(), curvature_prop() or empirical()",
                )
            )
        drawn = noise_for(estimator, loss, z, generator, noise)
        return lambda: estimator.vectors(loss, z, targets, drawn)

    return sources
