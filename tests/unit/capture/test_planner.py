"""Plans are made once for every kind of batch, and whoever asks about many batches shares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kfac_func as kf
from kfac_func.capture import planner

PARAMS = {"w": torch.ones(3, 2)}
LOSS = kf.losses.mse()


def counted() -> tuple[Callable[..., Tensor], list[int]]:
    """A linear model, and the batch sizes that it was called with."""
    calls: list[int] = []

    def fn(params: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return x @ params["w"]

    return fn, calls


def batch(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.ones(count, 3, dtype=dtype), torch.zeros(count, 2, dtype=dtype)


def test_one_plan_for_all_batch_sizes():
    fn, calls = counted()
    plan_of = planner(fn)
    assert plan_of(PARAMS, batch(4)[0]) is plan_of(PARAMS, batch(7)[0])
    assert max(calls) == 3


def test_other_dtypes_have_other_plans():
    fn, calls = counted()
    plan_of, wide = planner(fn), {"w": PARAMS["w"].double()}
    assert plan_of(PARAMS, batch(4)[0]) is not plan_of(wide, batch(4, torch.float64)[0])
    assert max(calls) == 3


def test_per_example_functions_keep_their_plans():
    for make in (kf.products.per_example_norms, kf.products.per_example_grads, kf.products.per_example_gram):
        fn, calls = counted()
        ask = make(fn, LOSS)
        ask(PARAMS, batch(4))
        assert [n for n in calls if n > 3] == [4]
        planned = len(calls)
        ask(PARAMS, batch(7))
        assert calls[planned:] == [7]


def test_influence_plans_once_for_all_batches():
    fn, calls = counted()
    state = kf.fit_curvature(fn, LOSS, PARAMS, [batch(4)])
    calls.clear()
    kf.influence.self_influence(fn, LOSS, PARAMS, state, [batch(4), batch(5), batch(6)], damping=0.1)
    assert [n for n in calls if n > 3] == [4, 5, 6]
    assert len(calls) < 15
