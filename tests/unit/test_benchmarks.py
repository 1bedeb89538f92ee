"""The benchmark harness runs and reports finite figures. No time is compared with anything: a slow machine passes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kfac_func as kf
from benchmarks import harness, peers, report, steps, workloads

CPU = torch.device("cpu")


def tiny() -> workloads.Workload:
    """A model so small that a step takes a millisecond."""

    def batch(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(examples, 5, generator=generator), torch.randint(3, (examples,), generator=generator)

    def model() -> nn.Module:
        return workloads.seeded(lambda: workloads.mlp((5, 4, 3), nn.Tanh))

    return workloads.Workload("tiny", "two layers", model, batch, kf.losses.cross_entropy(), F.cross_entropy, 8)


@pytest.fixture
def task() -> steps.Task:
    return steps.make_task(tiny(), CPU)


def test_every_variant_gets_a_finite_ratio(task: steps.Task) -> None:
    variants = steps.standard(task) | steps.phases(task) | peers.peer_steps(task, ["adamw"])
    race = harness.Race(variants, CPU, block_seconds=0.0).warm(1).run(2)
    for name in variants:
        assert all(math.isfinite(x) and x > 0 for x in race.ratio(name))
    ratios = harness.schedule_ratios(race)
    assert list(ratios) == ["a", "b", "c", "d"]
    assert all(math.isfinite(ratio.median) for ratio in ratios.values())


def test_the_baseline_is_compared_with_itself(task: steps.Task) -> None:
    race = harness.Race(steps.standard(task), CPU, block_seconds=0.0).warm(1).run(3)
    assert len(race.ratios({"sgd again": 1.0})) == 3
    assert race.ratio(harness.BASELINE) == harness.Spread(1.0, 1.0, 1.0)


def test_steps_train_and_stay_finite(task: steps.Task) -> None:
    race = harness.Race(steps.standard(task), CPU, block_seconds=0.0)
    before = {name: race.loss(name) for name in race.steps}
    for step in race.run(3).steps.values():
        assert step.trains
    for name, old in before.items():
        new = race.loss(name)
        assert old is not None
        assert new is not None
        assert new < old


def test_the_plain_step_and_ours_have_the_same_loss_and_gradient(task: steps.Task) -> None:
    module = task.module()
    value = task.workload.torch_loss(module(task.inputs), task.targets)
    value.backward()
    fn, params = kf.make_functional(task.module())
    ours, grads, _ = kf.value_grad_and_stats(fn, task.workload.loss)(params, (task.inputs, task.targets), stats=False)
    torch.testing.assert_close(ours, value.detach())
    for name, leaf in module.named_parameters():
        torch.testing.assert_close(grads[name], leaf.grad)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_the_two_losses_of_a_workload_are_the_same(name: str) -> None:
    workload = workloads.WORKLOADS[name]
    inputs, targets = workload.batch(2)
    with torch.no_grad():
        outputs = workload.model()(inputs)
    torch.testing.assert_close(workload.loss.value(outputs, targets), workload.torch_loss(outputs, targets))


def test_a_round_times_every_variant_once_in_a_rotating_order() -> None:
    order: list[str] = []
    variants = {name: harness.Step(lambda name=name: order.append(name)) for name in ("sgd", "x", "y")}
    harness.Race(variants, CPU).run(3)
    assert order == ["sgd", "x", "y", "x", "y", "sgd", "y", "sgd", "x"]


def test_ratios_are_taken_inside_a_round() -> None:
    race = harness.Race({name: harness.Step(lambda: None) for name in ("sgd", "full", "stats", "pre")}, CPU)
    race.seconds = {"sgd": [1.0, 2.0], "full": [10.0, 20.0], "stats": [2.0, 4.0], "pre": [1.0, 2.0]}
    assert race.ratio("full") == harness.Spread(10.0, 10.0, 10.0)
    found = {name: ratio.median for name, ratio in harness.schedule_ratios(race).items()}
    assert found == pytest.approx({"a": 10.0, "b": 2.8, "c": 1.18, "d": 1.0})


def test_the_schedules_are_shares_of_one_step() -> None:
    assert all(sum(mix.values()) == pytest.approx(1.0) for mix in harness.SCHEDULES.values())


def test_the_report_prints_and_appends(task: steps.Task, tmp_path: Path) -> None:
    options = report.parsed(["--quick", "--workloads", "W2", "--phases"])
    found = [report.measure(task, options)]
    text = report.rendered(found, options, CPU)
    assert "| tiny two layers |" in text
    assert "| factorize" in text
    assert "QUICK" in text
    notes = tmp_path / "notes.md"
    notes.write_text("# Notes\n")
    report.append(text, "a machine", notes)
    assert notes.read_text().startswith("# Notes\n\n### a machine\n\n")


@pytest.mark.parametrize("arguments", [["--append"], ["--append", "--quick", "--hardware", "a laptop"]])
def test_nothing_meaningless_is_appended(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        report.parsed(arguments)


def test_peers_that_are_not_installed_are_left_out() -> None:
    assert peers.installed({"a": ("torch", None), "b": ("no_such_package", None)}) == ["a"]
