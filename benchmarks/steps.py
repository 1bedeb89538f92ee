"""The variants that are timed on a workload: the plain step, the phases of a K-FAC step, three kinds of whole step.

    sgd                nn.Module forward, .backward(), torch.optim.SGD: what everything is divided by
    full, stats, pre   whole steps that train: with statistics and refresh, with statistics only, with neither
    full compiled ...  the same by `kf.compile_step`

    gradient     value and gradient alone                 measure     moments from statistics that exist, and averages
    capture      the recorded forward pass alone          factorise   damping and inverses of averages that exist
    statistics   value, gradient and statistics           solve       the solved gradient
                                                          apply       plain descent with updates that exist

A full step is statistics + measure + factorise + solve + apply ("sum of phases" in the tables). All training variants
go down with the same small rate: a stale inverse must stay harmless over thousands of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kfac_func as kf
from benchmarks.harness import BASELINE, Step
from benchmarks.records import ITSELF
from benchmarks.workloads import SEED, Workload
from kfac_func.capture import record

RATE = 1e-5
KINDS = ("full", "stats", "pre")
ESTIMATORS: dict[str, Callable[[], kf.estimators.Estimator]] = {
    "monte_carlo": kf.estimators.monte_carlo,
    "empirical": kf.estimators.empirical,
}
PHASES = ("gradient", "capture", "statistics", "measure", "factorise", "solve", "apply")
PARTS_OF_FULL = ("statistics", "measure", "factorise", "solve", "apply")
COMPILED = "{} compiled"


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


def eager(
    fn: Callable[..., Tensor], loss: kf.losses.Loss, tx: kf.GradientTransformation, *, estimator: Any = None
) -> Callable[..., Any]:
    """What `kf.compile_step` makes, without a compiler."""
    step = kf.value_grad_and_stats(fn, loss, estimator=estimator, rows=True)

    def train(
        params: Any, state: Any, batch: Any, *, generator: Any = None, stats: bool = True, refresh: bool | None = None
    ) -> tuple[Tensor, Any, Any]:
        value, grads, found = step(params, batch, generator=generator, stats=stats)
        updates, state = tx.update(grads, state, params, stats=found, refresh=refresh)
        return value, kf.apply_updates(params, updates), state

    return train


def _convolves(task: Task) -> bool:
    """Where compiling the statistics makes them slower, says `kf.compile_step`."""
    return any(isinstance(module, nn.Conv2d) for module in task.module().modules())


def whole(
    task: Task,
    kind: str,
    estimator: str = "monte_carlo",
    compiled: bool = False,
    tx: kf.GradientTransformation | None = None,
) -> Step:
    """A training step: "full", "stats" or "pre" (after one full step); default `kfac()` and plain descent."""
    fn, start = kf.make_functional(task.module())
    tx = kf.chain(kf.kfac(), kf.sgd(RATE)) if tx is None else tx
    make: Callable[..., Any] = partial(kf.compile_step, statistics=not _convolves(task)) if compiled else eager
    train = make(fn, task.workload.loss, tx, estimator=ESTIMATORS[estimator]())
    generator, batch = _generator(task), (task.inputs, task.targets)
    _, params, state = train(start, tx.init(start), batch, generator=generator, refresh=True)

    def run() -> Tensor:
        nonlocal params, state
        given = {"generator": generator, "stats": kind != "pre", "refresh": kind == "full"}
        value, params, state = train(params, state, batch, **given)
        return value

    return Step(run, trains=True)


def phases(task: Task, estimator: str = "monte_carlo") -> dict[str, Step]:
    """The parts of a step, each on tensors that already exist."""
    fn, params = kf.make_functional(task.module())
    step = kf.value_grad_and_stats(fn, task.workload.loss, estimator=ESTIMATORS[estimator]())
    batch, generator, descent = (task.inputs, task.targets), _generator(task), kf.sgd(RATE)
    plan, fixed = kf.make_plan(fn, params, task.inputs), descent.init(params)
    _, grads, stats = step(params, batch, generator=generator)
    assert stats is not None
    state = kf.observe(kf.kfac().init(params), stats)
    curvature = kf.curvature.blockwise(kf.curvature.kronecker())
    dampings = dict.fromkeys(stats.blocks(), torch.tensor(1e-3, dtype=torch.float64, device=task.device))

    def apply() -> Any:
        updates, _ = descent.update(grads, fixed, params)
        return kf.apply_updates(params, updates)

    return {
        "gradient": Step(lambda: step(params, batch, stats=False)),
        "capture": Step(lambda: record(fn, plan, params, task.inputs)),
        "statistics": Step(lambda: step(params, batch, generator=generator)),
        "measure": Step(lambda: kf.observe(state, stats, refresh=False)),
        "factorise": Step(lambda: curvature.factorize(state.curvature, dampings, "pi")),
        "solve": Step(lambda: kf.precondition(state, grads)),
        "apply": Step(apply),
    }


def plain_compiled(task: Task) -> Step:
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


def standard(task: Task, estimator: str = "monte_carlo", compiled: bool = False) -> dict[str, Step]:
    """What the table of schedules needs: the baseline, the baseline once more, and the three kinds of step."""
    steps = {BASELINE: plain(task), ITSELF: plain(task)}
    steps |= {kind: whole(task, kind, estimator) for kind in KINDS}
    if compiled:
        steps |= {COMPILED.format(kind): whole(task, kind, estimator, compiled=True) for kind in KINDS}
    return steps
