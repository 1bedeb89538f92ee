"""What Python may know about a tensor while it is traced."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def readable(x: Tensor) -> bool:
    """Whether Python may ask for the value: not under torch.compile, vmap or a transform.

    >>> readable(torch.tensor(1.0))
    True
    """
    return not torch.compiler.is_compiling() and not is_functorch_wrapped_tensor(x)


def at_hand(x: Tensor) -> bool:
    """Whether Python may ask for the value and gets it at once: readable, and nothing waits for a device.

    >>> at_hand(torch.tensor(1.0))
    True
    """
    return x.device.type == "cpu" and readable(x)


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
