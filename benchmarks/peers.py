"""Other optimisers beside ours, each in the same rounds as the plain step. An absent package is left out, no error.

A peer is a function from a task to steps by kind: "full", "stats", "pre" (as many as it has), or "step" when it knows
only one. To add one: write that function, import its package inside it, and give it a line in PEERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Step
from benchmarks.steps import RATE, Task, plain


def adamw(task: Task) -> dict[str, Step]:
    """torch.optim.AdamW, as cheap as adaptive methods get."""
    return {"step": plain(task, torch.optim.AdamW)}


def curvlinops(task: Task) -> dict[str, Step]:
    """K-FAC of curvlinops 3: empirical Fisher, π damping, Cholesky; only linear and conv2d layers have curvature."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator  # pyright: ignore[reportMissingImports]

    pictures = task.targets.is_floating_point()
    loss: Any = nn.BCEWithLogitsLoss() if pictures else nn.CrossEntropyLoss()
    module = task.module() if pictures or task.targets.ndim == 1 else _ClassesSecond(task.module())
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    covered = [p for layer in layers for p in layer.parameters()]
    data = [(task.inputs, task.targets)]
    options = {"check_deterministic": False, "fisher_type": "empirical", "separate_weight_and_bias": False}

    def inverse() -> Any:
        factors = KFACLinearOperator(module, loss, covered, data, **options)
        return KFACInverseLinearOperator(factors, damping=1e-3, use_heuristic_damping=True)

    def move(held: Any) -> Tensor:
        for p in module.parameters():
            p.grad = None
        value = loss(module(task.inputs), task.targets)
        value.backward()
        grads = [p.grad for p in covered]
        directions = dict(zip(covered, held @ grads, strict=True))
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(directions.get(p, p.grad), alpha=RATE)
        return value

    held = inverse()
    return {"full": Step(lambda: move(inverse()), trains=True), "pre": Step(lambda: move(held), trains=True)}


class _ClassesSecond(nn.Module):
    """Logits [N, T, classes] as torch's cross entropy wants them, [N, classes, T]."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(-1, 1)


PEERS: dict[str, tuple[str, Callable[[Task], dict[str, Step]]]] = {
    "adamw": ("torch", adamw),
    "curvlinops": ("curvlinops", curvlinops),
}
"""By name: the package that must be installed, and the function that makes the steps."""


def installed(peers: Mapping[str, tuple[str, Any]] = PEERS) -> list[str]:
    """The peers whose package is here."""
    return [name for name, (package, _) in peers.items() if find_spec(package) is not None]


def peer_steps(task: Task, names: list[str]) -> dict[str, Step]:
    """The steps of some peers, named "adamw step", "curvlinops full" and so on."""
    return {f"{name} {kind}": step for name in names for kind, step in PEERS[name][1](task).items()}
