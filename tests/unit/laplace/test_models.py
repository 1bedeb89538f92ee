"""Posteriors and predictions of models that neither a tape nor a vmap can take."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kfac_func as kf
from kfac_func import errors
from tests.unit.products.test_models import LOSS, MODELS, Model, flat, jacobians
from tests.zoo import close

L = kf.laplace
SHOWN = ["lstm", "gpt", "encoder", "squeezed", "before torch.func"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning"),
]


def fitted(m: Model, **options: Any) -> L.Posterior:
    options = {"generator": torch.Generator().manual_seed(0), **options}
    return L.fit(m.fn, LOSS, m.params, [m.batch], prior_precision=0.7, **options)


@pytest.mark.parametrize("name", [name for name in SHOWN if name != "before torch.func"])
def test_the_variance_is_that_of_the_jacobian(name):
    m = MODELS[name]()
    posterior = fitted(m, unclaimed="diagonal")
    j, p = flat(jacobians(m), 2), L.precision(posterior).to_dense()
    wanted = j @ torch.linalg.solve(p, j.mT)
    for size in (None, 2) if name != "encoder" else (None,):  # which cuts its inputs to the longest of a chunk
        found = L.predict(posterior, m.fn, m.inputs, chunk_size=size)
        assert close(found.covariance, wanted)
        assert close(found.mean, m.fn(m.params, m.inputs))
    variance = L.functional_variance(posterior, m.fn, m.inputs, route="loop")
    assert close(variance, wanted.diagonal(dim1=1, dim2=2))


def test_only_fixes_the_other_blocks():
    m = MODELS["lstm"]()
    posterior = fitted(m, unclaimed="diagonal")
    every = jacobians(m)
    j = flat({path: every[path] for path in ("head.weight", "head.bias")}, 2)
    operator = L.precision(fitted(m, only=("head.*",)))
    wanted = j @ torch.linalg.solve(operator.to_dense(), j.mT)
    assert close(L.predict(posterior, m.fn, m.inputs, route="tape", only=["head.*"]).covariance, wanted)
    with pytest.raises(errors.CaptureError, match=r"(?s)cells.*only="):
        L.predict(posterior, m.fn, m.inputs, route="tape")


@pytest.mark.parametrize("name", SHOWN)
def test_nets_that_are_drawn_run_one_after_the_other(name):
    m = MODELS[name]()
    if name == "before torch.func":  # no curvature without it: that of another net with such parameters
        other = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)).double()
        batch, names = (torch.ones(6, 4).double(), m.targets), dict(zip("01", ("body", "head"), strict=True))
        fn, params = kf.make_functional(other)
        renamed = {names[path[0]] + path[1:]: leaf for path, leaf in params.items()}
        posterior = L.fit(
            lambda p, x: fn({path: p[names[path[0]] + path[1:]] for path in params}, x), LOSS, renamed, [batch]
        )
    else:
        posterior = fitted(m, **({"unclaimed": "diagonal"} if name == "encoder" else {"only": ("head.*",)}))
    options: Any = {"samples": 4}
    drawn = L.sample(posterior, torch.Generator().manual_seed(5), 4)
    each = [m.fn({path: leaf[k] for path, leaf in drawn.items()}, m.inputs).softmax(1) for k in range(4)]
    wanted = torch.stack(each).mean(0)
    for route in ("auto", "loop"):
        generator = torch.Generator().manual_seed(5)
        found = L.sampled_predictive(posterior, m.fn, m.inputs, generator=generator, route=route, **options)
        assert close(found, wanted.detach())


def test_a_vmap_refuses_what_it_cannot_run_and_auto_says_so():
    m = MODELS["lstm"]()
    posterior, generator = fitted(m, only=("head.*",)), torch.Generator()
    with pytest.raises(errors.CaptureError, match="route='loop'"):
        L.sampled_predictive(posterior, m.fn, m.inputs, generator=generator, samples=2, route="vmap")
    with pytest.warns(errors.KFacWarning, match="route='loop'"):
        L.sampled_predictive(posterior, m.fn, m.inputs, generator=generator, samples=2)


def test_dropout_is_drawn_anew_for_every_net():
    m = MODELS["dropout"]()
    posterior = fitted(m)
    options: Any = {"samples": 3, "route": "loop", "link": "identity", "prior_precision": 1e12}
    torch.manual_seed(3)
    found = L.sampled_predictive(posterior, m.fn, m.inputs, generator=torch.Generator().manual_seed(0), **options)
    torch.manual_seed(3)
    wanted = sum(m.fn(m.params, m.inputs) for _ in range(3)) / 3
    assert torch.allclose(found, torch.as_tensor(wanted), atol=1e-4)


@pytest.mark.parametrize("name", ["kronecker", "diagonal", "eigen"])
def test_a_noise_and_an_empirical_fisher_are_a_scaled_loss(name):
    fn, params = kf.make_functional(torch.nn.Linear(3, 2).double())
    x, y, noise = torch.randn(10, 3).double(), torch.randn(10, 2).double(), 0.09
    options: Any = {
        "curvature": getattr(kf.curvature, name)(), "estimator": kf.estimators.empirical(), "prior_precision": 0.7,
    }  # fmt: skip
    one = L.fit(fn, kf.losses.mse("batchmean", scale=0.5), params, [(x, y)], noise=noise, **options)
    two = L.fit(fn, kf.losses.mse("batchmean", scale=0.5 / noise), params, [(x, y)], **options)
    assert close(L.precision(one).to_dense(), L.precision(two).to_dense())
    constant = 10 * math.log(2 * math.pi * noise)
    assert close(L.log_marginal_likelihood(one), L.log_marginal_likelihood(two) - constant)
    tuned = [L.tune_prior_precision(posterior).prior_precision for posterior in (one, two)]
    assert all(close(tuned[0][block], tuned[1][block]) for block in tuned[0])


def test_wide_targets_are_those_of_the_net():
    fn, params = kf.make_functional(torch.nn.Linear(4, 1))
    x, y, loss = torch.randn(20, 4), torch.randn(20, 1).double(), kf.losses.mse("batchmean", scale=0.5)
    one, two = (L.fit(fn, loss, params, [(x, targets)], noise=0.1) for targets in (y, y.float()))
    assert float((one.nll / two.nll - 1).abs()) < 1e-5
    assert torch.equal(L.precision(one).to_dense(), L.precision(two).to_dense())
