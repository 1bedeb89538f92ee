"""The demo: its data, its report, and one quick run from end to end."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_func._errors import HyperparameterError
from kfac_func.demo import data, packages, report, run
from kfac_func.demo.models import autoencoder
from kfac_func.demo.training import Budget, Method, batches, train
from kfac_func.diagnostics import History, loss_curves


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hide(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    find = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in missing else find(name))


def test_curves_are_seeded_intensities():
    images = data.curves(250, seeded(3))
    assert images.shape == (250, 784)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < 1e-6
    assert images.max() == 1
    assert torch.equal(images, data.curves(250, seeded(3)))
    assert not torch.equal(images, data.curves(250, seeded(4)))


def test_curves_are_as_hard_as_designed():
    images = data.curves(2000, seeded(0))
    assert data.entropy_floor(images) == pytest.approx(19.5, abs=0.3)
    assert data.mean_image_loss(images) == pytest.approx(123.3, abs=1.5)
    assert (images > 0.5).sum(dim=1).min() >= 3, "every image shows a stroke"


def test_digits_are_intensities():
    images = data.digits()
    assert images.shape == (1797, 64)
    assert (images.min(), images.max()) == (0, 1)


def test_floor_and_plateau_are_those_of_the_best_and_of_the_constant_model():
    images = torch.rand(50, 7, generator=seeded(0))
    loss = nn.BCELoss(reduction="sum")
    assert data.entropy_floor(images) == pytest.approx(float(loss(images, images)) / 50, rel=1e-5)
    mean = images.mean(dim=0).expand_as(images)
    assert data.mean_image_loss(images) == pytest.approx(float(loss(mean, images)) / 50, rel=1e-5)
    assert data.entropy_floor(torch.eye(3)) == 0


def test_autoencoder_is_linear_at_the_code_and_seeded():
    model = autoencoder((9, 5, 3), seed=1)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear, nn.Tanh, nn.Linear]
    assert model(torch.zeros(2, 9)).shape == (2, 9)
    first, same, other = (autoencoder((9, 5, 3), seed=seed).state_dict()["0.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_autoencoder_needs_a_code():
    with pytest.raises(HyperparameterError, match="at least two sizes"):
        autoencoder((9,), seed=0)


def test_batches_are_epochs_without_remainder():
    order = batches(10, 4, seed=0)
    first, second, third = next(order), next(order), next(order)
    assert len(set(first.tolist()) | set(second.tolist())) == 8
    assert len(third) == 4


def test_report_reads_equal_steps_and_equal_seconds():
    histories = {
        "K-FAC": History([0, 5, 10], [0.0, 2.0, 4.0], [9.0, 3.0, 2.0]),
        "Adam": History([0, 5, 10, 20], [0.0, 1.0, 2.0, 4.0], [9.0, 8.0, 7.0, 5.0]),
    }
    rows = [line.split() for line in report.table(histories, "K-FAC").splitlines()]
    assert rows[0] == ["K-FAC", "Adam"]
    assert rows[3] == ["after", "10", "steps", "2.000", "7.000"]
    assert rows[6] == ["after", "4.00", "seconds", "2.000", "5.000"]
    assert "after 5 of 10 steps (2.0 s)" in report.verdict(histories, "K-FAC", "Adam")
    assert report.verdict(histories, "Adam", "K-FAC") == (
        "Adam did not reach K-FAC's final loss (2.000 after 10 steps, 4.0 s) in 20 steps."
    )


def test_plot_is_written_and_needs_a_history(tmp_path: Path):
    path = loss_curves({"one": History([0, 1], [0.0, 0.1], [2.0, 1.0])}, tmp_path / "deep" / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(HyperparameterError, match="nothing to plot"):
        loss_curves({}, tmp_path / "plot.png")


def test_plot_names_the_extra_when_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"kfac_func\[demo\]\""):
        loss_curves({"one": History([0], [0.0], [1.0])}, tmp_path / "plot.png")


def test_missing_packages_end_the_demo_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    hide(monkeypatch, "sklearn", "tqdm")
    with pytest.raises(SystemExit) as end:
        run.main(["--quick"])
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert "sklearn, tqdm" in said
    assert 'pip install "kfac_func[demo]"' in said
    with pytest.raises(ImportError, match="sklearn"):
        data.digits()


@pytest.mark.parametrize("options", [["--speed"], ["--data", "faces"], ["--steps", "0"]])
def test_a_wrong_option_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        run.main(options)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_quick_run_writes_tables_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run.main(["--quick", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("after       6 steps") == 2
    assert said.count("seconds ") >= 6
    assert said.count("Adam's final loss") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "digits.png"}


def test_methods_share_start_and_batches_and_runs_repeat():
    problem = run.problems("digits", quick=True)[0]._replace(sizes=(64, 6, 3))
    methods = [Method("K-FAC", 0.01), Method("Adam", 0.01), Method("SGD", 0.01), Method("SGD", 0.01)]
    kfac, adam, sgd, again = (train(problem, method, Budget(4), every=2) for method in methods)
    assert kfac.losses[0] == adam.losses[0] == sgd.losses[0]
    assert sgd.losses == again.losses
    assert sgd.steps == [0, 2, 4]
    assert sgd.seconds == sorted(sgd.seconds)


def test_a_run_goes_on_until_its_seconds_are_reached_and_stops_when_it_diverges():
    problem = run.problems("digits", quick=True)[0]._replace(sizes=(64, 6, 3))
    longer = train(problem, Method("SGD", 0.001), Budget(2, seconds=0.5), every=5)
    assert longer.seconds[-1] >= 0.5
    assert longer.steps[-1] % 5 == 0
    diverged = train(problem, Method("SGD", 1e30), Budget(50), every=1)
    assert diverged.losses[-1] == math.inf
    assert diverged.steps[-1] < 50
