"""Layers that are frozen, adapters beside them, biases alone: what is frozen is no parameter, the rest is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from tests.kinds import truth
from tests.oracles import Spec
from tests.zoo import close, randn

N = 6
X, Y = randn(N, 4, seed=1), torch.tensor([0, 2, 1, 1, 0, 2])
IMAGES, IDS = randn(N, 2, 5, 5, seed=2), torch.arange(24).mul(5).remainder(7).reshape(N, 4)
LOSS = kf.losses.cross_entropy()


class Adapted(nn.Module):
    """A frozen layer and a low-rank adapter that trains (LoRA)."""

    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * self.up(self.down(x))


class Unfrozen(nn.Module):
    """A weight that is frozen and also reused as the head; tokens are frozen too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.tokens.weight
        self.tokens.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.tokens(ids)).tanh().mean(1))


def biases_alone(module: nn.Module) -> nn.Module:
    """Only biases train (BitFit)."""
    for path, leaf in module.named_parameters():
        leaf.requires_grad_(path.endswith("bias"))
    return module


def backbone() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    net[:2].requires_grad_(False)
    return net


def convolutions() -> nn.Module:
    return biases_alone(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 3))
    )


MODULES: dict[str, tuple[Any, Any, set[str]]] = {
    "backbone": (backbone, X, {"3.weight", "3.bias"}),
    "adapters": (
        lambda: nn.Sequential(Adapted(nn.Linear(4, 5)), nn.Tanh(), Adapted(nn.Linear(5, 3))), X,
        {"0.down.weight", "0.up.weight", "2.down.weight", "2.up.weight"},
    ),
    "biases": (
        lambda: biases_alone(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))), X,
        {"0.bias", "1.bias", "3.bias"},
    ),
    "biases of convolutions": (convolutions, IMAGES, {"0.bias", "2.bias", "4.bias"}),
    "tied to what is frozen": (Unfrozen, IDS, {"body.weight", "body.bias", "head.bias"}),
}  # fmt: skip
each = pytest.mark.parametrize("name", MODULES)


def made(name: str) -> tuple[nn.Module, Any, dict[str, Tensor], Any]:
    torch.manual_seed(3)
    build, inputs, _ = MODULES[name]
    module = build().double()
    return module, *kf.make_functional(module), inputs


@each
def test_what_is_frozen_is_no_parameter(name):
    module, fn, params, inputs = made(name)
    trained = MODULES[name][2]
    assert set(params) == trained
    assert set(fn.frozen) == {path for path, _ in module.named_parameters()} - trained
    assert close(fn(params, inputs), module(inputs).detach())
    found = torch.autograd.grad(F.cross_entropy(module(inputs), Y), [module.get_parameter(path) for path in params])
    wanted = dict(zip(params, found, strict=True))
    for estimator in (kf.estimators.exact(), kf.estimators.monte_carlo(), kf.estimators.forward_only()):
        step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=estimator)
        truth.same(step(params, (inputs, Y), generator=truth.seeded())[1], wanted)


@each
def test_the_curvature_is_that_of_what_trains(name, monkeypatch):
    _, fn, params, inputs = made(name)
    layouts = truth.check(monkeypatch, fn, LOSS, params, (inputs, Y))
    assert {path for layout in layouts.values() for path in layout.leaves} == set(params)


@each
def test_steps_move_what_trains_and_nothing_else(name):
    module, fn, params, inputs = made(name)
    kept = {path: leaf.clone() for path, leaf in fn.frozen.items()}
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    tx = kf.chain(kf.add_decayed_weights(1e-3), kf.ekfac(damping=0.1), kf.sgd(0.1, momentum=0.9))
    state, new = tx.init(params), params
    for _ in range(3):
        _, grads, stats = step(new, (inputs, Y))
        updates, state = tx.update(grads, state, new, stats=stats)
        new = kf.apply_updates(new, updates)
    assert all(not torch.equal(new[path], params[path]) for path in params)
    truth.same(fn.frozen, kept, 0)
    with torch.no_grad():
        for path, leaf in new.items():
            module.get_parameter(path).copy_(leaf)
    assert close(fn(new, inputs), module(inputs).detach())


@each
def test_examples_have_their_gradients(name):
    _, fn, params, inputs = made(name)
    j = truth.jacobian(fn, params, inputs)
    score = fn(params, inputs).softmax(1) - F.one_hot(Y, fn(params, inputs).shape[1])
    wanted = {path: torch.einsum("nd,nd...->n...", score, leaf) for path, leaf in j.items()}
    truth.same(kf.products.per_example_grads(fn, LOSS, route="tape")(params, (inputs, Y)), wanted)
    rows = torch.cat([leaf.flatten(2) for leaf in j.values()], 2)
    kernel = kf.products.empirical_ntk(fn, route="tape")(params, inputs)
    assert close(kernel, torch.einsum("ndp,mep->nmde", rows, rows))


def test_the_block_of_a_bias_of_a_layer_is_exact():
    """Whose input is the constant 1, so one Kronecker product is all there is."""
    w, v = randn(5, 4, seed=5), randn(3, 5, seed=6)
    params = {"b": randn(5, seed=8), "c": randn(3, seed=7)}

    def fn(p: dict, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, w, p["b"])), v, p["c"])

    state = kf.fit_curvature(fn, LOSS, params, [(X[:4], Y[:4]), (X[4:], Y[4:])])
    dense = truth.curvature(fn, LOSS.value, params, X, Y)
    wanted = torch.block_diag(*(dense.block(Spec(None, path)) for path in "bc"))
    assert close(kf.linear_operator(state, params, damping=0.0).to_dense(), wanted)
    grads = truth.gradient(fn, LOSS.value, params, X, Y)
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    _, found, stats = step(params, (X, Y))
    tx = kf.kfac(damping=0.1, split="exact")
    updates = tx.update(found, tx.init(params), params, stats=stats)[0]
    for path in params:
        block = dense.block(Spec(None, path)) + 0.1 * torch.eye(len(params[path])).double()
        assert close(updates[path], torch.linalg.solve(block, grads[path]))
