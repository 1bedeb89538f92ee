"""K-FAC of NNGeometry: one sampled target per example, π damping, `torch.linalg` inverses, no moving average.

Statistics take a forward and backward pass of their own, as its interface has it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from nngeometry.backend import TorchHooksJacobianBackend  # pyright: ignore[reportMissingImports]
from nngeometry.layercollection import LayerCollection  # pyright: ignore[reportMissingImports]
from nngeometry.object import PMatKFAC, PVector  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Step
from benchmarks.peers.common import DAMPING, descend, gradients, layers, model_and_loss
from benchmarks.steps import Task


def steps(task: Task) -> dict[str, Step]:
    """All three kinds."""
    if not task.inputs.is_floating_point():
        raise NotImplementedError("its backend asks for gradients with respect to the inputs: no tokens")
    module, loss = model_and_loss(task)
    mine, known = layers(module), LayerCollection()
    for layer in mine.values():
        known.add_layer_from_model(module, layer)
    loader = DataLoader(TensorDataset(task.inputs, task.targets), batch_size=len(task.inputs))
    backend = TorchHooksJacobianBackend(
        layer_collection=known, model=module, function=lambda x, *_: _sampled(module(x), loss)
    )

    def factors() -> Any:
        module.zero_grad(set_to_none=True)
        return PMatKFAC(generator=backend, examples=loader)

    def move(inverse: Any) -> Tensor:
        value = gradients(module, loss, task)
        grads = {name: (layer.weight.grad, layer.bias.grad) for name, layer in mine.items()}  # type: ignore[union-attr]
        found = inverse.mv(PVector(known, dict_repr=grads)).to_dict()
        directions: dict[nn.Parameter, Tensor] = {}
        for name, layer in mine.items():
            directions |= dict(zip((layer.weight, layer.bias), found[name], strict=True))  # type: ignore[arg-type]
        descend(module, directions)
        return value

    def stats() -> Tensor:
        factors()
        return move(held)

    def inverse() -> Any:
        return factors().inverse(regul=DAMPING)

    held = inverse()
    return {
        "full": Step(lambda: move(inverse()), trains=True),
        "stats": Step(stats, trains=True),
        "pre": Step(lambda: move(held), trains=True),
    }


def _sampled(z: Tensor, loss: nn.Module) -> Tensor:
    """The log likelihood of a target drawn from the model, [N, 1]: what the package differentiates."""
    if isinstance(loss, nn.BCEWithLogitsLoss):
        y = torch.bernoulli(torch.sigmoid(z.detach()))
        return -F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1, keepdim=True)
    logs = torch.log_softmax(z, dim=1)
    return torch.gather(logs, 1, torch.multinomial(logs.detach().exp(), 1))
