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

DATA = vars(torch._C.TensorBase)["data"].__get__
"""Under several transforms it cuts the innermost alone, where `detach` cuts all."""

CUT = (
    *(torch.detach, Tensor.detach, DATA),
    *(getattr(torch, f"{name}_like") for name in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
    *(getattr(Tensor, f"new_{name}") for name in ("zeros", "ones", "empty", "full", "tensor")),
)
"""No gradient goes through these."""

_LIKE = (Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as)


def only_measured(func: Any, args: tuple, x: Tensor) -> bool:
    """Whether a call asks a tensor for no more than its shape or its kind."""
    return func in _LIKE and len(args) > 1 and x is args[1] and x is not args[0]


_CUT_UP = (
    *(torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.tensor_split, Tensor.tensor_split),
    *(torch.narrow, Tensor.narrow, torch.unbind, Tensor.unbind, torch.select, Tensor.select, Tensor.__getitem__),
)


def followed(ref: Ref, func: Any, args: tuple, kwargs: dict, result: Any) -> dict[Tensor, Ref]:
    """The parameter, or the part of it, that each result of a call is, whose first argument is one; none when it is
    another thing.
    """
    if func in _CUT_UP:
        return _parts(ref, func, args, kwargs, list(result) if isinstance(result, (tuple, list)) else [result])
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return {}
    if func in _COPIED or func in _CAST:
        return {result: ref}
    if func in _TURNED and not kwargs:
        return {result: ref._replace(order=_turned(func, ref.order, args[1:]))}
    if func in _SHAPED and not ref.part and ref.order == tuple(range(len(ref.shape))):
        return {result: Ref(ref.path, tuple(result.shape), tuple(range(result.ndim)))}
    return {}


def _parts(ref: Ref, func: Any, args: tuple, kwargs: dict, results: list[Tensor]) -> dict[Tensor, Ref]:
    """Parts along the dimensions of a vector or a matrix, or one of the vectors or matrices that it is put together of.
    The same call on a tensor without numbers says where they are.
    """
    given = _flat((args[1:], tuple(kwargs.values())))
    if any(isinstance(x, Tensor) or (isinstance(x, list) and func is Tensor.__getitem__) for x in given):
        return {}
    whole = torch.empty(args[0].shape, device="meta")
    cut = func(whole, *args[1:], **kwargs)
    if any(x.ndim < whole.ndim for x in results):
        if ref.part or whole.ndim not in (2, 3) or ref.order != tuple(range(whole.ndim)):
            return {}
        ref = Ref(ref.path, (ref.shape[0] * ref.shape[1], *ref.shape[2:]), ref.order[:-1])
        whole = whole.flatten(0, 1)
    found, before = {}, ref.part or tuple((0, size) for size in ref.shape)
    for x, seen in zip(results, cut if isinstance(cut, (tuple, list)) else [cut], strict=True):
        at = _place(whole, seen)
        if at is None or len(ref.shape) > 2:
            return {}
        part = list(before)
        for d, (start, length) in zip(ref.order, at, strict=True):
            part[d] = (before[d][0] + start, length)
        found[x] = ref._replace(part=() if tuple(n for _, n in part) == ref.shape else tuple(part))
    return found


def _place(whole: Tensor, x: Tensor) -> list[tuple[int, int]] | None:
    """Start and length in every dimension, of a view of a contiguous tensor; None for others, and for an empty one."""
    if x.stride() != whole.stride() or x.numel() == 0:
        return None
    starts, offset = [], int(x.storage_offset())
    for step in whole.stride():
        starts.append(offset // step)
        offset %= step
    return list(zip(starts, x.shape, strict=True))


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, tuple) else [value]


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
