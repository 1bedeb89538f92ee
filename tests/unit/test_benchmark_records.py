"""Records of figures are written, read, compared and drawn; scale, memory and the large net run. No time decides."""

from __future__ import annotations

import argparse
import copy
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kfac_func as kf
from benchmarks import harness, large, memory, peers, records, report, scale, steps, tables, workloads
from benchmarks.records import Spread
from benchmarks.step_plot import drawn

CPU = torch.device("cpu")
TARGETS = {"a": 9.0, "b": 4.0, "c": 3.0, "d": 2.0}


@pytest.fixture
def task() -> steps.Task:
    """Two small layers."""

    def batch(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.linspace(-1, 1, examples * 5).reshape(examples, 5), torch.arange(examples) % 3

    def model() -> nn.Module:
        return workloads.seeded(lambda: workloads.mlp((5, 4, 3), nn.Tanh))

    loss = kf.losses.cross_entropy()
    return steps.make_task(
        workloads.Workload("tiny", "two layers", model, batch, loss, F.cross_entropy, 8, TARGETS, 30.0), CPU
    )


def options(*parts: str) -> argparse.Namespace:
    return report.parsed(["--quick", "--parts", *parts])


def record(**ratios: tuple[float, float, float]) -> dict[str, Any]:
    """What one workload might give; a figure is a step, or "memory"."""
    found = {"sgd again": Spread(1.0, 0.98, 1.03)} | {n: Spread(*r) for n, r in ratios.items() if n != "memory"}
    figures = {"schedules": {}, "steps": found, "memory": {"full": Spread(*ratios.get("memory", (30, 30, 30)))}}
    workload = {"title": "two layers", "examples": 8, "milliseconds": 1.0, "targets": {}, "figures": figures}
    settings = {"hardware": "a laptop", "date": "2026-01-01", "estimator": "empirical", "quick": False, "rounds": 5}
    return {"settings": settings, "workloads": {"W1": workload | {"losses": {}, "missing": {}}}}


# ------------------------------------------------------------------ records


def test_a_record_is_plain_json_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "steps.json"
    made = record(full=(2.0, 1.9, 2.1))
    records.write(made, path)
    bare = json.loads(path.read_text())
    assert bare["workloads"]["W1"]["figures"]["steps"]["full"] == {"median": 2.0, "low": 1.9, "high": 2.1}
    assert records.read(path) == made


def test_records_need_nothing_but_the_standard_library() -> None:
    source = Path(records.__file__).read_text()
    assert "import torch" not in source
    assert "benchmarks" not in source.replace("from benchmarks.records", "")
    assert "changes" in runpy.run_path(records.__file__)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ((2.4, 2.3, 2.5), ["slower: W1 steps, full: 2.00 [1.90, 2.10] -> 2.40 [2.30, 2.50]"]),
        ((1.6, 1.5, 1.7), ["faster: W1 steps, full: 2.00 [1.90, 2.10] -> 1.60 [1.50, 1.70]"]),
        ((2.25, 2.14, 2.3), []),  # apart, but sgd against itself was off by 3 %
        ((2.2, 2.05, 2.3), []),  # the quartiles overlap
    ],
)
def test_what_moved_beyond_the_spread_is_found(now: tuple[float, float, float], words: list[str]) -> None:
    found = records.changes(record(full=(2.0, 1.9, 2.1)), record(full=now))
    assert list(map(str, found)) == words


@pytest.mark.parametrize(("now", "words"), [(39.0, []), (41.0, ["larger"]), (21.0, []), (19.0, ["smaller"])])
def test_memory_may_differ_by_ten_megabytes(now: float, words: list[str]) -> None:
    found = records.changes(record(), record(memory=(now, now, now)))
    assert [str(change).partition(":")[0] for change in found] == words


def test_the_largest_loss_comes_first() -> None:
    before = record(full=(2.0, 2.0, 2.0), stats=(2.0, 2.0, 2.0), pre=(2.0, 2.0, 2.0))
    now = record(full=(3.0, 3.0, 3.0), stats=(1.0, 1.0, 1.0), pre=(4.0, 4.0, 4.0))
    found = [change.where for change in records.changes(before, now)]
    assert found == ["W1 steps, pre", "W1 steps, full", "W1 steps, stats"]


