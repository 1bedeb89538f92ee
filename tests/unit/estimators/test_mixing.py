"""Models whose examples see each other: curvature is right in expectation, whatever crosses from one to another.

The oracle is the Jacobian of the whole batch; averages are over all 2^N patterns of signs of the N = 3 examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import squares
from kfac_func.estimators import statistics
from tests import oracles
from tests.zoo import close, randn

PARAMS = {"w": randn(6, 4), "v": randn(2, 6, seed=4)}
X, Y = randn(3, 4, seed=1), randn(3, 2, seed=2)
LOSS = kf.losses.mse("batchmean", scale=0.5)


def centred(p: dict, x: Tensor) -> Tensor:
    h = F.linear(x, p["w"])
    return F.linear(torch.tanh(h - 0.5 * h.mean(0)), p["v"])


def normalised(p: dict, x: Tensor) -> Tensor:
    h = F.linear(x, p["w"])
    return F.linear((h - h.mean(0)) / (h.var(0, correction=0) + 0.1).sqrt(), p["v"])


def contrasted(p: dict, x: Tensor) -> Tensor:
    z = torch.tanh(F.linear(F.linear(x, p["w"]), p["v"]))
    return z + (z @ z.T).softmax(0) @ z


def routed(p: dict, x: Tensor) -> Tensor:
    """Sorted by what the net itself finds, and put back."""
    h = F.linear(x, p["w"])
    order = h[:, 0].detach().argsort()
    return F.linear(torch.tanh(h)[order], p["v"])[order.argsort()]


def flipped(p: dict, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x.flip(0), p["w"])), p["v"]).flip(0)


def rolled(p: dict, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["w"]).roll(1, 0)), p["v"]).roll(-1, 0)


MODELS: dict[str, Callable[[dict, Tensor], Tensor]] = {
    f.__name__: f for f in (centred, normalised, contrasted, routed, flipped, rolled)
}
models = pytest.mark.parametrize("fn", MODELS.values(), ids=MODELS)


def dense(fn: Callable, path: str) -> Tensor:
    j = torch.func.jacrev(lambda leaf: fn({**PARAMS, path: leaf}, X))(PARAMS[path]).reshape(X.shape[0] * 2, -1)
    return j.T @ j / len(X)


@models
def test_the_plan_says_so_whatever_the_order_of_the_batch(fn):
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 1], [1, 0], [2]):
        plan = kf.make_plan(fn, PARAMS, X[order])
        assert plan.crossed, order
        assert "'w'" in plan.mixing or "'v'" in plan.mixing


@models
def test_gradients_are_exact(fn):
    step: Any = kf.value_grad_and_stats(fn, LOSS)
    value, grads, _ = step(PARAMS, (X, Y), generator=torch.Generator().manual_seed(0))
    wanted = torch.func.grad_and_value(lambda p: LOSS.value(fn(p, X), Y))(PARAMS)
    torch.testing.assert_close((grads, value), wanted, rtol=1e-10, atol=1e-12)


@models
def test_exact_vectors_with_signs_give_the_diagonal_of_the_whole_batch(monkeypatch, fn):
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    found: dict[str, Any] = dict.fromkeys(PARAMS, 0.0)
    for u in oracles.patterns(len(X), (0.25, 0.75)):
        monkeypatch.setattr(statistics, "uniform", lambda *args, u=u: u)
        for path, block in step(PARAMS, (X, Y))[2].blocks().items():
            found[path] = found[path] + squares(block) / 2 ** len(X)
    for path, diagonal in found.items():
        assert close(diagonal.flatten(), dense(fn, path).diagonal()), path


def test_exact_vectors_need_a_generator():
    step: Any = kf.value_grad_and_stats(centred, LOSS, estimator=kf.estimators.exact())
    with pytest.raises(kf.errors.HyperparameterError, match="examples see each other"):
        step(PARAMS, (X, Y))


PROMISES: dict[str, Callable[[], kf.GradientTransformation]] = {
    "exact_natural_gradient": kf.exact_natural_gradient,
    "diagonal": lambda: kf.kfac(kf.curvature.diagonal()),
    "block_diagonal": lambda: kf.kfac(kf.curvature.block_diagonal()),
    "kpsvd": kf.kpsvd,
    "deflation": lambda: kf.deflation(2),
    "corrected": kf.corrected,
    "lanczos": lambda: kf.lanczos(2),
}


@pytest.mark.parametrize("made", PROMISES.values(), ids=PROMISES)
def test_what_promises_the_block_itself_is_refused(made):
    step: Any = kf.value_grad_and_stats(centred, LOSS)
    _, grads, stats = step(PARAMS, (X, Y), generator=torch.Generator().manual_seed(0))
    tx = made()
    with pytest.raises(kf.errors.StateError, match="see each other"):
        tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)


def test_scale_and_shift_are_estimated_beside_kfac_and_refused_where_the_diagonal_is_asked_for():
    def fn(p: dict, x: Tensor) -> Tensor:
        h = F.layer_norm(F.linear(x, p["w"]), (6,), p["gain"])
        return F.linear(torch.tanh(h - 0.5 * h.mean(0)), p["v"])

    params = PARAMS | {"gain": randn(6, seed=9)}
    step: Any = kf.value_grad_and_stats(fn, LOSS)
    _, grads, stats = step(params, (X, Y), generator=torch.Generator().manual_seed(0))
    tx = kf.kfac()
    assert tx.update(grads, tx.init(params), params, stats=stats)[0]["gain"].isfinite().all()
    alone: Any = kf.value_grad_and_stats(fn, LOSS, unclaimed={"w": "identity", "v": "identity"})
    _, grads, stats = alone(params, (X, Y), generator=torch.Generator().manual_seed(0))
    exact = kf.kfac(kf.curvature.diagonal())
    with pytest.raises(kf.errors.StateError, match="'gain'"):
        exact.update(grads, exact.init(params), params, stats=stats)


@pytest.mark.parametrize("made", [kf.kfac, kf.ekfac, kf.inverse_free])
def test_what_is_an_approximation_goes_on(made):
    step: Any = kf.value_grad_and_stats(centred, LOSS)
    _, grads, stats = step(PARAMS, (X, Y), generator=torch.Generator().manual_seed(0))
    tx = made()
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    assert int(state.observed) == 1
    assert all(bool(u.isfinite().all()) and bool((u * grads[k]).sum() > 0) for k, u in updates.items())


def test_statistics_of_the_inputs_alone_cross_nothing():
    plan = kf.make_plan(lambda p, x: F.linear(x - x.mean(0), p["w"]), {"w": PARAMS["w"]}, X)
    assert plan.mixing
    assert not plan.crossed
    assert not plan.shared
