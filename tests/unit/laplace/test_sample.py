"""Draws of the parameters against the dense inverse, and what nets drawn from the posterior predict."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kfac_func as kf
from tests import oracles
from tests.zoo.cases import CASES, weights
from tests.zoo.models import mlp
from tests.zoo.run import close

SMALL: Any = weights({"first.w": (2, 3), "first.b": (3,), "second.w": (3, 2), "second.b": (2,)})
X = torch.linspace(-1, 1, 14, dtype=torch.float64).reshape(7, 2)
Y = torch.arange(7) % 2
LOSS = kf.losses.cross_entropy()


@pytest.mark.parametrize("curvature", ["eigen", "kronecker"])
def test_draws_have_the_covariance_of_the_posterior(curvature, generator):
    count = 20_000
    structure = getattr(kf.curvature, curvature)()
    posterior = kf.laplace.fit(mlp, LOSS, SMALL, [(X, Y)], curvature=structure)
    drawn = oracles.flat(kf.laplace.sample(posterior, generator, count, prior_precision=2.0))
    state = kf.fit_curvature(mlp, LOSS, SMALL, [(X, Y)], curvature=structure)
    f = kf.linear_operator(state, SMALL, damping=0.0).to_dense()
    wanted = torch.linalg.inv(len(Y) * f + 2.0 * torch.eye(len(f), dtype=f.dtype))
    order = sorted(drawn)
    means = oracles.flat(SMALL)
    steps = torch.cat([(drawn[path] - means[path]).flatten(1) for path in order], dim=1)
    diagonal = wanted.diagonal()
    error = ((wanted.square() + diagonal[:, None] * diagonal) / count).sqrt()
    z = (steps.T @ steps / count - wanted).abs() / error
    assert (z < 3).double().mean() > 0.98
    assert z.max() < 4.5
    assert (steps.mean(0).abs() < 4 * (diagonal / count).sqrt()).all()
    other = torch.linalg.inv(len(Y) * f + torch.eye(len(f), dtype=f.dtype))  # the test sees a factor in τ
    assert ((steps.T @ steps / count - other).abs() / error).max() > 10


def test_leaves_without_a_posterior_stay(generator):
    posterior = kf.laplace.fit(mlp, LOSS, SMALL, [(X, Y)], only=["second.*"])
    drawn = kf.laplace.sample(posterior, generator, 3)
    assert torch.equal(drawn["first"]["w"], SMALL["first"]["w"].expand(3, 2, 3))
    assert (drawn["second"]["w"] != SMALL["second"]["w"]).all()
    drawn["first"]["w"].zero_()
    assert SMALL["first"]["w"].abs().min() > 0


def test_one_seed_gives_one_draw():
    posterior = kf.laplace.fit(mlp, LOSS, SMALL, [(X, Y)])
    before = torch.get_rng_state()
    one, two = (kf.laplace.sample(posterior, torch.Generator().manual_seed(5), 2) for _ in range(2))
    assert torch.equal(one["second"]["b"], two["second"]["b"])
    assert (one["second"]["b"][0] != one["second"]["b"][1]).all()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_average_of_nets_is_a_loop_over_draws(chunk_size):
    posterior = kf.laplace.fit(mlp, LOSS, SMALL, [(X, Y)])
    found = kf.laplace.sampled_predictive(
        posterior, mlp, X, generator=torch.Generator().manual_seed(3), samples=5, chunk_size=chunk_size
    )
    drawn = oracles.flat(kf.laplace.sample(posterior, torch.Generator().manual_seed(3), 5))
    nets = [oracles.nested(SMALL, {path: leaf[k] for path, leaf in drawn.items()}) for k in range(5)]
    assert close(found, torch.stack([mlp(net, X).softmax(1) for net in nets]).mean(0))
    plain = kf.laplace.sampled_predictive(
        posterior, mlp, X, generator=torch.Generator().manual_seed(3), samples=5, link="identity"
    )
    assert close(plain, torch.stack([mlp(net, X) for net in nets]).mean(0))


def test_a_sharp_posterior_predicts_as_the_net_and_the_linearised_one_agrees(generator):
    case = CASES["mlp"]
    posterior = kf.laplace.fit(case.fn, case.loss, case.params, [case.batch], prior_precision=1e6)
    p = case.fn(case.params, case.inputs).softmax(1)
    nets = kf.laplace.sampled_predictive(posterior, case.fn, case.inputs, generator=generator)
    assert (nets - p).abs().max() < 1e-3
    found = kf.laplace.predict(posterior, case.fn, case.inputs)
    assert (kf.laplace.probabilities(found) - p).abs().max() < 1e-3
    drawn = kf.laplace.sample(posterior, generator, 4000)
    z = torch.func.vmap(case.fn, in_dims=(0, None))(drawn, case.inputs)
    spread = (z - z.mean(0)).movedim(1, 0)
    covariance = spread.mT @ spread / 4000
    assert close(covariance, found.covariance, 0.15)
