"""Scale and shift by hand, broadcast over examples and positions: y = x ∘ w, y = x + w, y = x − w; and w itself, once
for every example (a class token). PReLU is a scale of min(x, 0).

    V_n = Σ g ∘ x,     V_n = Σ g,     over all dimensions along which w is repeated

A vector block, exact for every example. Only results that hold the examples are uses (`planning`): a weight that is
scaled or shifted itself, before a layer reads it, is another thing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfac_func.blocks import Kind
from kfac_func.layers.base import Call, Found, Handler, ref_of


def own_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """What w has of the dimensions of one example: the first along which it is repeated is that of the examples.

    >>> own_sizes((1, 3, 1))
    (3, 1)
    """
    first = sizes.index(1)
    return sizes[:first] + sizes[first + 1 :]


def _summed(y: Tensor, options: tuple, lead: int) -> Tensor:
    """Sum [*lead, *rest] over what w is repeated along, flattened to [*lead, p]."""
    sizes = options[0] if len(options[0]) == y.ndim - lead else own_sizes(options[0])
    repeated = [lead + d for d, size in enumerate(sizes) if size == 1]
    y = y.sum(repeated, keepdim=True) if repeated else y
    return options[1] * y.flatten(lead) if y.ndim > lead else options[1] * y.unsqueeze(-1)


def _scale_rows(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return _summed(g * x, options, 2)


def _scale_gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return _summed((g * x).sum(0), options, 0)


def _shift_rows(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return _summed(g, options, 2)


def _shift_gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return _summed(g.sum(0), options, 0)


scale = Kind("scale", _scale_gradient, per_example=_scale_rows)
shift = Kind("shift", _shift_gradient, per_example=_shift_rows)
"""`options` = (sizes of w in the dimensions of y, its sign)."""


def _found(call: Call, kind: Kind, x: object, w: object, sign: float = 1.0) -> Found | None:
    if not isinstance(x, Tensor) or call.ref(x) is not None:
        return None
    return _repeated(call, kind, x, w, sign)


def _repeated(call: Call, kind: Kind, x: Tensor, w: object, sign: float = 1.0) -> Found | None:
    own = ref_of(call, w)
    if own is None or not isinstance(w, Tensor):
        return None
    y = call.run()
    if not y.is_floating_point() or y.ndim < w.ndim or 1 not in (sizes := (1,) * (y.ndim - w.ndim) + tuple(w.shape)):
        return None
    if any(size not in (1, length) for size, length in zip(sizes, y.shape, strict=True)):  # repeated as a whole
        return None
    return Found(
        kind=kind,
        options=(sizes, sign),
        weight=own,
        bias=None,
        inputs=x.expand(y.shape) if kind is scale else y.new_zeros(()).expand(y.shape),
        output=y,
        positions=y.numel() // max(w.numel(), 1),
        outputs=w.numel(),
    )


def _mul(call: Call) -> Found | None:
    x, w = call.bind("input", "other")
    return _found(call, scale, x, w) or _found(call, scale, w, x)


def _add(call: Call) -> Found | None:
    x, w, alpha = call.bind("input", "other", "alpha", alpha=1)
    return _found(call, shift, x, w, alpha) or _found(call, shift, w, x)


def _sub(call: Call) -> Found | None:
    x, w, alpha = call.bind("input", "other", "alpha", alpha=1)
    return _found(call, shift, x, w, -alpha) or _found(call, shift, w, x)


def _expand(call: Call) -> Found | None:
    w = call.args[0] if call.args else None
    return _repeated(call, shift, w, w) if isinstance(w, Tensor) else None


def _prelu(call: Call) -> Found | None:
    x, w = call.bind("input", "weight")
    own, y = ref_of(call, w), call.run()
    if own is None or not isinstance(x, Tensor):
        return None
    sizes = (1, *w.shape, *[1] * (x.ndim - 2))[: x.ndim]
    low = x.clamp(max=0)
    return Found(scale, (sizes, 1.0), own, None, low, y, y.numel() // max(w.numel(), 1), outputs=w.numel())


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """torch.addcmul as the two uses that it is."""
    return torch.add(input, torch.mul(tensor1, tensor2), alpha=value)


expansions: dict[object, Callable[..., Tensor]] = dict.fromkeys((torch.addcmul, Tensor.addcmul), addcmul)
handlers: dict[object, Handler] = {
    **dict.fromkeys((torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__), _mul),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to), _expand),
    **dict.fromkeys((torch.prelu, Tensor.prelu), _prelu),
    **dict.fromkeys((torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__), _sub),
}
