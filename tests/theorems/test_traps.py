"""Equivalences that catch a lost N, T, bias column or trace."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.nn.functional as F

import kfac_func as kf
from kfac_func._tree import leaves
from kfac_func.damping import pi_split
from tests import oracles
from tests.oracles import Spec
from tests.zoo import CASES, Case, close, direction, measured, randn, subset


def _moments(case: Case, **options) -> dict[str, list[torch.Tensor]]:
    """All moments of a case as lists of tensors."""
    structures = {True: [kf.curvature.kronecker(), kf.curvature.diagonal()], False: [kf.curvature.diagonal()]}
    blocks = measured(case, **options)
    return {name: leaves([s.measure(b) for s in structures[b.layout.matrix]]) for name, b in blocks.items()}


def _same(one: dict, two: dict) -> bool:
    return all(close(a, b) for name in one for a, b in zip(one[name], two[name], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_duplicates_change_nothing(name):
    case = CASES[name]
    twice = case._replace(inputs=torch.cat([case.inputs] * 2), targets=torch.cat([case.targets] * 2))
    assert _same(_moments(case), _moments(twice))
    a, b = direction(case, damping=0.01), direction(twice, damping=0.01)
    assert all(close(a[path], b[path], 1e-9) for path in a)


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_examples_changes_nothing(name):
    case = CASES[name]
    order = torch.randperm(len(case.targets), generator=torch.Generator().manual_seed(1))
    turned = case._replace(inputs=case.inputs[order], targets=case.targets[order])
    assert _same(_moments(case), _moments(turned))
    a, b = direction(case, damping=0.01), direction(turned, damping=0.01)
    assert all(close(a[path], b[path], 1e-9) for path in a)


def test_other_examples_change_something():
    case = CASES["mlp"]
    assert not _same(_moments(case), _moments(subset(case, 0, 7)))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize("shape", [(7, 4), (7, 3, 4)])
def test_a_bias_is_a_constant_feature(shape, split, sharing):
    x, w, b = randn(*shape), randn(5, 4, seed=1), randn(5, seed=2)
    wide = torch.cat([x, torch.ones(*shape[:-1], 1, dtype=x.dtype)], -1)
    targets = randn(*shape[:-1], 5, seed=3)

    def case(params, inputs):
        fn = lambda p, x: torch.tanh(F.linear(x, p["w"], p.get("b")))  # noqa: E731
        return Case(fn, params, inputs, targets, kf.losses.mse(), F.mse_loss, {}, {})

    options = {"sharing": sharing}
    one = direction(case({"w": w, "b": b}, x), options=options, damping=0.01, split=split)
    two = direction(case({"w": torch.cat([w, b[:, None]], 1)}, wide), options=options, damping=0.01, split=split)
    assert close(torch.cat([one["w"], one["b"][:, None]], 1), two["w"], 1e-9)


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_one_example(name, split):
    """Rank-deficient factors: finite, and a descent direction."""
    case = subset(CASES[name], 2, 3)
    step = kf.value_grad_and_stats(case.fn, case.loss, estimator=kf.estimators.exact())
    _, grads, _ = step(case.params, case.batch)
    v = direction(case, damping=0.01, split=split)
    assert all(bool(x.isfinite().all()) for x in v.values())
    assert sum(float((v[path] * g).sum()) for path, g in oracles.flat(grads).items()) > 0


def _relu(p, x):
    return F.linear(F.relu(F.linear(x, p["w"], p["b"])), p["head"])


def _relu_case(shift: torch.Tensor) -> Case:
    params = {"w": randn(5, 4), "b": shift, "head": randn(3, 5, seed=1)}
    data, loss = (randn(7, 4, seed=2), torch.arange(7) % 3), kf.losses.cross_entropy()
    return Case(_relu, params, *data, loss, F.cross_entropy, {"w": Spec("w", "b"), "head": Spec("head")}, {})


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize("dead", [1, 5])
def test_dead_units(dead, split):
    """Units that never fire get no update. With all of them dead G = 0, π = 1 and nothing but the damping is left."""
    shift = torch.zeros(5, dtype=torch.float64)
    shift[:dead] = -100.0
    case = _relu_case(shift)
    v = direction(case, damping=0.01, split=split)
    assert all(bool(x.isfinite().all()) for x in v.values())
    assert torch.count_nonzero(v["w"][:dead]) == 0
    k = kf.curvature.kronecker()
    state = k.measure(measured(case)["w"])
    assert torch.count_nonzero(state.g) == (5 - dead) ** 2
    u = randn(5, 5, seed=4)
    matrix = oracles.damped(state.a, state.g, 1.0, 0.01, split)
    solved = k.solve(k.factorize(state, torch.tensor(0.01, dtype=torch.float64), split), u)
    assert close(matrix @ solved.flatten(), u.flatten(), 1e-9)


def test_pi_is_one_without_a_trace():
    a, nothing, damping = torch.eye(3) * 4, torch.zeros(2, 2), torch.tensor(0.25)
    assert [float(s) for s in pi_split(a, nothing, damping)] == [0.5, 0.5]
    assert [float(s) for s in pi_split(nothing, a, damping)] == [0.5, 0.5]
    assert [float(s) for s in pi_split(a, torch.eye(2), damping)] == [1.0, 0.25]


def test_uses_of_one_weight_share_their_positions():
    """T counts the uses: a weight used three times is a weight on three positions."""
    w, x = randn(5, 4), randn(7, 3, 4, seed=1)
    loss, targets = kf.losses.mse(), randn(7, 5, seed=2)

    def apart(p, x):
        return cast(torch.Tensor, sum(torch.tanh(F.linear(step, p["w"])) for step in x.unbind(1)))

    def together(p, x):
        return torch.tanh(F.linear(x, p["w"])).sum(1)

    one, two = (Case(fn, {"w": w}, x, targets, loss, F.mse_loss, {}, {}) for fn in (apart, together))
    assert measured(one)["w"].positions == measured(two)["w"].positions == 3
    assert _same(_moments(one), _moments(two))
