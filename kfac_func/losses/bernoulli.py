"""Binary cross-entropy of logits, with every option of torch.nn.functional.binary_cross_entropy_with_logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func._errors import TargetError, explain
from kfac_func._tracing import legible
from kfac_func.losses.base import (
    SLACK,
    Loss,
    assemble,
    check_reduction,
    check_weight,
    diagonal_family,
    outputs_per_example,
)


def bce_with_logits(
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Loss:
    r"""Cross-entropy of independent Bernoulli variables given by their logits.

        term  = −w (π y log p + (1−y) log(1−p)),     p = sigmoid(z)
        Λ     = diag(s p (1−p)),      s = w (π y + 1 − y)
        B     = diag √(s p (1−p)),    sampled score = √s (p − y'),  y' = [noise < p]

    Shapes: outputs z [N, …] and targets y in [0, 1] of the same shape (soft targets allowed). `weight` w ≥ 0 and
    `pos_weight` π ≥ 0 broadcast to z as in torch, but never enlarge it. Noise and draws have the shape of z.

    Normalisation: "mean" divides by all N·D elements (never by the weights), "batchmean" by N, "sum" by 1.

    Raises HyperparameterError for an option without meaning, TargetError for targets or weights that do not fit and for
    targets outside of [0, 1] (where they are on a CPU), BatchError without examples.
    Source: Martens & Grosse 2015 (arXiv 1503.05671), §2.

    >>> import torch
    >>> loss = bce_with_logits(pos_weight=torch.tensor([3.0]), reduction="batchmean")
    >>> z, y = torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
    >>> loss.score(z, y).flatten()
    tensor([-1.5000,  0.5000])
    >>> loss.hessian(z, y).flatten()
    tensor([0.7500, 0.2500])
    """
    check_reduction(reduction)
    check_weight("weight", weight)
    check_weight("pos_weight", pos_weight)

    def check(z: Tensor, targets: Tensor) -> None:
        _check_broadcast("weight", weight, z)
        _check_broadcast("pos_weight", pos_weight, z)
        _check_range(targets)

    def value(z: Tensor, targets: Tensor) -> Tensor:
        check(z, targets)
        kind = "mean" if reduction == "mean" else "sum"
        total = F.binary_cross_entropy_with_logits(z, targets, weight, pos_weight=pos_weight, reduction=kind)
        return total / z.shape[0] if reduction == "batchmean" else total

    def weights(z: Tensor, targets: Tensor) -> Tensor:
        check(z, targets)
        y = targets.to(z.dtype)
        s = torch.ones_like(y) if pos_weight is None else pos_weight * y + 1 - y
        s = s if weight is None else s * weight
        return s / outputs_per_example(z) if reduction == "mean" else s

    return assemble(diagonal_family(value, weights, _sample, _residual, _deviation), reduction)


def _sample(z: Tensor, noise: Tensor) -> Tensor:
    return (noise < z.sigmoid()).to(z.dtype)


def _residual(z: Tensor, drawn: Tensor) -> Tensor:
    return z.sigmoid() - drawn


def _deviation(z: Tensor) -> Tensor:
    return (0.5 * (F.logsigmoid(z) + F.logsigmoid(-z))).exp()


def _check_range(targets: Tensor) -> None:
    y = legible(targets)
    if y is not None and bool(((y < -SLACK) | (y > 1 + SLACK)).any()):
        raise TargetError(
            explain(
                "the targets of bce_with_logits are probabilities, and these are none.",
                got=f"entries from {y.min().item():.4g} to {y.max().item():.4g}",
                wanted="numbers in [0, 1]",
                options="targets.sigmoid() if they are logits; kf.losses.mse() for other numbers",
            )
        )


def _check_broadcast(name: str, tensor: Tensor | None, z: Tensor) -> None:
    if tensor is None:
        return
    missing = z.dim() - tensor.dim()
    if missing < 0 or any(got not in (1, z.shape[missing + i]) for i, got in enumerate(tensor.shape)):
        raise TargetError(
            explain(f"{name} does not broadcast to the outputs.", got=list(tensor.shape), wanted=list(z.shape))
        )