def test_new_figures_and_other_batches_are_not_compared() -> None:
    before, now = record(full=(1.0, 1.0, 1.0)), record(full=(9.0, 9.0, 9.0), pre=(9.0, 9.0, 9.0))
    assert len(records.changes(before, now)) == 1
    now["workloads"]["W1"]["examples"] = 4
    assert records.changes(before, now) == []
    assert records.changes(before | {"workloads": {}}, now) == []


def test_the_verdict_says_what_differs() -> None:
    before = record(full=(1.0, 1.0, 1.0))
    elsewhere = copy.deepcopy(before)
    elsewhere["settings"] |= {"hardware": "a rack", "date": "2026-02-02", "rounds": 9}
    assert "differ in hardware)" in records.verdict(before, elsewhere)
    assert records.verdict(before, elsewhere).endswith("nothing moved beyond the spread")
    elsewhere["settings"]["quick"] = True
    assert records.verdict(before, elsewhere).endswith("not compared, the records differ in hardware, quick.")


# ------------------------------------------------------------------ report


def test_the_report_of_a_workload(
    task: steps.Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kf, "compile_step", lambda *given, statistics, **options: steps.eager(*given, **options))
    monkeypatch.setattr(report, "plain_compiled", steps.plain)  # Dynamo cannot trace the checking hook
    monkeypatch.setattr(report, "RESULTS", tmp_path / "none")  # no record to compare with yet
    monkeypatch.setattr(report, "memory_over_sgd", lambda *_: [20.0, 30.0, 40.0])
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", task.workload)
    asked = ["--quick", "--workloads", "tiny", "--parts", "phases", "compiled", "memory", "peers", "--threads", "1"]
    found = report.main([*asked, "--out", str(tmp_path)])
    assert records.read(tmp_path / "steps.json")["workloads"].keys() == {"tiny"}
    figures = found["workloads"]["tiny"]["figures"]
    assert list(figures["schedules"]) == [*"abcd", *(f"{schedule} compiled" for schedule in "abcd")]
    assert set(figures["phases"]) == {*steps.PHASES, "sum of phases"}
    assert all(math.isfinite(x) and x > 0 for group in figures.values() for ratio in group.values() for x in ratio)
    text = (tmp_path / "steps.md").read_text()
    assert "| tiny, compiled |" in text
    assert " / 9 " in text
    assert "QUICK" in text
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    assert "Since " not in capsys.readouterr().out
    report.main(["--quick", "--workloads", "tiny", "--parts", "--against", str(tmp_path / "steps.json")])
    assert f"Since {found['settings']['date']}" in capsys.readouterr().out


