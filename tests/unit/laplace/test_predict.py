"""The linearised predictive against Jacobians and dense matrices."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from tests import oracles
from tests.zoo.cases import CASES, Case, functional, randn
from tests.zoo.run import close

GAUSSIAN = kf.losses.mse("batchmean", scale=0.5)
EXACT = kf.curvature.blockwise(kf.curvature.block_diagonal(), kf.curvature.block_diagonal())
TAU = 0.7


def half_square(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (z - t).square().sum() / len(z)


def regression(name: str) -> Case:
    """The model of a case with the loss ½‖z − y‖²."""
    case = CASES[name]
    z = case.fn(case.params, case.inputs)
    return case._replace(loss=GAUSSIAN, value=half_square, targets=z + randn(*z.shape, seed=3))


def fitted(case: Case, **options: Any) -> kf.laplace.Posterior:
    """On two batches of different sizes; `EXACT` looks at its newest batch only, so it gets all examples in one."""
    count = len(case.targets)
    ends = [(0, count)] if options.get("curvature") is EXACT else [(0, count // 2), (count // 2, count)]
    parts = [(oracles.rows(case.inputs, a, b), case.targets[a:b]) for a, b in ends]
    return kf.laplace.fit(case.fn, case.loss, case.params, parts, prior_precision=TAU, **options)


@cache
def jacobian(name: str) -> Tensor:
    """[N, D, P], leaves in tree order."""
    case = CASES[name]
    found = oracles.jacobians(case.fn, case.params, case.inputs, len(case.targets))
    return torch.cat([found[path].flatten(2) for path in sorted(found, key=lambda path: path.split("."))], dim=-1)


def exact_covariance(case: Case, tau: float = TAU, scale: float = 1.0) -> Tensor:
    """Σ_blocks J_b (N F_b scale + τ I)⁻¹ J_bᵀ of every example, F_b a block of the true Gauss-Newton matrix."""
    found = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    total: Any = 0
    for spec in case.blocks.values():
        j, f = oracles.laid_out(spec, found.jacobian, 2), found.block(spec)
        inverse = torch.linalg.inv(len(case.targets) * scale * f + tau * torch.eye(len(f), dtype=f.dtype))
        total = total + j @ inverse @ j.mT
    return total


@pytest.mark.parametrize("name", list(CASES))
def test_the_exact_blocks_give_the_covariance_of_the_gauss_newton_posterior(name):
    case = regression(name)
    posterior = fitted(case, curvature=EXACT)
    found = kf.laplace.predict(posterior, case.fn, case.inputs)
    z, wanted = case.fn(case.params, case.inputs), exact_covariance(case)
    assert torch.equal(found.mean, z)
    assert close(found.covariance, wanted)
    variance = kf.laplace.functional_variance(posterior, case.fn, case.inputs)
    assert close(variance, wanted.diagonal(dim1=1, dim2=2).reshape(z.shape))


@pytest.mark.parametrize("structure", ["kronecker", "eigen"])
def test_the_factors_are_exact_on_a_deep_linear_net(structure):
    case = regression("deep_linear")
    posterior = fitted(case, curvature=getattr(kf.curvature, structure)())
    assert close(kf.laplace.predict(posterior, case.fn, case.inputs).covariance, exact_covariance(case))


@pytest.mark.parametrize(("route", "chunk_size"), [("tape", None), ("tape", 4), ("vmap", 3)])
@pytest.mark.parametrize("structure", ["eigen", "kronecker", "diagonal"])
@pytest.mark.parametrize("name", ["mlp", "conv", "grouped", "tokens", "attention", "tied"])
def test_every_structure_and_route_is_its_own_dense_matrix(name, structure, chunk_size, route):
    case = CASES[name] if name in ("mlp", "conv", "tokens") else regression(name)
    curvature = getattr(kf.curvature, structure)()
    posterior = fitted(case, curvature=curvature)
    parts = [(case.inputs, case.targets)]
    state = kf.fit_curvature(case.fn, case.loss, case.params, parts, curvature=curvature)
    f = kf.linear_operator(state, case.params, damping=0.0).to_dense()
    p = len(case.targets) * f + TAU * torch.eye(len(f), dtype=f.dtype)
    j = jacobian(name)
    found = kf.laplace.predict(posterior, case.fn, case.inputs, route=route, chunk_size=chunk_size)
    assert close(found.covariance, j @ torch.linalg.solve(p, j.mT))
    variance = kf.laplace.functional_variance(posterior, case.fn, case.inputs, route=route, chunk_size=chunk_size)
    assert close(variance.flatten(1), found.covariance.diagonal(dim1=1, dim2=2))


def test_the_last_layer_is_a_posterior_over_that_block_alone():
    case = CASES["mlp"]
    posterior = fitted(case, only=["second.*"], curvature=EXACT)
    assert list(posterior.spectra) == ["second.w"]
    found = kf.laplace.predict(posterior, case.fn, case.inputs)
    assert close(found.covariance, exact_covariance(case._replace(blocks={"second.w": case.blocks["second.w"]})))
    lone = fitted(case, only=["second.w"], curvature=EXACT)
    weight = case.blocks["second.w"]._replace(bias=None)
    found = kf.laplace.predict(lone, case.fn, case.inputs)
    assert close(found.covariance, exact_covariance(case._replace(blocks={"second.w": weight})))


def test_noise_divides_the_curvature():
    case = regression("mlp")
    posterior = fitted(case, curvature=EXACT, noise=0.2)
    found = kf.laplace.predict(posterior, case.fn, case.inputs)
    assert close(found.covariance, exact_covariance(case, scale=5.0))
    seen = kf.laplace.observed(found, 0.2)
    assert torch.equal(seen.mean, found.mean)
    assert close(seen.covariance, found.covariance + 0.2 * torch.eye(3, dtype=torch.float64))


def test_prior_precisions_in_a_vmap_and_a_gradient():
    case = CASES["conv"]
    posterior = fitted(case)

    def variance(tau: Tensor) -> Tensor:
        return kf.laplace.predict(posterior, case.fn, case.inputs, prior_precision=tau).covariance

    taus = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    many = torch.func.vmap(variance)(taus)
    for tau, one in zip(taus, many, strict=True):
        assert close(one, variance(tau))
    assert (many[0] - many[2]).diagonal(dim1=1, dim2=2).min() > 0
    slope = torch.func.grad(lambda tau: variance(tau).sum())(taus[1])
    wanted = (variance(taus[1] + 1e-5).sum() - variance(taus[1] - 1e-5).sum()) / 2e-5
    assert abs(slope - wanted) < 1e-6 * abs(wanted)


def test_prior_precisions_by_pattern_reach_their_blocks():
    case = CASES["mlp"]
    rules = {"second.*": 5.0, "**": 0.3}
    posterior = kf.laplace.with_prior(fitted(case, curvature=EXACT), rules)
    assert {name: tau.item() for name, tau in posterior.prior_precision.items()} == {"first.w": 0.3, "second.w": 5.0}
    parts = [
        exact_covariance(case._replace(blocks={name: case.blocks[name]}), tau)
        for name, tau in (("first.w", 0.3), ("second.w", 5.0))
    ]
    found = kf.laplace.predict(posterior, case.fn, case.inputs)
    assert close(found.covariance, parts[0] + parts[1])
    again = kf.laplace.with_prior(posterior, posterior.prior_precision)
    assert again.prior_precision == posterior.prior_precision


def scaled(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The gate is used where no layer kind can see it."""
    return torch.tanh(F.linear(x, p["w"], p["b"]) * p["gate"].exp())


