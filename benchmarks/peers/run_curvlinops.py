"""K-FAC of curvlinops 3: empirical Fisher, π damping, Cholesky, no moving average (it has none)."""

from __future__ import annotations

from typing import Any

from curvlinops import KFACInverseLinearOperator, KFACLinearOperator  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.harness import Step
from benchmarks.peers.common import DAMPING, descend, gradients, layers, model_and_loss
from benchmarks.steps import Task


def steps(task: Task) -> dict[str, Step]:
    """Factors come from a forward and backward pass of their own, as its interface has it."""
    module, loss = model_and_loss(task)
    covered = [p for layer in layers(module).values() for p in layer.parameters()]
    data = [(task.inputs, task.targets)]
    options = {"check_deterministic": False, "fisher_type": "empirical", "separate_weight_and_bias": False}

    def factors() -> Any:
        found = KFACLinearOperator(module, loss, covered, data, **options)
        found.compute_kronecker_factors()
        return found

    def inverse() -> Any:
        return KFACInverseLinearOperator(factors(), damping=DAMPING, use_heuristic_damping=True)

    def move(inverse: Any) -> Tensor:
        value = gradients(module, loss, task)
        descend(module, dict(zip(covered, inverse @ [p.grad for p in covered], strict=True)))
        return value

    def stats() -> Tensor:
        factors()
        return move(held)

    held = inverse()
    return {
        "full": Step(lambda: move(inverse()), trains=True),
        "stats": Step(stats, trains=True),
        "pre": Step(lambda: move(held), trains=True),
    }
