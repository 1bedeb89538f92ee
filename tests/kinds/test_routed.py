"""Data that decide: edges of a graph, experts that nobody takes, codes with ranges of their own."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from tests.kinds import truth
from tests.zoo import close, randn

CE, P = kf.losses.cross_entropy(), kf.products


def graph(p: dict, inputs: Any) -> Tensor:
    """Every node reads one other."""
    x, source = inputs
    return torch.tanh(x @ p["w"])[source] @ p["v"]


def test_the_plan_of_a_graph_is_not_that_of_another():
    """Self-loops first: no example sees another. In the tree after it they do."""
    params, x = {"w": randn(3, 4), "v": randn(4, 2, seed=1)}, randn(5, 3, seed=2)
    loops, tree, y = torch.arange(5), torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 0, 1])
    fn = kf.batched(graph, whole=True)
    step: Any = kf.value_grad_and_stats(fn, CE, estimator=kf.estimators.exact())
    step(params, ((x, loops), y), generator=truth.seeded())
    _, _, stats = step(params, ((x, tree), y), generator=truth.seeded())
    with pytest.raises(errors.StateError, match="see each other"):
        kf.observe(kf.kfac(kf.curvature.diagonal(crossed=False), damping=0.1).init(params), stats)
    norms = P.per_example_grads(fn, CE, route="loop")
    norms(params, ((x, loops), y))
    found = norms(params, ((x, tree), y))
    own = torch.func.grad(lambda p: F.cross_entropy(graph(p, (x, tree))[3:4], y[3:4]))(params)
    assert all(close(found[path][3], own[path]) for path in params)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 8), nn.ModuleList([nn.Linear(3, 2) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        share, taken = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 2)
        for e in taken.unique().tolist():
            rows = (taken == e).nonzero().squeeze(-1)
            out = out.index_add(0, rows, share[rows, None] * self.experts[e](x[rows]))
        return out


@pytest.mark.parametrize("whole", [False, True])
def test_experts_by_the_policy_that_is_named(whole):
    fn, params = kf.make_functional(Experts().double())
    step: Any = kf.value_grad_and_stats(kf.batched(fn, whole=whole), CE, unclaimed={"experts.*": "diagonal"})
    y = torch.arange(16) % 2
    for seed in range(6):
        x = 5 * randn(16, 3, seed=seed)
        _, grads, _ = step(params, (x, y), generator=truth.seeded())
        wanted = torch.func.grad(lambda p, x=x: CE.value(fn(p, x), y))(params)
        assert all(close(grads[path], wanted[path]) for path in params)


class Tabular(nn.Module):
    def __init__(self):
        super().__init__()
        self.few, self.many, self.head = nn.Embedding(3, 2), nn.Embedding(50, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.few(codes[:, 0]), self.many(codes[:, 1])], 1))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_columns_of_codes_keep_their_ranges(n):
    fn, params = kf.make_functional(Tabular().double())
    codes = torch.stack([torch.arange(n) % 3, torch.arange(n) + 40], 1)
    batch = (randn(n, 1), codes), torch.zeros(n, dtype=torch.long)
    found = P.per_example_norms(fn, CE, route="tape")(params, batch)
    assert close(found, P.per_example_norms(fn, CE, route="loop")(params, batch))


class Data:
    def __init__(self, x: Tensor):
        self.x = x


def test_batches_that_are_objects_are_let_go():
    fn = kf.batched(lambda p, data: data.x @ p["w"], whole=True)
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse())
    params, alive = {"w": randn(3, 2)}, []

    def taken(data: Data) -> None:
        alive.append(weakref.ref(data))
        step(params, (data, torch.zeros(4, 2).double()), generator=truth.seeded())

    for seed in range(40):
        taken(Data(randn(4, 3, seed=seed)))
    gc.collect()
    assert sum(one() is not None for one in alive) <= 32


def test_a_model_without_forward_derivatives_has_its_quadratic_model():
    layers = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    fn, params = kf.make_functional(layers)
    x, y = randn(4, 3), torch.tensor([0, 1, 1, 0])
    v = {path: randn(*leaf.shape, seed=k) for k, (path, leaf) in enumerate(params.items())}
    form = kf.quadratic_model(fn, CE).form(params, (x, y), [v], v)
    wanted = sum(float((leaf * v[path]).sum()) for path, leaf in P.ggn_vp(fn, CE)(params, (x, y))(v).items())
    assert close(form.curvature.squeeze(), torch.tensor(wanted, dtype=torch.float64))