def test_what_the_tape_refuses_goes_by_the_other_route():
    params = {"w": randn(3, 4), "b": randn(3, seed=1), "gate": randn(3, seed=2), "unread": randn(2, seed=5)}
    x, y = randn(6, 4, seed=3), randn(6, 3, seed=4)
    posterior = kf.laplace.fit(
        scaled, GAUSSIAN, params, [(x, y)], unclaimed={"gate": "diagonal"}, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(kf.errors.CaptureError, match="gate"):
        kf.laplace.predict(posterior, scaled, x, route="tape")
    found = kf.laplace.predict(posterior, scaled, x, route="vmap")
    every = torch.func.jacrev(scaled)(params, x)
    j = torch.cat([every[path].flatten(2) for path in ("b", "gate", "unread", "w")], dim=-1)
    p = kf.laplace.precision(posterior).to_dense()
    assert torch.equal(p[6:8, 6:8], torch.eye(2).double())  # the prior of what is never read
    assert close(found.covariance, j @ torch.linalg.solve(p, j.mT))


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(-1)


def test_outputs_without_a_dimension():
    fn, params = functional(Scores())
    x = randn(5, 4)
    posterior = kf.laplace.fit(fn, kf.losses.bce_with_logits(), params, [(x, torch.ones(5).double())])
    found = kf.laplace.predict(posterior, fn, x)
    assert found.mean.shape == (5,)
    assert found.covariance.shape == (5, 1, 1)
    p = kf.laplace.probabilities(found, link="sigmoid")
    wanted = torch.sigmoid(found.mean / (1 + torch.pi * found.covariance.flatten() / 8).sqrt())
    assert close(p, wanted)


MEAN, ROOT = randn(4, 3), 0.8 * randn(4, 3, 3, seed=1)
GAUSS = kf.laplace.Prediction(MEAN, ROOT @ ROOT.mT)


@pytest.mark.parametrize("link", ["softmax", "sigmoid", "identity"])
def test_sampled_probabilities_are_an_average_over_the_gaussian(link, generator):
    count = 40_000
    found = kf.laplace.probabilities(GAUSS, "sampled", link=link, samples=count, generator=generator)
    noise = torch.randn(count, 4, 3, dtype=torch.float64, generator=generator)
    z = MEAN + torch.einsum("nvw,knw->knv", ROOT, noise)  # another root of the covariance, other numbers
    each = {"softmax": z.softmax(-1), "sigmoid": z.sigmoid(), "identity": z}[link]
    error = each.std(0) * (2 / count) ** 0.5
    assert ((found - each.mean(0)).abs() < 3.5 * error).all()


def test_probit_is_mackays_formula_and_close_for_a_small_variance(generator):
    small = kf.laplace.Prediction(MEAN, 0.01 * GAUSS.covariance)
    variance = small.covariance.diagonal(dim1=1, dim2=2)
    probit = kf.laplace.probabilities(small)
    assert close(probit, (MEAN / (1 + torch.pi / 8 * variance).sqrt()).softmax(1))
    drawn = kf.laplace.probabilities(small, "sampled", samples=20_000, generator=generator)
    assert (probit - drawn).abs().max() < 0.01
    wide = kf.laplace.Prediction(MEAN, 4 * GAUSS.covariance)
    many = kf.laplace.probabilities(wide, link="sigmoid")
    exact = kf.laplace.probabilities(wide, "sampled", link="sigmoid", samples=40_000, generator=generator)
    assert (many - exact).abs().max() < 0.02
    assert (MEAN.sigmoid() - exact).abs().max() > 0.05


@pytest.mark.parametrize("method", ["probit", "sampled"])
def test_classes_in_another_dimension(method):
    """Positions [N, T, C] with class_dim −1 or 2, and [N, C, T] with class_dim 1."""
    mean, root = randn(3, 2, 4), randn(3, 8, 8, seed=2)
    cov = root @ root.mT
    last = kf.laplace.Prediction(mean, cov)

    def run(prediction: kf.laplace.Prediction, class_dim: int) -> Tensor:
        g = torch.Generator().manual_seed(1)
        return kf.laplace.probabilities(prediction, method, class_dim=class_dim, samples=5, generator=g)

    found = run(last, -1)
    assert close(found.sum(-1), torch.ones(3, 2).double())
    assert torch.equal(found, run(last, 2))
    assert close(run(last, 1).sum(1), torch.ones(3, 4).double())
