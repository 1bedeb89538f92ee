"""Where K-FAC is exact: T G x A equals the GGN block (mathematics, exactness regimes)."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.nn.functional as F

import kfac_func as kf
from tests import oracles
from tests.oracles import Spec
from tests.zoo import (
    CASES,
    Case,
    close,
    curvature_of,
    dense_block,
    direction,
    kronecker_block,
    measured,
    outer,
    randn,
    subset,
)

HALF = kf.losses.mse(reduction="batchmean", scale=0.5)


def _half(z, t):
    return 0.5 * (z - t).square().sum() / len(z)


def _case(fn, params, inputs, outputs, positions=1) -> Case:
    n = len(inputs[0]) if isinstance(inputs, tuple) else len(inputs)
    targets, blocks = randn(n, *outputs, seed=7), {}
    for path in params:
        if not path.endswith("_bias"):
            bias = f"{path}_bias"
            blocks[path] = Spec(path, bias if bias in params else None)
    return Case(fn, params, cast(torch.Tensor, inputs), targets, HALF, _half, blocks, dict.fromkeys(blocks, positions))


def _chain(p, x):
    return F.linear(F.linear(x, p["one"], p["one_bias"]), p["two"], p["two_bias"])


CHAIN = {"one": randn(5, 4), "one_bias": randn(5, seed=1), "two": randn(2, 5, seed=2), "two_bias": randn(2, seed=3)}
POSITIONED = _case(_chain, CHAIN, randn(7, 3, 4, seed=4), (3, 2), 3)
AVERAGED = _case(
    lambda p, x: F.linear(x, p["one"], p["one_bias"]).mean(1), dict(list(CHAIN.items())[:2]), randn(7, 3, 4), (5,), 3
)
SUMMED = AVERAGED._replace(fn=lambda p, x: F.linear(x, p["one"], p["one_bias"]).sum(1))


def test_deep_linear_network_with_squared_loss():
    for name, block in measured(CASES["deep_linear"]).items():
        assert close(kronecker_block(block), curvature_of("deep_linear").block(CASES["deep_linear"].blocks[name]))


@pytest.mark.parametrize("name", ["mlp", "mean_square", "bernoulli", "deep_linear"])
def test_one_example_and_one_position(name):
    for n in (0, 3):
        case = subset(CASES[name], n, n + 1)
        for block, mine in measured(case).items():
            assert close(kronecker_block(mine), dense_block(case, block))


@pytest.mark.parametrize("name", ["mlp", "mean_square", "bernoulli"])
def test_not_exact_beyond_its_regime(name):
    """Otherwise the tests of this file would prove nothing."""
    first = next(iter(CASES[name].blocks))
    assert not close(
        kronecker_block(measured(CASES[name])[first]), curvature_of(name).block(CASES[name].blocks[first]), 1e-3
    )


def test_constant_inputs():
    case = _case(
        lambda p, x: F.linear(torch.tanh(F.linear(x[0], p["one"]) * x[1]), p["two"]),
        {"one": randn(5, 4), "two": randn(2, 5, seed=1)},
        (randn(1, 4, seed=2).expand(7, 4), randn(7, 5, seed=3)),
        (2,),
    )
    assert close(kronecker_block(measured(case)["one"]), dense_block(case, "one"))
    varied = case._replace(inputs=(randn(7, 4, seed=2), case.inputs[1]))
    assert not close(kronecker_block(measured(varied)["one"]), dense_block(varied, "one"), 1e-3)


def test_constant_gradients():
    case = _case(
        lambda p, x: F.linear(torch.tanh(F.linear(x, p["one"])), p["two"]),
        {"one": randn(5, 4), "two": randn(2, 5, seed=1)},
        randn(7, 4, seed=2),
        (2,),
    )
    found = measured(case)
    assert close(kronecker_block(found["two"]), dense_block(case, "two"))
    assert not close(kronecker_block(found["one"]), dense_block(case, "one"), 1e-3)


@pytest.mark.parametrize("block", ["one", "two"])
def test_expand_when_the_loss_sums_over_positions(block):
    wanted = dense_block(POSITIONED, block)
    assert close(kronecker_block(measured(POSITIONED)[block]), wanted)
    assert not close(kronecker_block(measured(POSITIONED, sharing="reduce")[block]), wanted, 1e-3)


@pytest.mark.parametrize("case", [AVERAGED, SUMMED], ids=["mean", "sum"])
def test_reduce_when_positions_are_averaged_right_after(case):
    wanted = dense_block(case, "one")
    assert close(kronecker_block(measured(case, sharing="reduce")["one"]), wanted)
    assert close(outer(measured(case, sharing="reduce")["one"]), wanted)
    assert not close(kronecker_block(measured(case)["one"]), wanted, 1e-3)


@pytest.mark.parametrize("path", ["one", "two", "three"])
@pytest.mark.parametrize("sharp", [F.relu, torch.tanh], ids=["relu", "tanh"])
def test_blocks_of_a_piecewise_linear_net_are_those_of_the_hessian(path, sharp):
    params = {"one": randn(5, 4), "two": randn(6, 5, seed=1), "three": randn(3, 6, seed=2)}
    x, y = randn(7, 4, seed=3), torch.arange(7) % 3

    def fn(p, x):
        return F.linear(sharp(F.linear(sharp(F.linear(x, p["one"])), p["two"])), p["three"])

    case = Case(fn, params, x, y, kf.losses.cross_entropy(), F.cross_entropy, {k: Spec(k) for k in params}, {})
    hessian = oracles.loss_hessian(fn, params, x, y, F.cross_entropy, path)
    assert close(outer(measured(case)[path]), hessian) == (sharp is F.relu or path == "three")


def test_exact_kfac_is_invariant_to_affine_reparametrisation():
    """x' = M x + c, s' = K s, h' = N h + n: the step is the same function, whatever the coordinates."""
    m, c, k, n, n0 = randn(3, 3), randn(3, seed=1), randn(5, 5, seed=2), randn(5, 5, seed=3), randn(5, seed=4)
    w1, w2, x = randn(5, 4, seed=5), randn(2, 6, seed=6), randn(11, 3, seed=7)

    def omega(m, c):
        return torch.cat([torch.cat([m, c[:, None]], 1), torch.eye(len(c) + 1, dtype=m.dtype)[-1:]])

    def net(act):
        return lambda p, x: F.linear(act(F.linear(x, p["a.w"], p["a.b"])), p["b.w"], p["b.b"])

    def case(act, one, two, x):
        params = {"a.w": one[:, :-1], "a.b": one[:, -1], "b.w": two[:, :-1], "b.b": two[:, -1]}
        return Case(net(act), {p: v.clone() for p, v in params.items()}, x, randn(11, 2, seed=8), HALF, _half, {}, {})

    def other_act(s):
        return torch.tanh(s @ torch.linalg.inv(k).T) @ n.T + n0

    plain = case(torch.tanh, w1, w2, x)
    inverse = torch.linalg.inv
    turned = case(other_act, k @ w1 @ inverse(omega(m, c)), w2 @ inverse(omega(n, n0)), x @ m.T + c)
    assert close(turned.fn(turned.params, turned.inputs), plain.fn(plain.params, plain.inputs), 1e-8)

    def steps(damping):
        found = []
        for one in (plain, turned):
            v = direction(one, damping=damping, split="exact")
            found += [torch.cat([v[f"{layer}.w"], v[f"{layer}.b"][:, None]], 1) for layer in "ab"]
        a, b, a_turned, b_turned = found
        return close(inverse(k) @ a_turned @ omega(m, c), a, 1e-7), close(b_turned @ omega(n, n0), b, 1e-7)

    assert steps(0.0) == (True, True)
    assert steps(1.0) == (False, False)
