"""Steps do not hang on each other: parameters of a module are taken off the graph, and others are told."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf

X, Y = torch.randn(6, 4), torch.randn(6, 3)


def nodes(x: Tensor) -> int:
    seen, todo = set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    return len(seen)


TRANSFORMS = {
    "kfac": lambda: kf.chain(kf.kfac(), kf.sgd(0.1)),
    "adamw": lambda: kf.adamw(0.1),
    "decayed": lambda: kf.chain(kf.add_decayed_weights(0.1), kf.ekfac(), kf.clip_by_global_norm(1.0), kf.sgd(0.1)),
}


def run(params: Any, name: str, count: int = 5) -> list[int]:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    fn, _ = kf.make_functional(module)
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    tx, found = TRANSFORMS[name](), []
    params = dict(module.named_parameters()) if params is None else params(module)
    state = tx.init(params)
    for _ in range(count):
        _, grads, stats = step(params, (X, Y))
        updates, state = tx.update(grads, state, params, **({} if name == "adamw" else {"stats": stats}))
        params = kf.apply_updates(params, updates)
        found.append(nodes(params["0.weight"]))
    return found


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_parameters_of_a_module_leave_no_graph(name):
    assert run(None, name) == [0] * 5


def test_other_tensors_that_require_grad_keep_theirs_and_are_told_once():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sizes = run(lambda m: {k: v.detach().requires_grad_() for k, v in m.named_parameters()}, "kfac")
    assert sizes[-1] > sizes[0] > 0
    assert [w.category for w in told] == [kf.errors.KFacWarning]
    assert "requires_grad" in str(told[0].message)


def test_auto_and_fit_leave_no_graph():
    module = nn.Linear(4, 3)
    fn, _ = kf.make_functional(module)
    params = dict(module.named_parameters())
    auto = kf.kfac_auto(fn, kf.losses.mse())
    state = auto.init(params)
    for _ in range(3):
        params, state, _ = auto.step(params, state, (X, Y))
    assert nodes(params["weight"]) == 0
    fitted = kf.fit_curvature(fn, kf.losses.mse(), dict(module.named_parameters()), [(X, Y)])
    assert not any(leaf.requires_grad for leaf in kf.tree_get(fitted, "curvature").matrix["weight"].factors[:1])
