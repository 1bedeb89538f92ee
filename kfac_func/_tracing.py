"""What Python may know about a tensor while it is traced."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor


def readable(x: Tensor) -> bool:
    """Whether Python may ask for the value: not under torch.compile, vmap or a transform.

    >>> readable(torch.tensor(1.0))
    True
    """
    return not torch.compiler.is_compiling() and not is_functorch_wrapped_tensor(x)
