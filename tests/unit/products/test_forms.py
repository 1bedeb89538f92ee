"""Quadratic forms, distances and norms in the metric of a curvature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import kfac_func as kf
from kfac_func.precondition import natural_gradient_norm
from tests import oracles
from tests.unit.products.test_curvature import flat, total, unflat
from tests.zoo import CASES, close, curvature_of, functional, randn, run

NAMES = ["mlp", "mean_square", "bernoulli", "conv", "attention", "tied"]
names = pytest.mark.parametrize("name", NAMES)


def some(name: str, count: int = 3) -> tuple[list, Tensor]:
    """Trees, and the same as rows."""
    rows = randn(count, total(CASES[name]), seed=6)
    return [unflat(CASES[name], row) for row in rows], rows


def whole(name: str) -> Tensor:
    return curvature_of(name).whole(sorted(oracles.flat(CASES[name].params)))


@names
def test_gram_matrices_in_the_metric_of_the_fisher(name):
    case, (trees, rows) = CASES[name], some(name)
    wanted = rows @ whole(name) @ rows.T
    cheap = kf.products.fisher_forms(case.fn, case.loss)(case.params, case.batch)(trees)
    product = kf.products.ggn_vp(case.fn, case.loss)(case.params, case.batch)
    assert torch.equal(cheap, cheap.T)
    assert close(cheap, wanted)
    assert close(kf.products.quadratic_forms(product, trees), wanted)
    assert close(kf.products.quadratic_form(product, trees[1]), wanted[1, 1])


def test_forms_of_other_estimators(generator):
    case, (trees, rows) = CASES["mlp"], some("mlp", 2)
    noise = torch.rand(2, len(case.targets), generator=generator, dtype=torch.float64)
    for estimator, given in ((kf.estimators.empirical(), None), (kf.estimators.monte_carlo(2), noise)):
        forms = kf.products.fisher_forms(case.fn, case.loss, estimator)(case.params, case.batch, noise=given)
        product = kf.products.fisher_vp(case.fn, case.loss, estimator)(case.params, case.batch, noise=given)
        moved = torch.stack([flat(product(v)) for v in trees])
        assert close(forms(trees), rows @ moved.T)


def test_missing_leaves_count_as_zeros():
    product = lambda v: {"a": 2 * v["a"], "b": 3 * v["a"]}  # noqa: E731
    u, v = {"a": torch.ones(2), "b": None}, {"a": torch.ones(2), "b": torch.ones(2)}
    assert kf.products.quadratic_forms(product, [u, v]).tolist() == [[4, 4], [10, 10]]


def kl_of_classes(z: Tensor, moved: Tensor, reduction: str) -> Tensor:
    p, q = F.log_softmax(z, 1), F.log_softmax(moved, 1)
    each = (p.exp() * (p - q)).sum(1)
    return each.sum() if reduction == "sum" else each.mean()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_quadratic_part_of_the_divergence(reduction):
    """The error falls with the third power of the step."""
    case = CASES["mlp"]
    v = unflat(case, randn(total(case), seed=3))
    distance = kf.products.kl_quadratic(case.fn, kf.losses.cross_entropy(reduction=reduction))(case.params, case.batch)
    z, errors = case.fn(case.params, case.inputs), []
    for size in (2e-3, 1e-3):
        step = unflat(case, size * flat(v))
        true = kl_of_classes(z, case.fn(unflat(case, flat(case.params) + flat(step)), case.inputs), reduction)
        errors.append(float((distance(step) - true).abs()))
        assert errors[-1] < 0.05 * float(true)
    assert 7 < errors[0] / errors[1] < 9


def test_the_divergence_of_a_gaussian_is_exact_for_a_linear_model():
    fn, params = functional(nn.Linear(3, 2))
    x, v = randn(5, 3), {k: randn(*p.shape, seed=8) for k, p in params.items()}
    for scale, reduction in ((0.5, "batchmean"), (2.0, "sum")):
        loss = kf.losses.mse(scale=scale, reduction=reduction)
        got = kf.products.kl_quadratic(fn, loss)(params, (x, torch.zeros(5, 2, dtype=torch.float64)))(v)
        moved = (fn(v, x)).square().sum() * scale
        assert close(got, moved if reduction == "sum" else moved / 5)


@names
def test_the_fisher_rao_norm(name):
    case = CASES[name]
    theta = flat(case.params)
    norm = kf.products.fisher_rao_norm(case.fn, case.loss)(case.params, case.batch)
    assert close(norm, (theta @ whole(name) @ theta).sqrt())


def test_the_fisher_rao_norm_of_zero_has_a_derivative():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    norm = kf.products.fisher_rao_norm(fn, kf.losses.mse())
    zero = grad(lambda p: norm(p, (randn(4, 3), randn(4, 2))))({"w": torch.zeros(3, 2, dtype=torch.float64)})
    assert torch.equal(zero["w"], torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("split", ["exact", "none"])
def test_the_natural_gradient_norm(split):
    case, damping = CASES["mlp"], 0.1
    _, grads, stats = run(case)
    state = kf.observe(kf.kfac(damping=damping, split=split).init(case.params), stats)
    wanted = torch.zeros((), dtype=torch.float64)
    for name, spec in case.blocks.items():
        m = state.curvature.matrix[name]
        matrix = oracles.damped(m.a, m.g, 1.0, damping, split)
        g = oracles.laid_out(spec, oracles.flat(grads), 0)
        wanted = wanted + g @ torch.linalg.solve(matrix, g)
    assert close(natural_gradient_norm(state, grads), wanted.sqrt())


def test_natural_gradient_norms_of_many_gradients():
    case = CASES["mlp"]
    _, grads, stats = run(case)
    state = kf.observe(kf.kfac().init(case.params), stats)
    once = natural_gradient_norm(state, grads)
    scaled = vmap(lambda c: natural_gradient_norm(state, unflat(case, c * flat(grads))))(torch.tensor([1.0, -2.0, 0.0]))
    assert close(scaled, once * torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
