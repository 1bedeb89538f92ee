"""The worked example on single digits: what its docstring claims, for one seed."""

from __future__ import annotations

import math

import torch
from PIL import Image

from examples import per_sample_fisher as example


def test_shares_are_right_on_numbers_by_hand():
    values = torch.tensor([1.0, 2.0, 5.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    assert example.share_of_top(values) == 0.5
    wrong = torch.tensor([True, False, True] + [False] * 7)
    assert example.among_top(example.Found(values, values, wrong)) == 0.5


def test_few_digits_carry_most_and_traces_find_what_the_net_gets_wrong(tmp_path):
    found = example.main(tmp_path, seed=0)
    assert found["accuracy"] > 0.9
    assert found["norm: sum of squares in the top 10%"] > 0.8
    assert found["trace: sum in the top 10%"] > 0.6
    assert found["wrong answers in the top 10% of traces"] > 0.5  # 0.1 by chance
    assert math.isclose(found["trace: mean over examples"], found["trace of the diagonal"], rel_tol=1e-4)
    with Image.open(tmp_path / "per_sample_fisher.png") as plot:
        assert plot.width > 1000
