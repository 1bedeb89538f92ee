"""From an nn.Module to a pure function on its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kfac_func._errors import CaptureError, explain
from kfac_func._typing import Model


def make_functional(module: nn.Module) -> tuple[Model, dict[str, Tensor]]:
    """Split a module into a pure function `fn(params, inputs) -> outputs` and its parameters.

    `params` is a flat dict name -> tensor: copies, so later changes of the module change nothing here and the other
    way round. `inputs` is a tensor, a tuple (positional arguments) or a dict (keyword arguments), with the examples
    in the first dimension. Buffers (the running statistics of a batch norm in eval mode, say) are copied once and are
    constants of `fn`. Tied parameters appear once.

    Raises CaptureError for a DistributedDataParallel module (`torch.func.grad` through it returns the LOCAL gradient
    without a word), and, when `fn` is called, for a batch norm in training mode, which would write into its buffers.

        >>> fn, params = make_functional(nn.Linear(3, 2))
        >>> sorted(params), fn(params, torch.ones(5, 3)).shape
        (['bias', 'weight'], torch.Size([5, 2]))
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise CaptureError(
            explain(
                "the module is wrapped in DistributedDataParallel.",
                why="torch.func differentiates through the wrapper without its communication: gradients would be local",
                options="pass module.module and average gradients and statistics over the ranks explicitly",
            )
        )
    params = {name: value.detach().clone() for name, value in module.named_parameters()}
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    norms = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def fn(params: dict[str, Tensor], inputs: Any) -> Tensor:
        for name, norm in norms:
            if norm.training and norm.track_running_stats:
                raise CaptureError(
                    explain(
                        f"batch norm {name!r} is in training mode.",
                        why="it would write its running statistics, so the function would not be pure",
                        options="call .eval() on it (its scale and shift still train), or use GroupNorm or LayerNorm",
                    )
                )
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
        kwargs = inputs if isinstance(inputs, dict) else {}
        return torch.func.functional_call(module, (params, buffers), args, kwargs)

    return fn, params
