"""assert_captured: what make_plan proves on a few examples, on any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def sometimes(p: dict, x: Tensor) -> Tensor:
    """The weight is used where no tape sees it, once the batch is large."""
    y = F.linear(x, p["w"])
    return y + torch.func.vmap(lambda row: (x * row).sum(1), out_dims=1)(p["w"]) if len(x) > 3 else y


def rarely(p: dict, x: Tensor) -> Tensor:
    """Sorted, when there are enough to sort."""
    y = F.linear(x, p["w"])
    return y.flip(0) if len(x) > 3 else y


PARAMS = {"w": torch.eye(4)[:3] + 0.1}


def test_the_plan_of_a_captured_model():
    fn, params = kf.make_functional(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)))
    assert kf.testing.assert_captured(fn, params, X) == kf.make_plan(fn, params, X)


def test_a_use_that_only_this_batch_has():
    kf.make_plan(sometimes, PARAMS, X)
    with pytest.raises(AssertionError, match="'w'"):
        kf.testing.assert_captured(sometimes, PARAMS, X)


def test_an_order_that_only_this_batch_has():
    assert not kf.make_plan(rarely, PARAMS, X).mixing
    with pytest.raises(AssertionError, match="see each other"):
        kf.testing.assert_captured(rarely, PARAMS, X)
    kf.testing.assert_captured(rarely, PARAMS, X, mixing=True)


def test_what_the_plan_refuses():
    fn: Any = lambda p, x: F.linear(x, p["w"]) * p["gain"].exp()  # noqa: E731
    params = PARAMS | {"gain": torch.ones(3)}
    with pytest.raises(kf.errors.UncapturedParameterError, match="'gain'"):
        kf.testing.assert_captured(fn, params, X)
    assert kf.testing.assert_captured(fn, params, X, unclaimed="diagonal").unclaimed == (("gain", "diagonal"),)
