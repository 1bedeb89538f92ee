"""The variants that are timed on a workload: the plain step, the phases of a K-FAC step, three kinds of whole step.

    sgd                    nn.Module forward, .backward(), torch.optim.SGD: what everything is divided by
    gradient               value_grad_and_stats(stats=False): value and gradient alone
    capture                the recorded forward pass, without any backward pass
    monte_carlo, empirical value, gradient and statistics of that estimator, not yet measured
    measure                moments from statistics that exist
    factorize              damping and inverses of averages that exist
    precondition           solving for gradients that exist
    full, stats, pre       whole steps that train: with statistics and refresh, with statistics only, with neither

All training variants go down with the same small rate: a stale inverse must stay harmless over thousands of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kfac_func as kf
from benchmarks.harness import BASELINE, Step
from benchmarks.workloads import SEED, Workload
from kfac_func.capture import record

RATE = 1e-5
KINDS = ("full", "stats", "pre")
ESTIMATORS: dict[str, Callable[[], kf.estimators.Estimator]] = {
    "monte_carlo": kf.estimators.monte_carlo,
    "empirical": kf.estimators.empirical,
}
PHASES = ("gradient", "capture", "monte_carlo", "empirical", "measure", "factorize", "precondition")


class Task(NamedTuple):
    """A workload on a device with a batch in memory; `examples` may be smaller than the workload's own number."""

    workload: Workload
    device: torch.device
    inputs: Tensor
    targets: Tensor

    def module(self) -> nn.Module:
        """A fresh module with the seeded weights."""
        return self.workload.model().to(self.device)


def make_task(workload: Workload, device: torch.device, examples: int | None = None) -> Task:
    """Put a batch on the device."""
    inputs, targets = workload.batch(examples or workload.examples)
    return Task(workload, device, inputs.to(device), targets.to(device))


def plain(task: Task, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> Step:
    """The step everything is compared with, or the same with another torch optimiser."""
    module = task.module()
    rule = optimizer(module.parameters(), lr=RATE)
    loss = task.workload.torch_loss

    def run() -> Tensor:
        rule.zero_grad(set_to_none=True)
        value = loss(module(task.inputs), task.targets)
        value.backward()
        rule.step()
        return value

    return Step(run, trains=True)


def _generator(task: Task) -> torch.Generator:
    return torch.Generator(task.device).manual_seed(SEED)


def whole(task: Task, kind: str, estimator: str = "monte_carlo") -> Step:
    """A training step of default `kfac()` and plain descent: "full", "stats" or "pre" (after one full step)."""
    fn, start = kf.make_functional(task.module())
    step = kf.value_grad_and_stats(fn, task.workload.loss, estimator=ESTIMATORS[estimator]())
    tx = kf.chain(kf.kfac(), kf.sgd(RATE))
    generator = _generator(task)
    batch = task.inputs, task.targets

    def move(params: Any, state: Any, kind: str) -> tuple[Tensor, Any, Any]:
        value, grads, stats = step(params, batch, generator=generator, stats=kind != "pre")
        updates, state = tx.update(grads, state, params, stats=stats, refresh=kind == "full")
        return value, kf.apply_updates(params, updates), state

    _, params, state = move(start, tx.init(start), "full")

    def run() -> Tensor:
        nonlocal params, state
        value, params, state = move(params, state, kind)
        return value

    return Step(run, trains=True)


def phases(task: Task) -> dict[str, Step]:
    """The parts of a step, each on tensors that already exist."""
    fn, params = kf.make_functional(task.module())
    loss, batch, generator = task.workload.loss, (task.inputs, task.targets), _generator(task)
    curvature = kf.curvature.blockwise(kf.curvature.kronecker(), kf.curvature.diagonal())
    steps = {name: kf.value_grad_and_stats(fn, loss, estimator=make()) for name, make in ESTIMATORS.items()}
    plan = kf.make_plan(fn, params, task.inputs)
    _, grads, stats = steps["monte_carlo"](params, batch, generator=generator)
    assert stats is not None
    held = stats.blocks()
    state = kf.observe(kf.kfac().init(params), stats)
    damping = torch.tensor(1e-3, dtype=torch.float64, device=task.device)
    return {
        "gradient": Step(lambda: steps["monte_carlo"](params, batch, stats=False)),
        "capture": Step(lambda: record(fn, plan, params, task.inputs)),
        "monte_carlo": Step(lambda: steps["monte_carlo"](params, batch, generator=generator)),
        "empirical": Step(lambda: steps["empirical"](params, batch, generator=generator)),
        "measure": Step(lambda: curvature.measure(held)),
        "factorize": Step(lambda: curvature.factorize(state.curvature, dict.fromkeys(held, damping), "pi")),
        "precondition": Step(lambda: kf.precondition(state, grads)),
    }


def compiled(task: Task) -> Step:
    """The functional gradient and plain descent as one compiled graph (its first call takes many seconds)."""
    fn, params = kf.make_functional(task.module())
    step, tx = kf.value_grad_and_stats(fn, task.workload.loss), kf.sgd(RATE)
    fixed = tx.init(params)

    @torch.compile(fullgraph=True, dynamic=False)
    def move(params: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        value, grads, _ = step(params, (inputs, targets), stats=False)
        updates, _ = tx.update(grads, fixed, params)
        return value, kf.apply_updates(params, updates)

    def run() -> Tensor:
        nonlocal params
        value, params = move(params, task.inputs, task.targets)
        return value

    return Step(run, trains=True)


def standard(task: Task, estimator: str = "monte_carlo") -> dict[str, Step]:
    """What the table of schedules needs: the baseline, the baseline once more, and the three kinds of step."""
    kinds = {kind: whole(task, kind, estimator) for kind in KINDS}
    return {BASELINE: plain(task), "sgd again": plain(task), **kinds}
