"""The benchmark harness runs and reports finite figures. No time is compared with anything: a slow machine passes."""

from __future__ import annotations

import argparse
import inspect
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kfac_func as kf
from benchmarks import fisher_quality, harness, peers, records, report, steps, structures, workloads
from tests import oracles

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
    others, missing = peers.peer_steps(task, {"adamw": "torch"})
    assert (list(others), missing) == (["adamw step"], {})
    variants = steps.standard(task) | steps.phases(task) | others
    race = harness.Race(variants, CPU, block_seconds=0.0).warm(1).run(2)
    for name in variants:
        assert all(math.isfinite(x) and x > 0 for x in race.ratio(name))
    ratios = harness.schedule_ratios(race)
    assert list(ratios) == ["a", "b", "c", "d"]
    assert all(math.isfinite(ratio.median) for ratio in ratios.values())


def test_the_baseline_is_compared_with_itself(task: steps.Task) -> None:
    race = harness.Race(steps.standard(task), CPU, block_seconds=0.0).warm(1).run(3)
    assert len(race.ratios({"sgd again": 1.0})) == 3
    assert race.ratio(harness.BASELINE) == records.Spread(1.0, 1.0, 1.0)


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
    assert race.ratio("full") == records.Spread(10.0, 10.0, 10.0)
    found = {name: ratio.median for name, ratio in harness.schedule_ratios(race).items()}
    assert found == pytest.approx({"a": 10.0, "b": 2.8, "c": 1.18, "d": 1.0})


def test_the_schedules_are_shares_of_one_step() -> None:
    assert all(sum(mix.values()) == pytest.approx(1.0) for mix in harness.SCHEDULES.values())


@pytest.mark.parametrize("arguments", [["--append"], ["--append", "--quick", "--hardware", "a laptop"]])
def test_nothing_meaningless_is_appended(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        structures.parsed(arguments)


def test_tables_are_added_to_the_end_of_the_notes(tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("# Notes\n")
    report.append("a table", "a machine", notes)
    assert notes.read_text() == "# Notes\n\n### a machine\n\na table\n"


# ------------------------------------------------------------------ structures


def _constructors() -> set[str]:
    """The names of all structures of the library; combinations of them are not structures of their own."""
    functions = {name for name, thing in vars(kf.curvature).items() if inspect.isfunction(thing)}
    return functions - {"blockwise", "by_path"}


def test_the_table_has_every_structure() -> None:
    assert {name.split(",")[0] for name in structures.TIMED} == _constructors()
    assert list(structures.SPLITS) == ["kronecker, exact damping", "kpsvd, exact damping"]


@pytest.fixture
def options() -> argparse.Namespace:
    return structures.parsed(["--quick"])


@pytest.fixture(scope="module")
def given() -> structures.Batches:
    return structures.batches(tiny(), CPU, None)


@pytest.mark.parametrize("name", [*sorted(_constructors()), structures.RARELY_SCALED])
def test_every_structure_gets_finite_ratios(given: structures.Batches, name: str, options: argparse.Namespace) -> None:
    found = structures.raced(given, name, options)
    assert list(found) == ["measure", "refresh", "solve", "a", "b", "c", "d"]
    for cell in found.values():
        assert cell.failure == "-"
        assert cell.rounds == 2
        assert cell.ratio is not None
        assert all(math.isfinite(x) and x > 0 for x in (*cell.ratio, cell.milliseconds))


def test_a_structure_is_compared_with_kronecker_inside_a_round() -> None:
    race = harness.Race({name: harness.Step(lambda: None) for name in ("pre", "full", "own pre", "own full")}, CPU)
    race.seconds = {"pre": [1.0, 2.0], "full": [3.0, 6.0], "own pre": [5.0, 10.0], "own full": [7.0, 14.0]}
    assert structures.compared(race, {"pre": 0.5, "full": 0.5}) == records.Spread(3.0, 3.0, 3.0)


def test_a_state_is_timed_on_a_batch_that_it_has_not_seen(given: structures.Batches) -> None:
    (first, _), (second, _) = given.data
    assert first.shape == second.shape == (8, 5)
    assert not torch.equal(first, second)


def test_what_is_too_slow_or_refused_is_shown(
    given: structures.Batches, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(structures.TIMED, "slow", lambda: time.sleep(60))
    monkeypatch.setitem(structures.TIMED, "refused", lambda: kf.curvature.kpsvd(iterations=0))
    hurried = argparse.Namespace(**vars(options) | {"limit": 0.05})
    found = {
        "slow": structures.raced(given, "slow", hurried),
        "refused": structures.raced(given, "refused", options),
        "identity": structures.raced(given, "identity", options),
    }
    lines = [line.split("|") for line in structures.rendered(tiny(), found).splitlines()[3:]]
    assert [line[1].strip() for line in lines] == list(found)
    for column in (2, 5):  # both races
        assert lines[0][column].strip() == "over 0.05 s"
        assert lines[1][column].strip() == "refused: iterations must be at least 1."
        assert float(lines[2][column].split("[")[0]) > 0


def test_the_table_of_structures_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", tiny())
    text = structures.main(["--quick", "--workloads", "tiny", "--only", "diagonal", "kronecker, sua", "--threads", "1"])
    assert "QUICK" in text
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")] == [
        "tiny two layers",
        "kronecker(), ms",
        "kronecker, sua",
        "diagonal",
    ]


# ------------------------------------------------------------------ nearness to the exact curvature


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, fisher_quality.Quality], Path]:
    folder = tmp_path_factory.mktemp("results")
    found = fisher_quality.main(["--nets", "conv", "--steps", "3", "--threads", "1", "--out", str(folder)])
    return found["conv"], folder


def test_quality_of_every_structure_is_written(quality: tuple[dict[str, fisher_quality.Quality], Path]) -> None:
    found, folder = quality
    assert set(found) >= set(structures.STRUCTURES)
    text = (folder / "fisher_quality.md").read_text()
    assert all(f"| {name} " in text for name in found)
    assert (folder / "fisher_quality.png").stat().st_size > 10_000


def test_quality_obeys_the_theorems(quality: tuple[dict[str, fisher_quality.Quality], Path]) -> None:
    found, _ = quality
    assert fisher_quality.broken(found) == []
    swapped = found | {"eigen": found["kronecker"], "kronecker": found["eigen"], "full": found["block_diagonal"]}
    assert fisher_quality.broken(swapped) == [
        "eigen > kronecker",
        "full is not exact",
    ]


def test_cosines_are_one_only_with_the_own_matrix(quality: tuple[dict[str, fisher_quality.Quality], Path]) -> None:
    found, _ = quality
    assert max(found["block_diagonal"].whole) < 1 - 1e-6
    assert all(0 < c < 1 for c in (*found["identity"].whole, *found["kronecker"].blocks))


def test_the_exact_matrix_is_the_oracle() -> None:
    true = fisher_quality.truth(fisher_quality.NETS["conv"], steps=1)
    x, y = true.data
    found = oracles.ggn(true.fn, true.params, x, y, true.net.loss.value)
    specs = {name: oracles.Spec(name, name[:-6] + "bias") for name in true.blocks}
    for name, block in true.blocks.items():
        torch.testing.assert_close(block, found.block(specs[name]))
