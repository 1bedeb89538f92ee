"""Recording on a plan: what the model does differently is an error, never a wrong number; in-place models; batches."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import BatchError, PlanMismatchError

UP = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.arange(9.0, dtype=torch.float64).reshape(3, 3).sin()
PARAMS = {"w": W, "v": W.cos(), "b": W[0].clone(), "c": W[1].clone(), "k": torch.stack([W, W.exp(), W.cos()])}


def up(x: Tensor) -> bool:
    return bool(x.sum() > 0)


def convolved(p: dict, x: Tensor) -> Tensor:
    wide = 1 if up(x) else 2
    return F.conv1d(x.unsqueeze(1).expand(-1, 3, -1), p["k"], padding=wide, dilation=wide).sum(-1)


BRANCHES: dict[str, Callable[[dict, Tensor], Tensor]] = {
    "another parameter": lambda p, x: F.linear(x, p["w"] if up(x) else p["v"]),
    "another kind": lambda p, x: F.linear(x, p["w"]) if up(x) else x @ p["w"],
    "a use more": lambda p, x: F.linear(x if up(x) else F.linear(x, p["w"]), p["w"]),
    "a use less": lambda p, x: F.linear(F.linear(x, p["w"]) if up(x) else x, p["w"]),
    "another shape": lambda p, x: F.linear(x if up(x) else torch.stack([x, x], 1), p["w"]).reshape(len(x), -1)[:, :3],
    "a use that no kind sees": lambda p, x: F.linear(x, p["w"]) * (1.0 if up(x) else p["w"].norm()),
    "the transpose": lambda p, x: x @ (p["w"] if up(x) else p["w"].T),
    "without its bias": lambda p, x: F.linear(x, p["w"], p["b"] if up(x) else None),
    "with a bias": lambda p, x: F.linear(x, p["w"], None if up(x) else p["b"]),
    "another bias": lambda p, x: F.linear(x, p["w"], p["b"] if up(x) else p["c"]),
    "a bias added": lambda p, x: x @ p["w"] if up(x) else x @ p["w"] + p["b"],
    "other options": convolved,
}


@pytest.mark.parametrize("fn", BRANCHES.values(), ids=BRANCHES)
def test_a_model_that_leaves_its_plan_is_noticed(fn):
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    y = torch.zeros_like(fn(PARAMS, UP))
    step(PARAMS, (UP, y))
    with pytest.raises(PlanMismatchError) as caught:
        step(PARAMS, (-UP, y))
    for line in ("got ", "wanted ", "options "):
        assert f"\n  {line}" in str(caught.value)


def test_a_plan_for_other_inputs_is_refused_and_made_anew_without_it():
    fn, params = kf.make_functional(nn.Linear(3, 2))
    long, short = torch.ones(2, 5, 3), torch.ones(2, 4, 3)
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.empirical())
    plan = kf.make_plan(fn, params, long)
    with pytest.raises(PlanMismatchError, match=r"giving \[2, 4, 2\]"):
        step(params, (short, torch.zeros(2, 4, 2)), plan=plan)
    for x in (long, short, long):
        _, _, stats = step(params, (x, torch.zeros(2, x.shape[1], 2)))
        assert stats.blocks()["weight"].positions == x.shape[1]


def test_an_input_written_in_place_is_noticed():
    def fn(p: dict, x: Tensor) -> Tensor:
        x = x.sin()
        y = F.linear(x, p["w"])
        x.mul_(2)
        return y * x

    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.empirical())
    params, batch = {"w": W}, (UP, UP)
    with pytest.raises(RuntimeError, match="inplace"):
        step(params, batch, stats=False)  # torch notices
    with pytest.raises((RuntimeError, ValueError)):
        step(params, batch)


IN_PLACE = {
    "relu": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
    "conv relu": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 3, 2), nn.ReLU(True), nn.Conv1d(3, 2, 2), nn.Hardtanh(inplace=True)
    ),
}


@pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE)
def test_activations_may_write_in_place(make):
    fn, params = kf.make_functional(make().double())
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse("batchmean"), estimator=kf.estimators.exact())
    batch = UP, torch.ones_like(fn(params, UP))
    value, grads, stats = step(params, batch)
    torch.testing.assert_close((value, grads), step(params, batch, stats=False)[:2])
    assert all(grad.abs().max() > 0 for grad in grads.values())
    outer, inner = stats.blocks().values()
    assert torch.equal(inner.uses[0].inputs, inner.uses[0].inputs.clamp(min=0))
    torch.testing.assert_close(outer.uses[0].inputs.flatten(), UP.flatten())


MIXED = {
    "positions in front": lambda p, x: F.linear(x, p["w"]).T,
    "a sum over the batch": lambda p, x: F.linear(x, p["w"]).sum(),
    "rows of all examples": lambda p, x: F.linear(torch.stack([x, x], 1), p["w"]).flatten(0, 1),
}


@pytest.mark.parametrize("fn", MIXED.values(), ids=MIXED)
def test_outputs_keep_the_examples_first(fn):
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    with pytest.raises(BatchError, match="outputs") as caught:
        step({"w": W}, (UP, fn({"w": W}, UP)))
    assert re.search("for . examples|for a single example", str(caught.value))


@pytest.mark.parametrize("stats", [True, False])
def test_an_empty_batch_is_refused(stats):
    fn, params = kf.make_functional(nn.Linear(3, 2))
    with pytest.raises(BatchError, match=r"\[0, 3\]"):
        kf.value_grad_and_stats(fn, kf.losses.mse())(params, (torch.ones(0, 3), torch.ones(0, 2)), stats=stats)


TREES = {
    "nested": (
        {"layer": [W, {"b": PARAMS["b"]}]},
        lambda p, x: F.linear(x, p["layer"][0], p["layer"][1]["b"]),
        "layer.0",
    ),
    "tuple": ((W, PARAMS["b"]), lambda p, x: F.linear(x, *p), "0"),
    "a single leaf": (W, lambda p, x: F.linear(x, p), ""),
    "with None": ({"w": W, "none": None}, lambda p, x: F.linear(x, p["w"], p["none"]), "w"),
}


@pytest.mark.parametrize(("params", "fn", "name"), TREES.values(), ids=TREES)
def test_parameters_are_any_tree(params, fn, name):
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    value, grads, stats = step(params, (UP, UP))
    plain = step(params, (UP, UP), stats=False)
    torch.testing.assert_close(value, plain[0])
    _tree.tree_map(torch.testing.assert_close, plain[1], grads)
    assert list(stats.blocks()) == [name]
    tx = kf.kfac(damping=0.1)
    updates, state = tx.update(grads, tx.init(params), params, stats=stats)
    assert _tree.leaves(kf.apply_updates(params, updates))[0].shape == (3, 3)
    assert int(state.observed) == 1
