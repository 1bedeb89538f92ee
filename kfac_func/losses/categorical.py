"""Softmax cross-entropy, with every option of torch.nn.functional.cross_entropy."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func._errors import HyperparameterError, TargetError, explain
from kfac_func._tracing import legible
from kfac_func.losses.base import (
    SLACK,
    Family,
    Loss,
    assemble,
    check_outputs,
    check_reduction,
    check_weight,
    widen,
)

_NO_INDEX = -100


class _Options(NamedTuple):
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    class_dim: int


def cross_entropy(
    weight: Tensor | None = None,
    ignore_index: int = _NO_INDEX,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    class_dim: int = 1,
) -> Loss:
    r"""Cross-entropy of a softmax with integer or probability targets.

        term  = −Σ_c w_c q_c log p_c,     p = softmax(z),     q = (1−ε)·target + ε/C
        Λ     = s (diag(p) − p pᵀ)  per position,       s = Σ_c w_c q_c,  0 where the target is ignored
        B     = √s (diag(√p) − p √pᵀ),         sampled score = √s (p − onehot(y)),  y ~ p by inverse CDF

    Shapes: outputs z [N, C, d₁, …] (or the classes in dimension `class_dim`: −1 for [N, T, C]); targets either class
    indices, z's shape without the class dimension, or class probabilities, z's shape. `weight` w [C] is one factor
    ≥ 0 per class, `label_smoothing` ε is in [0, 1]. A draw is an integer per position.

    Normalisation, as torch's: "mean" divides the sum of terms by Σ w_y over the indices that are not ignored, or by
    the number of positions for probabilities (whatever their weights); "sum" does not divide; "batchmean" divides by
    N. When every index is ignored, "mean" is NaN as in torch, and score and curvature are zero. Probabilities are
    used as they are; a row of zeros has neither loss nor curvature (without smoothing).

    Raises HyperparameterError for an option without meaning, BatchError without examples, TargetError for targets that
    do not fit, for an `ignore_index` with probability targets, and, on a CPU, for those that are no probabilities.
    Source: Martens & Grosse 2015 (arXiv 1503.05671), §2; square root of the softmax Hessian: the library's
    mathematics, §1.

    >>> import torch
    >>> loss = cross_entropy()
    >>> z, y = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    >>> loss.score(z, y)
    tensor([[-0.5000,  0.5000],
            [ 0.5000, -0.5000]])
    >>> loss.hessian(z, y)[0]
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    >>> loss.sample(z, y, torch.tensor([0.2, 0.7]))
    tensor([0, 1])
    """
    options = _Options(weight, ignore_index, label_smoothing, reduction, class_dim)
    _check_options(options)
    family = Family(
        check=partial(_check, options),
        value=partial(_value, options),
        weights=partial(_weights, options),
        noise_shape=partial(_noise_shape, options),
        sample=partial(_sample, options),
        residual=partial(_residual, options),
        root=partial(_root, options),
        curve=partial(_curve, options),
    )
    return assemble(family, reduction)


def _value(o: _Options, z: Tensor, targets: Tensor) -> Tensor:
    examples, weight = z.shape[0], None if o.weight is None else o.weight.to(z.dtype)
    kind = "sum" if o.reduction == "batchmean" else o.reduction
    z, targets = _as_torch_wants(z, targets, o.class_dim)
    if targets.is_floating_point():
        total = F.cross_entropy(z, targets, weight, reduction=kind, label_smoothing=o.label_smoothing)
    elif weight is None and o.label_smoothing == 0.0:
        total = F.cross_entropy(z, targets, ignore_index=o.ignore_index, reduction=kind)
    else:
        total = _weighted(o, z, targets, weight)
    return total / examples if o.reduction == "batchmean" else total


def _weighted(o: _Options, z: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """Torch has no derivative with respect to its weights, and its smoothing writes in place, which vmap refuses."""
    own, ignored = _own_weights(o, z, targets)
    log_p = F.log_softmax(z, 1)
    total = (own * F.nll_loss(log_p, targets, ignore_index=o.ignore_index, reduction="none")).sum()
    if o.label_smoothing:
        smooth = -_class_sum(log_p, weight, 1).masked_fill(ignored, 0).sum()
        total = (1 - o.label_smoothing) * total + smooth * (o.label_smoothing / z.shape[1])
    return total / own.sum() if o.reduction == "mean" else total


def _weights(o: _Options, z: Tensor, targets: Tensor) -> Tensor:
    """The curvature weight s of each position, with the class dimension kept."""
    classes, weight = z.shape[o.class_dim], None if o.weight is None else o.weight.to(z.dtype)
    even = (classes if weight is None else weight.sum()) * (o.label_smoothing / classes)
    if targets.is_floating_point():
        s = (1 - o.label_smoothing) * _class_sum(targets.to(z.dtype), weight, o.class_dim) + even
        return (s / math.prod(s.shape[1:]) if o.reduction == "mean" else s).unsqueeze(o.class_dim)
    own, ignored = _own_weights(o, z, targets)
    s = ((1 - o.label_smoothing) * own + even).masked_fill(ignored, 0)
    if o.reduction == "mean":
        total = own.sum()
        s = s * torch.where(total > 0, z.shape[0] / total, 0)
    return s.unsqueeze(o.class_dim)


def _own_weights(o: _Options, z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of each target's class, 0 where it is ignored, and where it is ignored."""
    ignored = indices == o.ignore_index
    if o.weight is None:
        return (~ignored).to(z.dtype), ignored
    return o.weight.to(z.dtype)[indices.long().masked_fill(ignored, 0)].masked_fill(ignored, 0), ignored


