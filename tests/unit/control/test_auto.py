"""kfac_auto: what its step is made of, that it is pure, and that it trains different nets with nothing tuned."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree
from kfac_func._typing import PyTree
from kfac_func.demo.data import curves
from kfac_func.demo.models import autoencoder
from kfac_func.state import inside
from tests.zoo import CASES, close, randn

CASE = CASES["mlp"]


def same(one: PyTree, two: PyTree) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tree.leaves(one), _tree.leaves(two), strict=True))


def trained(auto: kf.recipes.Auto, steps: int, params: PyTree = CASE.params, batch: Any = CASE.batch) -> Any:
    state, infos = auto.init(params), []
    for _ in range(steps):
        params, state, info = auto.step(params, state, batch)
        infos.append(info)
    return params, state, infos


def test_the_step_is_the_chain_that_the_docstring_shows():
    options: dict[str, Any] = {"estimator": kf.estimators.exact()}
    params, _, infos = trained(kf.kfac_auto(CASE.fn, CASE.loss, l2=1e-2, l2_mask="*.w", **options), 12)
    model = kf.quadratic_model(CASE.fn, CASE.loss, l2=1e-2, mask="*.w")
    inner = kf.chain(
        kf.ema(0.7),
        kf.add_decayed_weights(1e-2, "*.w"),
        kf.kfac(damping=5e-4, l2=1e-2, l2_mask="*.w", refresh_every=5),
        kf.scale_by_quadratic_model(model),
    )
    tx = kf.adapt_damping(inner, kf.levenberg_marquardt(min=5e-6), model=model, calibrate=True)
    step = kf.value_grad_and_stats(CASE.fn, CASE.loss, estimator=kf.estimators.exact())
    mine, state = CASE.params, tx.init(CASE.params)
    for info in infos:
        assert close(info.loss, model.value(mine, CASE.batch))
        _, grads, stats = step(mine, CASE.batch)
        updates, state = tx.update(grads, state, mine, stats=stats, batch=CASE.batch)
        mine = kf.apply_updates(mine, updates)
        assert float(info.damping) == float(_tree.leaves(inside(state)[0].damping)[0])
        assert float(info.rho) == float(state.ratio)
        assert float(info.learning_rate) == float(state.inner[-1].learning_rate)
        assert float(info.momentum) == float(state.inner[-1].momentum)
    assert same(params, mine)


def test_equal_states_make_equal_steps_and_nothing_is_written():
    case = CASES["bernoulli"]
    auto = kf.kfac_auto(case.fn, case.loss)
    params, state, _ = trained(auto, 3, case.params, case.batch)
    before = copy.deepcopy((params, state))
    rng = torch.get_rng_state()
    one = auto.step(params, state, case.batch)
    assert same(before, (params, state))
    assert torch.equal(rng, torch.get_rng_state())
    assert same(one, auto.step(params, state, case.batch))
    assert not same(one[:2], auto.step(params, state, case.batch, torch.Generator().manual_seed(7))[:2])


@pytest.mark.parametrize(
    "options",
    [
        {"l2": 0.1},
        {"averaging": 0.0},
        {"refresh_every": 1},
        {"examples": 0.5},
        {"curvature": kf.curvature.eigen()},
        {"estimator": kf.estimators.empirical()},
        {"sharing": "reduce", "estimator": kf.estimators.empirical()},
    ],
    ids="+".join,
)
def test_every_option_changes_the_steps(options: dict[str, Any]):
    base = {"estimator": options["estimator"]} if "sharing" in options else {}
    case = CASES["attention"] if "sharing" in options else CASE
    ordinary, changed = (
        trained(kf.kfac_auto(case.fn, case.loss, **chosen), 8, case.params, case.batch)[0] for chosen in (base, options)
    )
    assert not same(ordinary, changed)


def test_steps_that_raise_the_loss_are_taken_back_on_request():
    auto = kf.kfac_auto(CASE.fn, CASE.loss, reject=True)
    params, state = CASE.params, auto.init(CASE.params)
    losses = []
    for _ in range(40):
        params, state, info = auto.step(params, state, CASE.batch)
        losses.append(float(info.loss))
    assert int(state.rejected) > 0
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]


NETS: dict[str, tuple[nn.Module, Tensor]] = {
    "conv": (nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), randn(20, 1, 4, 4)),
    "encoder": (
        nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 2)),
        randn(20, 3, 4),
    ),
}


@pytest.mark.parametrize("factor", [1e-3, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_it_fits_other_nets_and_scales_of_the_loss(name: str, factor: float):
    module, x = NETS[name]
    torch.manual_seed(0)
    fn, params = kf.make_functional(module.double())
    params = {path: 0.5 * randn(*leaf.shape, seed=k) for k, (path, leaf) in enumerate(params.items())}
    y = x.flatten(1)[:, :2].sin()
    loss = kf.losses.mse(reduction="batchmean", scale=factor)
    params, _, infos = trained(kf.kfac_auto(fn, loss), 60, params, (x, y))
    assert math.isfinite(float(infos[-1].loss))
    assert float(infos[-1].loss) < 0.1 * float(infos[0].loss)


def test_the_small_autoencoder_of_the_benchmark_is_below_30_after_100_steps():
    """Also run to the end, for three seeds, by benchmarks/convergence.py."""
    images = curves(1000, torch.Generator().manual_seed(0), side=12, sigma=0.8)
    loss = kf.losses.bce_with_logits(reduction="batchmean")
    fn, params = kf.make_functional(autoencoder((144, 100, 50, 25, 6), seed=0))
    params, _, _ = trained(kf.kfac_auto(fn, loss, l2=1e-5), 100, params, (images, images))
    assert loss.value(fn(params, images), images) < 30


def test_states_are_saved_and_go_on(tmp_path: Any):
    auto = kf.kfac_auto(CASE.fn, CASE.loss)
    params, state, _ = trained(auto, 3)
    torch.save((params, state), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(auto.step(params, state, CASE.batch), auto.step(*loaded, CASE.batch))
