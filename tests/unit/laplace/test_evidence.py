"""The marginal likelihood against dense matrices and closed forms; its maximum; gradients and vmap."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from tests import oracles
from tests.zoo.cases import CASES, functional, randn
from tests.zoo.run import close

GAUSSIAN = kf.losses.mse("batchmean", scale=0.5)
EXACT = kf.curvature.blockwise(kf.curvature.block_diagonal(), kf.curvature.block_diagonal())
evidence = kf.laplace.log_marginal_likelihood


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def dense_evidence(name: str, tau: float) -> Tensor:
    """By the formula, with a true Gauss-Newton block per layer."""
    case = CASES[name]
    found = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    n = len(case.targets)
    total = -n * case.value(case.fn(case.params, case.inputs), case.targets)
    for spec in case.blocks.values():
        f, theta = found.block(spec), oracles.laid_out(spec, oracles.flat(case.params), 0)
        p = n * f + tau * torch.eye(len(f), dtype=f.dtype)
        total = total - 0.5 * tau * theta @ theta + 0.5 * len(f) * math.log(tau) - 0.5 * torch.logdet(p)
    return total


@pytest.mark.parametrize("name", ["mlp", "conv", "tokens", "recurrent"])
def test_evidence_is_the_dense_formula(name):
    case = CASES[name]
    posterior = kf.laplace.fit(case.fn, case.loss, case.params, [case.batch], curvature=EXACT)
    for tau in (0.03, 1.0, 40.0):
        assert abs(evidence(posterior, tau) - dense_evidence(name, tau)) < 1e-8
    assert torch.equal(evidence(posterior), evidence(posterior, 1.0))
    own = kf.laplace.with_prior(posterior, 40.0)
    assert torch.equal(evidence(own), evidence(posterior, 40.0))


@pytest.mark.parametrize("curvature", ["eigen", "kronecker"])
def test_gradient_in_the_prior_precision(curvature):
    case = CASES["conv"]
    posterior = kf.laplace.fit(
        case.fn, case.loss, case.params, [case.batch], curvature=getattr(kf.curvature, curvature)()
    )
    rules = {"head.*": scalar(0.4), "**": scalar(2.0)}
    found = torch.func.grad(lambda r: evidence(posterior, r))(rules)
    for pattern in rules:

        def moved(by: float, pattern: str = pattern) -> Tensor:
            return evidence(posterior, rules | {pattern: rules[pattern] + by})

        step = 1e-4
        wanted = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
        assert abs(found[pattern] - wanted) < 1e-8 * max(1.0, abs(wanted))
    taus = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    many = torch.func.vmap(lambda tau: evidence(posterior, tau))(taus)
    assert close(many, torch.stack([evidence(posterior, tau) for tau in taus]))


@pytest.mark.parametrize("by_block", [False, True])
def test_tuning_finds_the_maximum(by_block):
    case = CASES["mlp"]
    posterior = kf.laplace.fit(case.fn, case.loss, case.params, [case.batch])
    tuned = kf.laplace.tune_prior_precision(posterior, by_block=by_block)
    best = tuned.prior_precision
    assert (len({tau.item() for tau in best.values()}) == 1) is not by_block
    if by_block:
        slope = torch.func.grad(lambda r: evidence(posterior, r))(best)
        assert max(abs(value) for value in slope.values()) < 1e-8
    else:
        assert abs(torch.func.grad(lambda tau: evidence(posterior, tau))(best["first.w"])) < 1e-8
    for factor in (1e-4, 0.1, 0.9, 1.1, 10.0, 1e4):
        for name in best if by_block else [None]:
            other = {n: tau * (factor if name in (n, None) else 1) for n, tau in best.items()}
            assert evidence(posterior, other) < evidence(tuned)


def test_a_maximum_outside_ends_at_the_bounds():
    fn, params = functional(torch.nn.Linear(3, 2))
    zero = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    batch = randn(5, 3), randn(5, 2, seed=1)
    posterior = kf.laplace.fit(fn, GAUSSIAN, zero, [batch])
    found = kf.laplace.tune_prior_precision(posterior, bounds=(1e-2, 1e3))
    assert abs(found.prior_precision["weight"] - 1e3) < 1e-9


# ------------------------------------------------------------------ Bayesian linear regression, in closed form

X, Y = randn(12, 4, seed=1), randn(12, 3, seed=2)
ONES = torch.cat([X, torch.ones(12, 1).double()], dim=1)
SIGMA2, TAU = 0.3, 1.7
LINEAR, _ = kf.make_functional(torch.nn.Linear(4, 3).double())
S = torch.linalg.inv(ONES.T @ ONES / SIGMA2 + TAU * torch.eye(5, dtype=torch.float64))
MAP = S @ ONES.T @ Y / SIGMA2
THETA = {"weight": MAP[:4].T.contiguous(), "bias": MAP[4]}
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]


def regression(curvature: str = "kronecker", batches: Any = BATCHES) -> kf.laplace.Posterior:
    structure = getattr(kf.curvature, curvature)()
    return kf.laplace.fit(LINEAR, GAUSSIAN, THETA, batches, curvature=structure, prior_precision=TAU, noise=SIGMA2)


def marginal(tau: Tensor, noise: Tensor) -> Tensor:
    """log p(Y) of three independent regressions: y ~ N(0, σ² I + X̄ X̄ᵀ/τ)."""
    covariance = noise * torch.eye(12, dtype=torch.float64) + ONES @ ONES.T / tau
    return torch.distributions.MultivariateNormal(torch.zeros(12).double(), covariance).log_prob(Y.T).sum()


@pytest.mark.parametrize("curvature", ["kronecker", "eigen", "block_diagonal"])
def test_linear_regression_is_exact(curvature):
    # block_diagonal looks at its newest batch only
    posterior = regression(curvature, [(X, Y)] if curvature == "block_diagonal" else BATCHES)
    assert abs(evidence(posterior) - marginal(scalar(TAU), scalar(SIGMA2))) < 1e-9
    new = randn(6, 4, seed=5)
    found = kf.laplace.predict(posterior, LINEAR, new)
    x = torch.cat([new, torch.ones(6, 1).double()], dim=1)
    assert close(found.mean, x @ MAP)
    variance = torch.einsum("ni,ij,nj->n", x, S, x)
    eye = torch.eye(3, dtype=torch.float64)
    assert close(found.covariance, variance[:, None, None] * eye)
    seen = kf.laplace.observed(found, SIGMA2)
    assert close(seen.covariance, (variance[:, None, None] + SIGMA2) * eye)


def test_the_noise_has_a_gradient():
    posterior = regression()
    found = torch.func.grad(lambda s: evidence(posterior, noise=s))(scalar(SIGMA2))
    step = 1e-4

    def moved(by: float) -> Tensor:
        return evidence(posterior, noise=SIGMA2 + by)

    wanted = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
    assert abs(found - wanted) < 1e-7 * abs(wanted)
    # θ* is the maximum of the exponent at this τ and σ², so the total derivatives of the exact evidence agree
    exact = torch.func.grad(marginal, argnums=(0, 1))(scalar(TAU), scalar(SIGMA2))
    assert close(found, exact[1], 1e-9)
    assert close(torch.func.grad(lambda t: evidence(posterior, t))(scalar(TAU)), exact[0], 1e-9)


def test_tuning_with_noise_is_the_maximum_too():
    tuned = kf.laplace.tune_prior_precision(regression())
    slope = torch.func.grad(lambda t: evidence(tuned, t))(tuned.prior_precision["weight"])
    assert abs(slope) < 1e-8


def test_a_scaled_square_is_the_same_likelihood_without_its_constant():
    loss = kf.losses.mse("batchmean", scale=0.5 / SIGMA2)
    posterior = kf.laplace.fit(LINEAR, loss, THETA, BATCHES, prior_precision=TAU)
    constant = 0.5 * Y.numel() * math.log(2 * math.pi * SIGMA2)
    assert abs(evidence(posterior) - constant - evidence(regression())) < 1e-9


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_every_reduction_is_the_same_posterior(reduction):
    case = CASES["mlp"]
    loss = kf.losses.cross_entropy(reduction=reduction)
    posterior = kf.laplace.fit(case.fn, loss, case.params, [case.batch], curvature=EXACT)
    assert abs(evidence(posterior, 0.5) - dense_evidence("mlp", 0.5)) < 1e-8


def test_a_posterior_is_tensors_in_a_file():
    posterior = regression("eigen")
    file = io.BytesIO()
    torch.save(posterior, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert torch.equal(evidence(again), evidence(posterior))
    assert torch.equal(
        kf.laplace.predict(again, LINEAR, X).covariance, kf.laplace.predict(posterior, LINEAR, X).covariance
    )


def test_progress_wraps_every_pass():
    seen: list[int] = []

    def counted(batches):
        for batch in batches:
            seen.append(len(batch[1]))
            yield batch

    kf.laplace.fit(LINEAR, GAUSSIAN, THETA, BATCHES, progress=counted)
    assert seen == [5, 7] * 3
    seen.clear()
    kf.laplace.fit(LINEAR, GAUSSIAN, THETA, BATCHES, progress=counted, curvature=kf.curvature.kronecker())
    assert seen == [5, 7] * 2


def test_a_batch_without_examples_is_refused():
    fn, params = kf.make_functional(torch.nn.Linear(3, 2))
    with pytest.raises(kf.errors.BatchError, match="the batch is empty"):
        kf.laplace.fit(fn, kf.losses.cross_entropy(), params, [(torch.ones(0, 3), torch.ones(0, dtype=torch.long))])
