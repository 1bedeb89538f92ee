"""The worked example on digits: what its docstring claims, for one seed."""

from __future__ import annotations

import torch
from PIL import Image

from examples import laplace_calibration as example


def test_figures_are_right_on_a_table_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]], dtype=torch.float64)
    found = example.figures(p, torch.tensor([0, 1, 1, 1]))
    assert found["accuracy"] == 0.75
    assert abs(found["ece"] - (0.5 * 0.4 + 0.25 * 0.4 + 0.25 * 0.3)) < 1e-12  # three bins, 0.9 twice
    logs = torch.tensor([0.9, 0.1, 0.6, 0.7], dtype=torch.float64).log()
    assert abs(found["nll"] + logs.mean().item()) < 1e-12


def test_laplace_is_better_calibrated_than_the_net(tmp_path):
    found = example.main(tmp_path, seed=0)
    net = found["MAP"]
    assert net["accuracy"] > 0.85
    assert net["ece"] > 0.04  # overconfident, so that there is something to mend
    for name in ("Laplace, all layers", "Laplace, last layer"):
        assert found[name]["nll"] < 0.8 * net["nll"]
        assert found[name]["ece"] < 0.7 * net["ece"]
        assert found[f"{name}, sampled"]["nll"] < 0.85 * net["nll"]
        assert abs(found[name]["accuracy"] - net["accuracy"]) < 0.01
    with Image.open(tmp_path / "laplace_calibration.png") as plot:
        assert plot.width > 1000
