"""From an nn.Module to a pure function on its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_func._errors import CaptureError, explain
from kfac_func._tracing import version
from kfac_func._typing import Model


def make_functional(module: nn.Module) -> tuple[Model, dict[str, Tensor]]:
    """Split a module into a pure function `fn(params, inputs) -> outputs` and its parameters.

    `params` is a flat dict name -> tensor: copies, so later changes of the module change nothing here and the other
    way round. Parameters that are frozen (`requires_grad=False`) are none: they are constants of `fn`, by name in
    `fn.frozen`. `inputs` is a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments), with the
    examples in the first dimension. Buffers (the running statistics of a batch norm in eval mode, say) are copied once
    and are constants of `fn`. Tied parameters appear once. A module that torch.compile wrapped runs as it was written.

    Raises CaptureError for a DistributedDataParallel module (`torch.func.grad` through it returns the LOCAL gradient
    without a word), for one that torch.jit scripted or traced, for a module all of whose parameters are frozen, and,
    when `fn` is called, for a module that writes into its buffers (batch norm and spectral norm in training mode).

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
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            explain(
                "the module is scripted or traced.",
                got=type(module).__name__,
                why="torch.func cannot put parameters into it, nor the tape see what it does with them",
                options="pass the module that it was made of; parts of it may be scripted, if they train nothing",
            )
        )
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    params = {name: value.detach().clone() for name, value in trained.items()}
    frozen = {n: value.detach().clone() for n, value in module.named_parameters() if not value.requires_grad}
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    if frozen and not params:
        raise CaptureError(
            explain(
                "all parameters of the module are frozen.",
                got=f"{len(frozen)} parameters with requires_grad=False",
                options="module.requires_grad_(True), or that of the layers that are trained",
            )
        )
    renormed = [name for name in params if getattr(_module(module, name), "max_norm", None) is not None]

    def fn(params: dict[str, Tensor], inputs: Any) -> Any:
        _refuse_writers(module)
        own = {**frozen, **params, **{name: params[name].clone() for name in renormed if name in params}}
        kept = (
            {name: value.clone() for name, value in buffers.items()}
            if any(part.training for part in module.modules())
            else buffers
        )
        before = {name: version(value) for name, value in kept.items()}
        state = {**own, **kept}
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else () if isinstance(inputs, Mapping) else (inputs,)
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        found = torch.func.functional_call(module, state, args, kwargs)
        for name, value in kept.items():
            if state[name] is not value or version(value) != before[name]:
                raise _written(f"buffer {name!r}", "it")
        return found

    fn.frozen = frozen  # pyright: ignore[reportFunctionMemberAccess]
    return fn, params


def _module(module: nn.Module, name: str) -> nn.Module:
    """The module that owns a parameter."""
    return module.get_submodule(name.rpartition(".")[0])


def _refuse_writers(module: nn.Module) -> None:
    """Raise CaptureError for modules that would write their buffers, before they do."""
    for name, part in module.named_modules():
        batch_norm = isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats
        if part.training and batch_norm:
            raise _written(f"batch norm {name!r}", "its running statistics")
        if part.training and type(part).__name__ in ("_SpectralNorm", "SpectralNorm"):
            raise _written(f"spectral norm {name!r}", "its vectors of the power iteration")


def _written(what: str, buffers: str) -> CaptureError:
    norm = "batch norm" in what
    return CaptureError(
        explain(
            f"{what} is in training mode." if buffers != "it" else f"the module writes into its {what}.",
            why=f"it would write {buffers}, so the function would not be pure",
            options="call .eval() on it (its scale and shift still train), or use GroupNorm or LayerNorm"
            if norm
            else "call .eval() on the part that owns it",
        )
    )
