"""The example that finds mislabelled digits finds most of them."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = spec_from_file_location("mislabelled_digits", ROOT / "examples" / "mislabelled_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_tenth_holds_most_wrong_labels(example, tmp_path):
    """The mean of three trainings, so that the rounding of another machine does not decide."""
    runs = [example.main(tmp_path if seed == 0 else None, seed=seed) for seed in range(3)]

    def mean(method: str, figure: str) -> float:
        return sum(run[method][figure] for run in runs) / len(runs)

    assert mean("net", "test accuracy") > 0.9
    assert mean("net", "wrong labels learnt") > 0.8
    assert mean("self-influence", "recall in 10%") >= 0.8
    assert mean("self-influence", "precision@k") >= 0.6
    assert mean("self-influence", "mean recall") > mean("gradient norm", "mean recall")
    assert mean("self-influence", "mean recall") > mean("loss", "mean recall")
    assert (tmp_path / "mislabelled_digits.png").stat().st_size > 10_000
    assert len(example.table(runs).splitlines()) == 14


def test_one_label_in_twenty_is_wrong(example):
    data = example.digits(seed=3)
    assert data.wrong.sum() == 72
    assert len(data.wrong) == 1437
    assert len(data.test[1]) == 360


def test_figures_of_a_known_ranking(example):
    wrong = torch.arange(20) < 2
    perfect, worst = torch.arange(20).flip(0).double(), torch.arange(20).double()
    found = example.figures({"perfect": perfect, "worst": worst}, wrong)
    assert found["perfect"] == pytest.approx({"precision@k": 1.0, "recall in 10%": 1.0, "mean recall": 19.5 / 20})
    assert found["worst"] == pytest.approx({"precision@k": 0.0, "recall in 10%": 0.0, "mean recall": 1.5 / 20})
    assert found["chance"] == pytest.approx({"precision@k": 0.1, "recall in 10%": 0.1, "mean recall": 0.5})
