"""The workbench on a GPU: the numbers of the CPU, with generators of either device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfac_func as kf
from kfac_func import _tree

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LOSS = kf.losses.cross_entropy()


def problem(device: torch.device | str) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()
    fn, params = kf.make_functional(module)
    x, y = torch.randn(12, 2, 4, 4).double(), torch.arange(12) % 3
    return fn, _tree.tree_map(lambda leaf: leaf.to(device), params), (x.to(device), y.to(device))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def fitted(fn: Any, params: Any, batch: Any) -> Any:
    return kf.fit_curvature(fn, LOSS, params, [batch])


def posterior(fn: Any, params: Any, batch: Any) -> Any:
    return kf.laplace.tune_prior_precision(kf.laplace.fit(fn, LOSS, params, [batch]))


P, S, DRAWN = kf.products, kf.spectra, kf.estimators.monte_carlo()
QUESTIONS: dict[str, Callable[..., Any]] = {
    "gradients": lambda fn, p, b: P.per_example_grads(fn, LOSS)(p, b),
    "norms": lambda fn, p, b: P.per_example_norms(fn, LOSS)(p, b),
    "norms by vmap": lambda fn, p, b: P.per_example_norms(fn, LOSS, route="vmap", chunk_size=5)(p, b),
    "gram": lambda fn, p, b: P.per_example_gram(fn, LOSS)(p, b),
    "kernel": lambda fn, p, b: P.empirical_ntk(fn)(p, b[0]),
    "diagonal": lambda fn, p, b: P.fisher_diagonal(fn, LOSS)(p, b),
    "hvp": lambda fn, p, b: P.hvp(fn, LOSS)(p, b)(p),
    "ggn": lambda fn, p, b: P.ggn_vp(fn, LOSS)(p, b)(p),
    "sampled": lambda fn, p, b: P.fisher_vp(fn, LOSS, DRAWN)(p, b, generator=seeded())(p),
    "top": lambda fn, p, b: S.top_eigenpairs(P.ggn_vp(fn, LOSS)(p, b), p, 3, generator=seeded()).values,
    "trace": lambda fn, p, b: S.trace(P.ggn_vp(fn, LOSS)(p, b), p, generator=seeded()),
    "solve": lambda fn, p, b: kf.linear_operator(fitted(fn, p, b), p, damping=0.1).solve(p),
    "logdet": lambda fn, p, b: kf.linear_operator(fitted(fn, p, b), p, damping=0.1).logdet(),
    "self-influence": lambda fn, p, b: kf.influence.self_influence(fn, LOSS, p, fitted(fn, p, b), [b], damping=0.1),
    "scores": lambda fn, p, b: kf.influence.scores(fn, LOSS, p, fitted(fn, p, b), [b], [b], damping=0.1),
    "evidence": lambda fn, p, b: kf.laplace.log_marginal_likelihood(posterior(fn, p, b)),
    "predictive": lambda fn, p, b: kf.laplace.predict(posterior(fn, p, b), fn, b[0]),
    "dense": lambda fn, p, b: kf.testing.dense_ggn(fn, LOSS, p, b),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answers_are_those_of_the_cpu(question: str):
    here, there = (QUESTIONS[question](*problem(device)) for device in (DEVICE, "cpu"))
    for one, other in zip(_tree.leaves(here), _tree.leaves(there), strict=True):
        assert one.device.type == DEVICE.type
        torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-9)


def test_draws_of_a_generator_on_the_device():
    fn, params, batch = problem(DEVICE)
    operator = kf.linear_operator(fitted(fn, params, batch), params, damping=0.1)
    for device in (DEVICE, "cpu"):
        draw = operator.sample(torch.Generator(device).manual_seed(0))
        assert all(leaf.device.type == DEVICE.type for leaf in _tree.leaves(draw))