def test_phases_sum_to_a_step_inside_a_round(task: steps.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(race: harness.Race, rounds: int) -> harness.Race:
        race.seconds = {name: [2.0 if name == "sgd" else 3.0] * rounds for name in race.steps}
        return race

    monkeypatch.setattr(harness.Race, "run", run)
    found = report.measure(task, options("phases"))
    assert found["figures"]["phases"]["sum of phases"] == Spread(7.5, 7.5, 7.5)  # five parts of 1.5 each


@pytest.mark.parametrize("kind", steps.KINDS)
def test_an_eager_step_of_a_kind_has_its_statistics_and_refresh(kind: str, task: steps.Task) -> None:
    seen: list[tuple[bool, bool]] = []
    plain = kf.chain(kf.kfac(), kf.sgd(1e-5))

    def update(*args: Any, stats: Any = None, refresh: bool | None = None, **extra: Any) -> Any:
        seen.append((stats is not None, bool(refresh)))
        return plain.update(*args, stats=stats, refresh=refresh, **extra)

    steps.whole(task, kind, tx=plain._replace(update=update)).run()
    assert seen == [(True, True), {"full": (True, True), "stats": (True, False), "pre": (False, False)}[kind]]


def test_meaningless_figures_do_not_become_results() -> None:
    for module in (report, scale, large):
        with pytest.raises(SystemExit):
            module.main(["--quick", "--out", str(report.RESULTS)])


def test_a_schedule_needs_all_its_steps() -> None:
    race = harness.Race({name: harness.Step(lambda: None) for name in ("sgd", "peer full", "peer pre")}, CPU)
    race.seconds = {"sgd": [1.0], "peer full": [4.0], "peer pre": [2.0]}
    found = harness.schedule_ratios(race, "peer {}")
    assert {name: ratio.median for name, ratio in found.items()} == {"a": 4.0, "d": 2.0}


def test_peers_that_cannot_run_are_reported_with_the_reason(task: steps.Task) -> None:
    found, missing = peers.peer_steps(task, {"adamw": "torch", "nobody": "torch", "gone": "no_such_package"})
    assert list(found) == ["adamw step"]
    assert missing == {
        "nobody": "ModuleNotFoundError: No module named 'benchmarks.peers.run_nobody'",
        "gone": "no_such_package is not installed",
    }
    assert peers.installed({"a": "torch", "b": "no_such_package"}) == ["a"]


def test_every_peer_has_an_adapter_and_a_pin() -> None:
    folder = Path(peers.__file__).parent
    assert {path.stem for path in folder.glob("run_*.py")} == {f"run_{name}" for name in peers.PEERS}
    pins = (folder / "requirements.txt").read_text().replace("-", "_")
    assert all(package in pins for package in peers.PEERS.values() if package != "torch")


def test_peers_and_targets_are_drawn(task: steps.Task, tmp_path: Path) -> None:
    made = record()
    ratio = Spread(2.0, 1.9, 2.1)
    made["workloads"]["W1"] |= {"targets": TARGETS}
    made["workloads"]["W1"]["figures"]["schedules"] = {"a": ratio, "a compiled": ratio, "d": ratio, "a singd": ratio}
    made["settings"] |= {"threads": 1, "torch": "2"}
    assert drawn(made, tmp_path / "steps.png").stat().st_size > 10_000
    assert tables.kinds_of_schedules(made["workloads"]["W1"]) == ["", "compiled", "singd"]


# ------------------------------------------------------------------ memory, scale, the large net


def test_memory_is_the_difference_to_the_plain_step(task: steps.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", task.workload)
    peaks = {"full": 170.0, "sgd": 100.0}
    monkeypatch.setattr(memory, "_on_cpu", lambda task, kind, estimator: peaks[kind])
    assert memory.memory_over_sgd(task, repeats=2) == [70.0, 70.0]
    assert memory.peak_resident() > 50


def test_the_exponent_of_a_power_law_is_found() -> None:
    sizes = [4.0, 8.0, 16.0, 32.0, 64.0]
    assert scale.exponent(sizes, [0.3 * size**2.5 for size in sizes]) == pytest.approx(2.5, abs=1e-12)
    overhead = [100.0, 100.0, *(0.3 * size**2.5 for size in sizes[2:])]
    assert scale.exponent(sizes, overhead) == pytest.approx(2.5, abs=1e-12)
    assert scale.exponent([1.0, 2.0], [3.0, 6.0]) == pytest.approx(1.0)


def test_scale_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scale.FIXED, "depth", (8, 2, 4))
    found = scale.main(["--quick", "--axes", "depth", "--threads", "1", "--out", str(tmp_path)])
    assert list(found["axes"]["depth"]["points"]) == ["1", "2"]
    assert set(found["axes"]["depth"]["exponents"]) == {"sgd", *steps.KINDS}
    assert "| exponent |" in (tmp_path / "scale.md").read_text()
    assert json.loads((tmp_path / "scale.json").read_text())["axes"]["depth"]["points"]["1"]["rounds"] == 2
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_an_axis_moves_one_size_only() -> None:
    shapes = [list(p.shape) for p in scale.workload(6, 2, 4).model().parameters() if p.ndim == 2]
    assert shapes == [[6, 784], [6, 6], [10, 6]]
    assert scale.workload(6, 2, 4).batch(4)[0].shape == (4, 784)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_one_step_of_the_large_net_goes_down(head: str, tmp_path: Path) -> None:
    flag = ["--untied"] if head == "untied" else []
    found = large.main(["--quick", "--threads", "1", "--out", str(tmp_path), *flag])["step"]
    assert found["loss"]["after"] < found["loss"]["before"]
    assert found["parameters"] == 800 + 256 + 2 * 3280 + 32 + (0 if head == "tied" else 800)
    assert "Peak resident memory" in (tmp_path / "large.md").read_text()
