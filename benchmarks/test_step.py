"""pytest-benchmark: every variant of every workload, with blocks of the plain step in between. Run `pytest benchmarks`.

The times that pytest-benchmark prints are those of blocks of `calls` steps; the ratio to the plain step, the figure
that can be compared between machines, is in `extra_info` (see it with --benchmark-json). No test asserts a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.conftest import Options
from benchmarks.harness import BASELINE, Race, Spread, Step, schedule_ratios, settings
from benchmarks.peers import PEERS, peer_steps
from benchmarks.steps import COMPILED, KINDS, PHASES, Task, make_task, phases, plain, standard, whole
from benchmarks.workloads import WORKLOADS


@cache
def _task(workload: str, device: Any, examples: int | None) -> Task:
    return make_task(WORKLOADS[workload], device, examples)


def _opened(options: Options, workload: str) -> Task:
    return _task(workload, options.device, options.examples)


def _timed(benchmark: Any, options: Options, task: Task, name: str, make: Callable[[], Step]) -> None:
    """Rounds of [one block of the plain step, one block of the variant]; the second is what pytest-benchmark sees."""
    race = Race({BASELINE: plain(task), name: make()}, options.device, options.block_seconds).warm(1)
    benchmark.group = f"{task.workload.name} {task.workload.title}"
    benchmark.pedantic(lambda: race.block(name), setup=lambda: _other(race), rounds=options.rounds, iterations=1)
    _noted(benchmark, race, task, options, {name: race.ratio(name)})


def _other(race: Race) -> None:
    race.block(BASELINE)  # pytest-benchmark takes a returned value for arguments


def _noted(benchmark: Any, race: Race, task: Task, options: Options, ratios: dict[str, Spread]) -> None:
    losses = {name: race.loss(name) for name in race.steps}
    benchmark.extra_info.update(
        ratio={name: ratio._asdict() for name, ratio in ratios.items()},
        milliseconds={name: race.milliseconds(name) for name in race.steps},
        calls=race.calls,
        rounds=len(race.seconds[BASELINE]),
        loss={name: loss for name, loss in losses.items() if loss is not None},
        workload=task.workload.name,
        examples=len(task.inputs),
        estimator=options.estimator,
        aims=task.workload.targets,
        **settings(options.device),
    )
    for name, loss in losses.items():
        assert loss is None or math.isfinite(loss), f"{name} does not train: the loss is {loss}"


@pytest.mark.parametrize("workload", WORKLOADS)
def test_baseline_against_itself(benchmark: Any, options: Options, workload: str) -> None:
    """The noise of the machine: two copies of the plain step."""
    task = _opened(options, workload)
    _timed(benchmark, options, task, "sgd again", lambda: plain(task))


@pytest.mark.parametrize("name", PHASES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_phase(benchmark: Any, options: Options, workload: str, name: str) -> None:
    """One part of the step, on tensors that exist."""
    task = _opened(options, workload)
    _timed(benchmark, options, task, name, lambda: phases(task)[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step(benchmark: Any, options: Options, workload: str, kind: str) -> None:
    """A whole training step of one kind."""
    task = _opened(options, workload)
    _timed(benchmark, options, task, kind, lambda: whole(task, kind, options.estimator))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_schedules(benchmark: Any, options: Options, workload: str) -> None:
    """The schedules a, b, c, d, combined inside every round; the time shown is that of a whole round."""
    task = _opened(options, workload)
    race = Race(standard(task, options.estimator), options.device, options.block_seconds).warm(1)
    benchmark.group = f"{workload} {task.workload.title}: schedules"
    benchmark.pedantic(race.round, rounds=options.rounds, iterations=1)
    _noted(benchmark, race, task, options, {"sgd again": race.ratio("sgd again"), **schedule_ratios(race)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_compiled(benchmark: Any, options: Options, workload: str, kind: str) -> None:
    """The compiled whole step, with --compiled only."""
    if not options.compiled:
        pytest.skip("compiling takes many seconds; pass --compiled")
    task = _opened(options, workload)
    name = COMPILED.format(kind)
    torch.compiler.reset()
    _timed(benchmark, options, task, name, lambda: whole(task, kind, options.estimator, compiled=True))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_peer(benchmark: Any, options: Options, workload: str, peer: str) -> None:
    """Another optimiser, when it is installed and can run this."""
    task = _opened(options, workload)
    steps, missing = peer_steps(task, {peer: PEERS[peer]})
    if missing:
        pytest.skip(missing[peer])
    race = Race({BASELINE: plain(task), **steps}, options.device, options.block_seconds).warm(1)
    benchmark.group = f"{workload} {task.workload.title}: peers"
    benchmark.pedantic(race.round, rounds=options.rounds, iterations=1)
    _noted(benchmark, race, task, options, {name: race.ratio(name) for name in steps})
