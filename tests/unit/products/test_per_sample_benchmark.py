"""The benchmark of per-example quantities: its variants compute the same, and its record can be written."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import per_sample, records
from benchmarks.steps import make_task
from benchmarks.workloads import WORKLOADS


@pytest.mark.parametrize("operation", per_sample.ROUNDS)
def test_all_variants_compute_the_same(operation):
    found = per_sample.variants(make_task(WORKLOADS["W2"], torch.device("cpu"), 3), operation)
    wanted = found[per_sample.BASELINE]()
    assert len(found) > 1
    assert wanted.shape == ((3,) if operation == "norms" else (3, 3))
    for run in found.values():
        torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_a_record_has_every_figure_and_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(per_sample, "memory", lambda *_: 2.0)
    found = per_sample.compared("norms", 3, 2, 0.0, 1)
    for cell in found.values():
        assert math.isfinite(cell["milliseconds"])
        assert cell["error"] < 1e-4
        assert cell["memory"] == 1.0
    record = {"settings": {"quick": True}, "operations": {"norms": found}}
    records.write(record, tmp_path / "per_sample.json")
    assert '"median": 1.0' in (tmp_path / "per_sample.json").read_text()
    assert per_sample.rendered(record).count("| norms") == 3
