"""Losses of the library with their options, and the same by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from tests.fuzz.draw import Draw, Shape, like


class Drawn(NamedTuple):
    """make: dtype -> the library's loss;  value: the same by torch, (z, targets) -> scalar;  targets in float64."""

    name: str
    make: Callable[[torch.dtype], kf.losses.Loss]
    value: Callable[[Tensor, Tensor], Tensor]
    targets: Tensor


def _reduced(terms: Tensor, reduction: str) -> Tensor:
    return terms.mean() if reduction == "mean" else terms.sum() / (len(terms) if reduction == "batchmean" else 1)


def squares(d: Draw, shape: Shape) -> Drawn:
    reduction, scale = d.pick("mean", "sum", "batchmean"), d.pick(1.0, 0.5, 2.0)

    def value(z: Tensor, y: Tensor) -> Tensor:
        return scale * _reduced((z - y) ** 2, reduction)

    return Drawn(f"mse {reduction}", lambda _: kf.losses.mse(reduction, scale), value, d.normal(*shape))


def bernoulli(d: Draw, shape: Shape) -> Drawn:
    reduction, soft = d.pick("mean", "sum", "batchmean"), d.chance(0.3)
    weight, pos = (0.3 + d.uniform(*shape[1:]) if d.chance(0.3) else None for _ in range(2))
    targets = d.uniform(*shape) if soft else d.ints(2, *shape).double()

    def make(dtype: torch.dtype) -> kf.losses.Loss:
        w, p = (x if x is None else x.to(dtype) for x in (weight, pos))
        return kf.losses.bce_with_logits(w, p, reduction)

    def value(z: Tensor, y: Tensor) -> Tensor:
        w, p = (None if x is None else like(x, z) for x in (weight, pos))
        return _reduced(F.binary_cross_entropy_with_logits(z, y, w, pos_weight=p, reduction="none"), reduction)

    return Drawn(f"bce {reduction}", make, value, targets)


def categorical(d: Draw, shape: Shape) -> Drawn:
    dim = 1 if len(shape) == 2 else d.pick(1, len(shape) - 1, -1)
    places = [n for k, n in enumerate(shape) if k != dim % len(shape)]
    classes, reduction = shape[dim], d.pick("mean", "mean", "sum", "batchmean")
    smoothing, soft = d.pick(0.0, 0.0, 0.1), d.chance(0.2)
    weight = 0.3 + d.uniform(classes) if d.chance(0.3) else None
    ignored = None if soft else d.pick(None, None, -100, 0, -1)
    targets = d.normal(*places, classes).softmax(-1).movedim(-1, dim) if soft else d.ints(classes, *places)
    if ignored is not None:
        targets = torch.where(d.uniform(*places) < 0.4, ignored, targets)
        targets.view(-1)[0] = classes - 1 if classes - 1 != ignored else 0
        if bool((targets == ignored).all()):
            ignored = None
    targets = targets.clamp(min=0) if ignored is None and not soft else targets
    index: dict[str, Any] = {} if ignored is None else {"ignore_index": ignored}

    def make(dtype: torch.dtype) -> kf.losses.Loss:
        w = weight if weight is None else weight.to(dtype)
        return kf.losses.cross_entropy(w, label_smoothing=smoothing, reduction=reduction, class_dim=dim, **index)

    def value(z: Tensor, y: Tensor) -> Tensor:
        z, y = z.movedim(dim, 1), y.movedim(dim, 1) if soft else y
        w = weight if weight is None else like(weight, z)
        kind = "sum" if reduction == "batchmean" else reduction
        total = F.cross_entropy(z, y, w, label_smoothing=smoothing, reduction=kind, **index)
        return total / len(z) if reduction == "batchmean" else total

    name = (
        "cross-entropy " + reduction + (" of probabilities" if soft else " with ignored" if ignored is not None else "")
    )
    return Drawn(name, make, value, targets)


def drawn(d: Draw, shape: Shape) -> Drawn:
    """A loss for outputs of this shape [N, *out]."""
    if len(shape) == 1 or d.chance(0.5):
        return d.pick(squares, bernoulli)(d, shape)
    return categorical(d, shape)
