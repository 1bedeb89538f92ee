"""Dropout draws one mask per step of `kfac_auto`, for the gradient, its model and the loss after the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kfac_func as kf

X, Y = torch.randn(64, 6), torch.randn(64, 2)


def net() -> tuple[Any, dict[str, Tensor]]:
    module = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 2))
    return kf.make_functional(module.double())


def steps(count: int, **options: Any) -> list[tuple[set[tuple], Any]]:
    """Per step, the numbers that runs on the whole batch began with, and what the step says of itself."""
    fn, params = net()
    begun: list[tuple] = []

    def watched(p: dict, x: Tensor) -> Tensor:
        if len(x) == len(X):
            begun.append(tuple(torch.get_rng_state().tolist()))
        return fn(p, x)

    auto = kf.kfac_auto(watched, kf.losses.mse(), **options)
    state, found = auto.init(params), []
    for _ in range(count):
        begun.clear()
        params, state, info = auto.step(params, state, (X.double(), Y.double()))
        found.append((set(begun), info))
    return found


def test_all_runs_of_a_step_draw_the_same_numbers_and_those_of_the_next_others():
    found = [begun for begun, _ in steps(6)]
    assert all(len(begun) == 1 for begun in found)
    assert len(set.union(*found)) == 6


def test_the_model_is_that_of_the_loss():
    """With one mask the slope of the model is that of the loss: a step in its own direction is foretold."""
    ratios = [float(info.rho) for _, info in steps(11)]
    assert all(0.5 < ratio < 1.5 for ratio in ratios), ratios


def test_the_numbers_move_on_as_they_do_without_kfac():
    torch.manual_seed(3)
    steps(1)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    fn, params = net()
    fn(params, X.double())
    assert torch.equal(torch.get_rng_state(), after)