def _noise_shape(o: _Options, z: Tensor) -> tuple[int, ...]:
    dim = o.class_dim % z.dim()
    return (*z.shape[:dim], *z.shape[dim + 1 :])


def _sample(o: _Options, z: Tensor, noise: Tensor) -> Tensor:
    cdf = z.softmax(o.class_dim).cumsum(o.class_dim)
    # the last value is 1 up to rounding only; noise < 1 stays strictly below it, whatever it is
    total = cdf.narrow(o.class_dim, -1, 1)
    return (cdf <= noise.unsqueeze(o.class_dim) * total).sum(o.class_dim)


def _residual(o: _Options, z: Tensor, drawn: Tensor) -> Tensor:
    index = drawn.unsqueeze(o.class_dim)
    return z.softmax(o.class_dim).scatter_add(o.class_dim, index, -torch.ones_like(index, dtype=z.dtype))


def _root(o: _Options, z: Tensor, e: Tensor) -> Tensor:
    q = (0.5 * z.log_softmax(o.class_dim)).exp()
    along = q * e
    return along - q * q * along.sum(o.class_dim, keepdim=True)


def _curve(o: _Options, z: Tensor, v: Tensor) -> Tensor:
    p = z.softmax(o.class_dim)
    along = p * v
    return along - p * along.sum(o.class_dim, keepdim=True)


def _as_torch_wants(z: Tensor, targets: Tensor, class_dim: int) -> tuple[Tensor, Tensor]:
    """The classes in dimension 1 and integers of 64 bits; classes that are last stay contiguous."""
    targets = targets if targets.is_floating_point() else targets.long()
    if class_dim % z.dim() == z.dim() - 1:
        return z.flatten(0, -2), targets.flatten(0, -2) if targets.is_floating_point() else targets.flatten()
    return z.movedim(class_dim, 1), targets.movedim(class_dim, 1) if targets.is_floating_point() else targets


def _class_sum(x: Tensor, weight: Tensor | None, class_dim: int) -> Tensor:
    """Σ_c w_c x_c over the class dimension."""
    return x.sum(class_dim) if weight is None else (x.movedim(class_dim, -1) * weight).sum(-1)


