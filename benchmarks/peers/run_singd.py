"""SINGD with dense factors: empirical Fisher, inverse-free, so that statistics and "inverse" are one thing.

Its own layers only (linear and conv2d): the others are not trained. Without momentum and weight decay, as the others.
"""

from __future__ import annotations

from singd.optim.optimizer import SINGD  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.harness import Step
from benchmarks.peers.common import DAMPING, gradients, model_and_loss
from benchmarks.steps import RATE, Task

NEVER = 10**9


def steps(task: Task) -> dict[str, Step]:
    """A step with an update of the factors, and one without."""
    tokens = task.targets.ndim == 2 and not task.targets.is_floating_point()

    def step(every: int) -> Step:
        module, loss = model_and_loss(task)
        average = "batch+sequence" if tokens else "batch"
        rule = SINGD(
            module, lr=RATE, momentum=0.0, damping=DAMPING, T=every, loss_average=average, warn_unsupported=False
        )

        def run() -> Tensor:
            value = gradients(module, loss, task)
            rule.step()
            return value

        return Step(run, trains=True)

    return {"full": step(1), "pre": step(NEVER)}
