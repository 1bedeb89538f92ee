"""The worked example on kernels: what its docstring claims, on a small training set."""

from __future__ import annotations

import torch
from PIL import Image

from examples import ntk_regression as example


def test_alignment_is_a_cosine_of_centred_kernels():
    y = torch.tensor([0, 1, 2, 1])
    labels = example.targets(y) @ example.targets(y).T
    assert abs(example.alignment(3 * labels + 1, y) - 1) < 1e-6
    assert example.alignment(torch.eye(4) - labels, y) < 0


def test_regression_fits_the_training_digits_as_its_damping_falls(monkeypatch):
    data = example.digits(0, 30)
    fn, start = example.initial(0, 64)
    monkeypatch.setattr(example, "DAMPING", 1e-6)
    for outputs in ("full", "trace"):
        z = example.regression(fn, start, data._replace(test=data.train), outputs)
        assert (z - example.targets(data.train[1])).abs().max() < 1e-2


def test_kernels_predict_as_well_as_the_net(tmp_path):
    found = example.main(tmp_path, sizes=(50, 100), width=128, steps=150)
    assert found["net"] > 0.8
    for name in ("full kernel", "trace kernel", "trace kernel, after"):
        assert abs(found[name] - found["net"]) < 0.05
    assert found["alignment, after"] > found["alignment, before"] + 0.03
    with Image.open(tmp_path / "ntk_regression.png") as plot:
        assert plot.width > 1000
