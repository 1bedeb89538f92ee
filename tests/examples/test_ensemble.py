"""The ensemble on digits: what the script says is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import kfac_func as kf

SCRIPT = Path(__file__).parents[2] / "examples" / "ensemble.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("ensemble_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ensemble_is_better_than_its_members(script, tmp_path):
    found = script.main(steps=30, members=4, out=tmp_path)
    assert found["ensemble_nll"] < 0.9 * found["member_nll"]  # at most equal by Jensen's inequality
    assert found["ensemble_accuracy"] > found["member_accuracy"] > 0.88
    assert found["ensemble_accuracy"] > 0.92
    assert all(found[f"{way}, {kind}"] > 0 for way in ("vmap", "one by one") for kind in ("plain", "refresh"))
    assert (tmp_path / "ensemble.png").stat().st_size > 10_000


def test_its_step_is_that_of_every_member(script):
    """The first step of the stacked members, and of each alone."""
    generator = torch.Generator().manual_seed(1)
    data = script.digits(generator)
    fn, params = script.nets(3, seed=1)
    tx: Any = kf.chain(kf.kfac(damping=0.1), kf.sgd(0.1))
    train = script.stepper(fn, tx)
    (x, y), noise = script.batches(data, 3, generator)
    first = lambda p, *rest: train(p, tx.init(p), *rest, True)  # noqa: E731
    moved, _, values = torch.func.vmap(first)(params, (x, y), noise)
    for k in range(3):
        own = {name: leaf[k] for name, leaf in params.items()}
        wanted, _, value = first(own, (x[k], y[k]), noise[k])
        torch.testing.assert_close({name: leaf[k] for name, leaf in moved.items()}, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values[k], value)
    assert (moved["0.weight"] - params["0.weight"]).abs().amax((1, 2)).min() > 1e-3
