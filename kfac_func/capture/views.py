"""What becomes of a parameter that a model does not use at once: views and copies are still the parameter, and some
calls do not use it at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_func.layers import Ref

_T, _MT = vars(torch._C.TensorBase)["T"].__get__, vars(torch._C.TensorBase)["mT"].__get__
_PERMUTED = (torch.permute, Tensor.permute)
_TURNED = (_T, _MT, torch.t, Tensor.t, torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, *_PERMUTED)
_COPIED = (torch.clone, Tensor.clone, Tensor.contiguous)
_CAST = (
    *(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
    *(Tensor.cpu, Tensor.cuda),
)
_SHAPED = (
    *(torch.reshape, Tensor.reshape, Tensor.view, Tensor.view_as, Tensor.reshape_as, torch.flatten, Tensor.flatten),
    *(torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, torch.unflatten, Tensor.unflatten),
)

CUT = (
    *(torch.detach, Tensor.detach, vars(torch._C.TensorBase)["data"].__get__),
    *(getattr(torch, f"{name}_like") for name in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
    *(getattr(Tensor, f"new_{name}") for name in ("zeros", "ones", "empty", "full", "tensor")),
)
"""No gradient goes through these."""

_LIKE = (Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as)


def only_measured(func: Any, args: tuple, x: Tensor) -> bool:
    """Whether a call asks a tensor for no more than its shape or its kind."""
    return func in _LIKE and len(args) > 1 and x is args[1] and x is not args[0]


def followed(ref: Ref, func: Any, args: tuple, kwargs: dict, result: Any) -> Ref | None:
    """The parameter that the result of a call is, whose first argument is one; None when it is another thing."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return None
    if func in _COPIED or func in _CAST:
        return ref if result.numel() == torch.Size(ref.shape).numel() else None
    if func in _TURNED and not kwargs:
        return ref._replace(order=_turned(func, ref.order, args[1:]))
    if func in _SHAPED and ref.order == tuple(range(len(ref.shape))):
        return Ref(ref.path, tuple(result.shape), tuple(range(result.ndim)))
    return None


def _turned(func: Any, order: tuple[int, ...], args: tuple) -> tuple[int, ...]:
    if func in _PERMUTED:
        dims = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return tuple(order[d] for d in dims)
    one, two = args if args else (-1, -2)
    if func == _T:
        return order[::-1]
    if len(order) < 2:
        return order
    turned = list(order)
    turned[one], turned[two] = turned[two], turned[one]
    return tuple(turned)
