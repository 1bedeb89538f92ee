"""What the adapters of torch packages share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.steps import RATE, Task

DAMPING, DECAY = 1e-3, 0.95


class ClassesSecond(nn.Module):
    """Logits [N, T, classes] as torch's cross entropy wants them, [N, classes, T]."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(-1, 1)


def model_and_loss(task: Task) -> tuple[nn.Module, nn.Module]:
    """The model with outputs as a loss module of torch wants them, and that module. Both average over all outputs."""
    if task.targets.is_floating_point():
        return task.module(), nn.BCEWithLogitsLoss()
    return task.module() if task.targets.ndim == 1 else ClassesSecond(task.module()), nn.CrossEntropyLoss()


def layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that all of these packages know, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def gradients(module: nn.Module, loss: nn.Module, task: Task) -> Tensor:
    """Forward and backward; the gradients are in the parameters."""
    module.zero_grad(set_to_none=True)
    value = loss(module(task.inputs), task.targets)
    value.backward()
    return value.detach()


def descend(module: nn.Module, directions: Mapping[nn.Parameter, Tensor]) -> None:
    """θ ← θ − rate · v, with the gradient for parameters that have no direction."""
    with torch.no_grad():
        for p in module.parameters():
            step = directions.get(p, p.grad)
            if step is not None:
                p.sub_(step, alpha=RATE)