def _check_options(o: _Options) -> None:
    check_reduction(o.reduction)
    check_weight("weight", o.weight)
    if o.weight is not None and o.weight.dim() != 1:
        raise HyperparameterError(
            explain("weight must have one entry per class.", got=list(o.weight.shape), wanted="[C]")
        )
    if not 0.0 <= o.label_smoothing <= 1.0:
        raise HyperparameterError(explain("label_smoothing must be in [0, 1].", got=o.label_smoothing))
    if o.class_dim == 0:
        raise HyperparameterError(
            explain("class_dim cannot be 0.", why="dimension 0 of the outputs holds the examples", options="1 or -1")
        )


def _check(o: _Options, z: Tensor, targets: Tensor) -> None:
    class_dim, shape = o.class_dim, tuple(z.shape)
    check_outputs(z, 2, "[N, C, ...], examples first")
    if not 1 <= (class_dim if class_dim > 0 else class_dim + z.dim()) < z.dim():
        raise TargetError(
            explain(f"the outputs have no class dimension {class_dim}.", got=list(shape), options="class_dim=1 or -1")
        )
    if o.weight is not None and len(o.weight) != shape[class_dim]:
        raise TargetError(
            explain(
                "the class weights do not fit the outputs.",
                got=f"{len(o.weight)} weights for {shape[class_dim]} classes in dimension {class_dim}",
                options="class_dim=... when the classes are in another dimension",
            )
        )
    if targets.is_floating_point():
        _check_probabilities(o, shape, targets)
        _check_values(o, targets)
    elif targets.dtype == torch.bool or targets.is_complex():
        raise TargetError(explain("targets must be class indices or probabilities.", got=targets.dtype))
    elif tuple(targets.shape) != _noise_shape(o, z):
        fitting = [i for i in range(1, z.dim()) if (*shape[:i], *shape[i + 1 :]) == tuple(targets.shape)]
        other = None if not fitting else -1 if fitting[-1] == z.dim() - 1 else fitting[-1]
        raise TargetError(
            explain(
                "the class indices do not fit the outputs.",
                got=f"targets {list(targets.shape)} for outputs {list(shape)} with class_dim={class_dim}",
                wanted=list(_noise_shape(o, z)),
                options=None if other is None else f"class_dim={other}",
            )
        )


def _check_probabilities(o: _Options, shape: tuple[int, ...], targets: Tensor) -> None:
    if tuple(targets.shape) != shape:
        raise TargetError(
            explain(
                "floating-point targets are class probabilities, and these do not fit the outputs.",
                got=list(targets.shape),
                wanted=list(shape),
                options="targets.long() if they are class indices" if targets.dim() == len(shape) - 1 else None,
            )
        )
    if o.ignore_index != _NO_INDEX:
        raise TargetError(
            explain(
                "ignore_index has no meaning for probability targets.",
                got=f"ignore_index={o.ignore_index}",
                options="rows of zeros in the targets have no loss and no curvature, without smoothing",
            )
        )


def _check_values(o: _Options, targets: Tensor) -> None:
    """Logits as targets are negative weights: the curvature has no square root, and K-FAC rejects every batch."""
    y = legible(targets)
    if y is None:
        return
    total = y.sum(o.class_dim, dtype=widen(y).dtype)
    if bool((y < -SLACK).any() | (((total - 1).abs() > SLACK) & (total != 0)).any()):
        raise TargetError(
            explain(
                "floating-point targets are class probabilities, and these are none.",
                got=f"entries from {y.min().item():.4g} to {y.max().item():.4g}, and sums over the classes "
                f"from {total.min().item():.4g} to {total.max().item():.4g}",
                wanted="numbers that are not negative and sum to 1 over the classes (or to 0: no target)",
                options=f"targets.softmax({o.class_dim}) if they are logits; kf.losses.mse() for other numbers",
            )
        )
