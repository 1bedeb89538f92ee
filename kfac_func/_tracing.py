"""What Python may know about a tensor while it is traced."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")


def readable(x: Tensor) -> bool:
    """Whether Python may ask for the value: not under torch.compile, vmap or a transform.

    >>> readable(torch.tensor(1.0))
    True
    """
    return not torch.compiler.is_compiling() and not is_functorch_wrapped_tensor(x)


def at_hand(x: Tensor) -> bool:
    """Whether Python may ask for the value and gets it at once: readable, no stand-in of a tracer, and nothing waits
    for a device.

    >>> at_hand(torch.tensor(1.0))
    True
    """
    return readable(x) and x.device.type == "cpu" and type(x) in _PLAIN and not is_in_torch_dispatch_mode()


_PLAIN = (Tensor, torch.nn.Parameter)


def untouched(x: Tensor) -> bool:
    """Whether a tensor was certainly never written in place.

    >>> x = torch.zeros(1)
    >>> untouched(x), untouched(x.add_(1))
    (True, False)
    """
    return torch.compiler.is_compiling() or (not x.is_inference() and x._version == 0)


def version(x: Tensor) -> int:
    """How often a tensor was written in place, where torch counts that; else 0."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def known_bad(tensors: Iterable[Tensor]) -> bool:
    """Whether some number is certainly NaN or infinite: values that cannot be read are not asked for.

    >>> known_bad([torch.ones(2), torch.tensor(float("nan"))])
    True
    """
    flags = [x.isfinite().all() for x in tensors if readable(x)]
    return bool(flags) and not bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def level() -> int:
    """How many torch.func transforms are around; 0 outside of all, and for a compiler.

    >>> level()
    0
    """
    top = None if torch.compiler.is_compiling() else peek_interpreter_stack()
    return 0 if top is None else top.level()


def transform() -> str:
    """The innermost torch.func transform around, as users know it.

    >>> seen = []
    >>> _ = torch.func.vmap(lambda x: (seen.append(transform()), x)[1])(torch.ones(2))
    >>> seen
    ['torch.func.vmap']
    """
    top = peek_interpreter_stack()
    names = {"Vmap": "torch.func.vmap", "Grad": "torch.func.grad or vjp", "Jvp": "torch.func.jvp"}
    return "no transform" if top is None else names.get(str(top.key()).rpartition(".")[2], "a transform")


def plain(x: Tensor) -> Tensor:
    """The numbers of a tensor under transforms, for decisions of the host; of the first member of a stacked one.

    >>> seen = []
    >>> _ = torch.func.vmap(lambda x: (seen.append(plain(x)), x)[1])(torch.arange(3))
    >>> seen[0]
    tensor(0)
    """
    with temporarily_clear_interpreter_stack():
        while is_functorch_wrapped_tensor(x):
            dim = maybe_get_bdim(x)
            x = get_unwrapped(x)
            x = x.select(dim, 0) if dim >= 0 else x
        return x.detach()


def settled(x: Tensor) -> Tensor:
    """A parameter of a module as plain numbers, so that no step hangs on it; all other tensors keep their history.

    >>> settled(torch.nn.Parameter(torch.ones(1)))
    tensor([1.])
    """
    return x.detach() if isinstance(x, torch.nn.Parameter) else x


def without_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """The function in the precision of its arguments, whatever autocast there is around it.

    >>> with torch.autocast("cpu"):
    ...     without_autocast(torch.mm)(torch.ones(1, 1), torch.ones(1, 1)).dtype
    torch.float32
    """

    @functools.wraps(fn)
    def plainly(*args: P.args, **kwargs: P.kwargs) -> R:
        around = () if torch.compiler.is_compiling() else ("cpu", "cuda")
        if not any(map(torch.is_autocast_enabled, around)):
            return fn(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, around):
                stack.enter_context(torch.autocast(device, enabled=False))
            return fn(*args, **kwargs)

    return plainly


def legible(x: Tensor) -> Tensor | None:
    """The numbers of a tensor under transforms, as `plain`, where they are at hand; else None.

    >>> legible(torch.tensor(1.0))
    tensor(1.)
    """
    found = None if torch.compiler.is_compiling() else plain(x)
    return found if found is not None and at_hand(found) else None


def autocasting() -> tuple[Any, ...]:
    """Under which autocast operations run now, on the CPU and on a GPU: None where under none.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocasting()
    (torch.bfloat16, None)
    """
    kinds = ("cpu", "cuda")
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)
