"""Parameters that are used where a tape cannot see: named in an error, and right under the policies that it offers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

import kfac_func as kf
from kfac_func._errors import KFacWarning, PlanMismatchError, UncapturedParameterError
from tests.kinds import truth
from tests.zoo import close, randn

N = 4
X, LINE, PLANE = randn(N, 3, seed=1), randn(N, 1, seed=2), randn(N, 2, seed=3)
MSE = kf.losses.mse("batchmean", scale=0.5)
W, U, B, V = randn(5, 3, seed=4), randn(3, 3, seed=5), randn(5, seed=6), randn(2, 5, seed=7)


class Hidden(NamedTuple):
    """A model, its parameters, and those that only autograd can see."""

    fn: Callable[[Any, Any], Tensor]
    params: dict[str, Tensor]
    unseen: set[str]
    inputs: Any = X

    @property
    def batch(self) -> tuple[Any, Tensor]:
        return self.inputs, randn(*self.fn(self.params, self.inputs).shape, seed=8)


# ------------------------------------------------------------------------------------------ scripted code


@torch.jit.script
def scripted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x.matmul(w.t()) + b)


@torch.jit.script
def gained(x: Tensor, gain: Tensor) -> Tensor:
    return x.sin() * gain


class Scripted(nn.Module):
    """A net with a part that is scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.jit.script(nn.Linear(3, 5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def seen_and_scripted(p: dict, x: Tensor) -> Tensor:
    return F.linear(x, p["u"]).tanh() * gained(x, p["u"][0])


# ------------------------------------------------------------------------------- functions with own derivatives


class Scaled(torch.autograd.Function):
    """(x wᵀ)/2 with the backward pass written out."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x.mm(w.t()) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0].mm(w) / 2, grads[0].t().mm(x) / 2


# ------------------------------------------------------------------------------------- transforms in the model


def twins() -> Hidden:
    """Two heads of one net, mapped over their stacked parameters, on a trunk that is seen."""
    heads = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(2)]
    stacked = {path: leaf.detach() for path, leaf in stack_module_state(heads)[0].items()}

    def fn(p: dict, x: Tensor) -> Tensor:
        own, h = {path: p[path] for path in stacked}, F.linear(x, p["trunk"]).tanh()
        return vmap(lambda q: functional_call(heads[0], q, (h,)))(own).movedim(0, 1).flatten(1)

    return Hidden(fn, stacked | {"trunk": U}, set(stacked))


def ensemble(p: dict, x: Tensor) -> Tensor:
    return vmap(lambda w, v: F.linear(F.linear(x, w).tanh(), v))(p["w"], p["v"]).mean(0)


def one_by_one(p: dict, x: Tensor) -> Tensor:
    return vmap(lambda one: p["v"] @ torch.tanh(p["w"] @ one + p["b"]))(x)


def tied_to_a_map(p: dict, x: Tensor) -> Tensor:
    return F.linear(x, p["w"]).tanh() + vmap(lambda row: torch.cos(x @ row), out_dims=1)(p["w"])


def net(p: dict, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"])


def slope(p: dict, x: Tensor) -> Tensor:
    return vmap(grad(lambda a: net(p, a[None])[0, 0]))(x)


def laplacian(p: dict, x: Tensor) -> Tensor:
    return vmap(lambda one: hessian(lambda a: net(p, a[None])[0, 1])(one).diagonal().sum())(x)[:, None]


def penalty(p: dict, x: Tensor) -> Tensor:
    return grad(lambda at: net(p, at).sum())(x).norm(dim=1, keepdim=True)


def with_tangent(p: dict, x: Tensor) -> Tensor:
    z, pull = vjp(lambda at: net(p, at), x)[:2]
    return torch.cat([z, pull(torch.ones_like(z))[0]], 1)


def forward_mode(p: dict, x: Tensor) -> Tensor:
    return torch.cat(jvp(lambda at: net(p, at), (x,), (x.cos(),)), 1)


def jacobians(p: dict, x: Tensor) -> Tensor:
    return vmap(jacrev(lambda one: net(p, one[None])[0]))(x).flatten(1)


# --------------------------------------------------------------------------------------- rows that are chosen

MASK = torch.tensor([True, False, True, True])
PLACES = torch.tensor([1, 0, 2, 1])


def masked(p: dict, inputs: Any) -> Tensor:
    x, mask = inputs
    rows = F.linear(F.linear(x[mask], p["w"]).tanh(), p["v"])
    return torch.zeros(len(x), 2).to(x).index_put((mask.nonzero()[:, 0],), rows)


def experts(p: dict, x: Tensor) -> Tensor:
    """Two experts, one for every example."""
    choice, out = x[:, 0] > 0, torch.zeros(len(x), 5).to(x)
    for path, mine in (("w", choice), ("u", ~choice)):
        index = mine.nonzero()[:, 0]
        out = out.index_add(0, index, F.linear(x[index], p[path]))
    return F.linear(out.tanh(), p["v"])


def made() -> dict[str, Hidden]:
    layer, stacks = {"w": W, "b": B, "v": V}, {"w": randn(3, 4, 3), "v": randn(3, 2, 4, seed=9)}
    fn, params = kf.make_functional(Scripted().double())
    narrow = {"w": randn(5, 1, seed=4), "b": B, "v": V}
    flat = {"w": randn(5, 2, seed=4), "b": B, "v": V}
    every = set(layer)
    return {
        "scripted layer": Hidden(lambda p, x: F.linear(scripted(x, p["w"], p["b"]), p["v"]), layer, {"w", "b"}),
        "scripted gain": Hidden(lambda p, x: gained(F.linear(x, p["w"]), p["b"]), {"w": W, "b": B}, {"b"}),
        "scripted module": Hidden(fn, params, {"body.weight", "body.bias"}),
        "seen and scripted": Hidden(seen_and_scripted, {"u": U}, {"u"}),
        "own derivative": Hidden(
            lambda p, x: F.linear(Scaled.apply(x, p["w"]).tanh(), p["v"]), {"w": W, "v": V}, {"w"}
        ),
        "twin heads": twins(),
        "ensemble": Hidden(ensemble, stacks, {"w", "v"}),
        "mapped over examples": Hidden(one_by_one, layer, every),
        "tied to a map": Hidden(tied_to_a_map, {"w": W}, {"w"}),
        "derivative": Hidden(slope, narrow, {"w", "b", "v"}, LINE),
        "laplacian": Hidden(laplacian, flat, every, PLANE),
        "penalty": Hidden(penalty, layer, every),
        "value and derivative": Hidden(with_tangent, flat, every, PLANE),
        "forward derivative": Hidden(forward_mode, flat, every, PLANE),
        "jacobian": Hidden(jacobians, narrow, every, LINE),
        "masked rows": Hidden(masked, {"w": W, "v": V}, {"w", "v"}, (X, MASK)),
        "experts": Hidden(experts, {"w": W, "u": randn(5, 3, seed=5), "v": V}, {"w", "u"}),
    }


MODELS = made()
WAY_OUT = re.compile(r"unclaimed=(?:\{'([^']+)': )?'(\w+)'")
each = pytest.mark.parametrize("name", MODELS)


@each
def test_the_error_names_them_and_each_way_out_leads_out(name):
    """One that is told later (which rows an expert sees depends on values) is told with its way out."""
    m, rules, grads = MODELS[name], {}, {}
    for _ in range(3):
        step: Any = kf.value_grad_and_stats(m.fn, MSE, unclaimed=rules)
        try:
            grads = step(m.params, m.batch, generator=truth.seeded())[1]
        except (UncapturedParameterError, PlanMismatchError) as error:
            rules |= {path or "*": policy for path, policy in WAY_OUT.findall(str(error))}
        else:
            break
    assert rules
    assert "*" in rules or m.unseen.issuperset(rules)
    wanted = truth.gradient(m.fn, MSE.value, m.params, *m.batch)
    truth.same(grads, wanted)
    assert all(bool(wanted[path].any()) for path in m.unseen)


@each
@pytest.mark.parametrize("policy", ["diagonal", "identity"])
def test_every_policy_has_the_gradient(name, policy):
    m = MODELS[name]
    rules: Any = dict.fromkeys(m.unseen, policy)
    step: Any = kf.value_grad_and_stats(m.fn, MSE, unclaimed=rules)
    value, grads, stats = step(m.params, m.batch, generator=truth.seeded())
    assert close(value, MSE.value(m.fn(m.params, m.inputs), m.batch[1]))
    truth.same(grads, truth.gradient(m.fn, MSE.value, m.params, *m.batch))
    assert {path for path, _ in stats.rules.value.plan.unclaimed} == m.unseen


@each
def test_their_diagonal_is_that_of_backward_passes(name, monkeypatch):
    m = MODELS[name]
    layouts = truth.check(monkeypatch, m.fn, MSE, m.params, m.batch, unclaimed=dict.fromkeys(m.unseen, "diagonal"))
    assert {path for layout in layouts.values() for path in layout.leaves} == set(m.params)


@each
@pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning")
def test_gradients_of_examples_are_those_of_backward_passes(name):
    m = MODELS[name]
    j, (inputs, y) = truth.jacobian(m.fn, m.params, m.inputs), m.batch
    score = (m.fn(m.params, inputs) - y).flatten(1).detach()
    wanted = {path: torch.einsum("nd,nd...->n...", score, leaf) for path, leaf in j.items()}
    truth.same(kf.products.per_example_grads(m.fn, MSE)(m.params, m.batch), wanted)


@pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning")
def test_a_slope_by_torchs_own_autograd_goes_by_a_loop():
    """Which no transform of torch takes, so neither does a step."""

    def fn(p: dict, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            return torch.autograd.grad(net(p, at).sum(), at, create_graph=True)[0].norm(dim=1, keepdim=True)

    m = MODELS["penalty"]._replace(fn=fn)
    j, score = truth.jacobian(fn, m.params, X), fn(m.params, X) - m.batch[1]
    wanted = {path: torch.einsum("nd,nd...->n...", score.detach(), leaf) for path, leaf in j.items()}
    truth.same(kf.products.per_example_grads(fn, MSE)(m.params, m.batch), wanted)
    for call in (lambda: torch.func.grad(lambda p: fn(p, X).sum())(m.params), lambda: kf.make_plan(fn, m.params, X)):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            call()


def test_the_tape_says_which_route_it_took():
    m = MODELS["mapped over examples"]
    with pytest.warns(KFacWarning, match="route='"):
        kf.products.per_example_norms(m.fn, MSE)(m.params, m.batch)
