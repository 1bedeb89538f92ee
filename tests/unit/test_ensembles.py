"""Ensembles: a whole training step of eight members in one vmap is eight separate steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

import kfac_func as kf
from kfac_func import _tree

MEMBERS, STEPS, EXAMPLES = 8, 4, 16
REFRESH = (True, False, True, True)
G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.inner(x, x, x)[0]).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)), (3,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (2, 3, 3),
    ),
    "attention": (Attention, (3, 4)),
}
RECIPES: dict[str, Callable[..., kf.GradientTransformation]] = {
    "pi": kf.kfac,
    "exact": lambda **options: kf.kfac(split="exact", **options),
    "diagonal": lambda **options: kf.kfac(kf.curvature.diagonal(), **options),
    "ekfac": kf.ekfac,
    "kpsvd": lambda **options: kf.kpsvd(iterations=5, tolerance=0.0, **options),
    "two_level": kf.two_level_kfac,
    "inverse_free": kf.inverse_free,
    "natural_gradient": lambda **options: kf.exact_natural_gradient(True, **options),
}
LOSS = kf.losses.cross_entropy()
CLASSES = torch.randint(3, (STEPS, MEMBERS, EXAMPLES), generator=G)


class Problem(NamedTuple):
    """Stacked parameters [MEMBERS, ...], batches [STEPS, MEMBERS, EXAMPLES, ...] and the model."""

    fn: Any
    params: dict[str, Tensor]
    inputs: Tensor


def problem(model: str = "mlp") -> Problem:
    make, shape = MODELS[model]
    torch.manual_seed(0)
    modules = [make().double() for _ in range(MEMBERS)]
    fn, _ = kf.make_functional(modules[0])
    params = {name: leaf.detach() for name, leaf in stack_module_state(modules)[0].items()}
    return Problem(fn, params, rand(STEPS, MEMBERS, EXAMPLES, *shape))


def stepper(p: Problem, tx: Any, estimator: Any = None) -> Callable[..., Any]:
    """One whole step (params, state, batch, **noise) -> (params, state, value)."""
    step: Any = kf.value_grad_and_stats(p.fn, LOSS, estimator=estimator or kf.estimators.exact())

    def train(params: dict, state: Any, batch: Any, refresh: bool, noise: Any = None) -> Any:
        value, grads, stats = step(params, batch, noise=noise)
        updates, state = tx.update(grads, state, params, stats=stats, refresh=refresh)
        return kf.apply_updates(params, updates), state, value

    return train


def member(tree: Any, k: int) -> Any:
    """What belongs to one member."""
    return _tree.tree_map(lambda leaf: leaf[k], tree)


def equal(one: Any, other: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(_tree.leaves(one), _tree.leaves(other), rtol=tolerance, atol=tolerance)


def compare(p: Problem, tx: Any, shared: bool = False, estimator: Any = None, noise: Tensor | None = None) -> Any:
    """Run the ensemble in one vmap and its members one by one; the final parameters and state of the ensemble."""
    train = stepper(p, tx, estimator)
    params, state = p.params, vmap(tx.init)(p.params)
    alone: list[Any] = [(member(params, k), tx.init(member(params, k))) for k in range(MEMBERS)]
    dims = (0, 0, None if shared else 0, None if noise is None else 0)
    for t in range(STEPS):
        batch = (p.inputs[t, 0], CLASSES[t, 0]) if shared else (p.inputs[t], CLASSES[t])
        drawn = None if noise is None else noise[t]

        def one(params: dict, state: Any, batch: Any, drawn: Any, t: int = t) -> Any:
            return train(params, state, batch, REFRESH[t], drawn)

        params, state, values = vmap(one, in_dims=dims)(params, state, batch, drawn)
        for k in range(MEMBERS):
            own = batch if shared else member(batch, k)
            *alone[k], value = train(*alone[k], own, REFRESH[t], None if drawn is None else drawn[k])
            equal(values[k], value)
    for k in range(MEMBERS):
        equal(member(params, k), alone[k][0])
        equal(member(state, k), alone[k][1])
    assert all((leaf.std(0) > 0).any() for leaf in params.values())
    return params, state


@pytest.mark.parametrize("shared", [False, True], ids=["own data", "shared data"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_ensemble_is_its_members(recipe, shared):
    tx = kf.chain(RECIPES[recipe](damping=0.3), kf.sgd(0.2, momentum=0.5))
    compare(problem(), tx, shared)


@pytest.mark.parametrize("recipe", ["pi", "exact", "ekfac"])
@pytest.mark.parametrize("model", ["conv", "attention"])
def test_an_ensemble_of_other_models_is_its_members(model, recipe):
    compare(problem(model), kf.chain(RECIPES[recipe](damping=0.3), kf.sgd(0.2)))


@pytest.mark.parametrize("recipe", ["pi", "ekfac"])
def test_members_draw_their_own_noise(recipe):
    noise = torch.rand(STEPS, MEMBERS, 2, EXAMPLES, generator=G)
    p = problem()._replace(params={k: v[:1].expand_as(v) for k, v in problem().params.items()})
    tx = kf.chain(RECIPES[recipe](damping=0.3), kf.sgd(0.2))
    compare(p, tx, True, kf.estimators.monte_carlo(2), noise)


def test_members_have_their_own_settings():
    """Damping, decay and rate by member, a schedule for all, and a momentum that counts."""
    p = problem()
    settings = {
        "damping": torch.linspace(0.1, 0.8, MEMBERS).double(),
        "decay": torch.linspace(0.0, 0.9, MEMBERS).double(),
        "rate": torch.linspace(0.05, 0.4, MEMBERS).double(),
    }

    def make(s: dict[str, Tensor]) -> kf.GradientTransformation:
        rate = kf.schedules.cosine_decay(s["rate"], STEPS + 1)
        return kf.chain(kf.kfac(damping={"0.*": s["damping"], "**": 0.2}, decay=s["decay"]), kf.sgd(rate, momentum=0.9))

    def run(s: dict[str, Tensor], params: dict, inputs: Tensor, classes: Tensor) -> Any:
        tx = make(s)
        state, train = tx.init(params), stepper(p, tx)
        for t in range(STEPS):
            params, state, _ = train(params, state, (inputs[t], classes[t]), REFRESH[t])
        return params, state

    found = vmap(run, in_dims=(0, 0, 1, 1))(settings, p.params, p.inputs, CLASSES)
    for k in range(MEMBERS):
        equal(member(found, k), run(member(settings, k), member(p.params, k), p.inputs[:, k], CLASSES[:, k]))
    (inner,) = _tree.nodes(found[1], kf.KFacState)
    assert isinstance(inner.damping, dict)
    equal(inner.damping["0.*"], settings["damping"])
    equal(inner.decay, settings["decay"])


def test_injected_settings_are_those_of_the_members():
    """`inject_hyperparams` keeps them in the state, where vmap finds them."""
    p, dampings = problem(), torch.linspace(0.1, 0.8, MEMBERS).double()
    tx: Any = kf.chain(kf.inject_hyperparams(kf.kfac, static="decay")(damping=0.3, decay=0.9), kf.sgd(0.2))
    state = kf.tree_set(vmap(tx.init)(p.params), **{"hyperparams.damping": dampings})
    params, state, _ = vmap(lambda p_, s, b: stepper(p, tx)(p_, s, b, True))(p.params, state, (p.inputs[0], CLASSES[0]))
    for k in range(MEMBERS):
        plain = kf.chain(kf.kfac(damping=dampings[k].item(), decay=0.9), kf.sgd(0.2))
        own = member(p.params, k)
        equal(member(params, k), stepper(p, plain)(own, plain.init(own), (p.inputs[0, k], CLASSES[0, k]), True)[0])


@pytest.mark.parametrize("recipe", ["pi", "ekfac", "kpsvd"])
@pytest.mark.parametrize("first", [True, False], ids=["at first", "later"])
def test_a_member_without_numbers_leaves_the_others_alone(recipe, first):
    p, bad, at = problem(), 3, 0 if first else 1
    tx = kf.chain(RECIPES[recipe](damping=0.3), kf.sgd(0.2))
    params, state = p.params, vmap(tx.init)(p.params)
    inputs = p.inputs.clone()
    inputs[at, bad, 0, 0] = float("nan")
    alone: list[Any] = [(member(params, k), tx.init(member(params, k))) for k in range(MEMBERS)]
    train = stepper(p, tx)
    for t in range(2):
        one = lambda p_, s, b, t=t: train(p_, s, b, REFRESH[t])  # noqa: E731
        params, state, values = vmap(one)(params, state, (inputs[t], CLASSES[t]))
        assert values.isfinite().tolist() == [k != bad or t < at for k in range(MEMBERS)]
        for k in set(range(MEMBERS)) - {bad}:
            *alone[k], _ = train(*alone[k], (inputs[t, k], CLASSES[t, k]), REFRESH[t])
    (inner,) = _tree.nodes(state, kf.KFacState)
    # the gradient of a batch with NaN is NaN, and so is the next batch at such parameters: both are left out
    assert inner.rejected.tolist() == [2 - at if k == bad else 0 for k in range(MEMBERS)]
    assert inner.observed.tolist() == [at if k == bad else 2 for k in range(MEMBERS)]
    for k in set(range(MEMBERS)) - {bad}:
        equal(member(params, k), alone[k][0])
        equal(member(state, k), alone[k][1])
    assert all(leaf[bad].isfinite().all() for leaf in _tree.leaves(inner))


def test_a_member_without_numbers_waits_and_goes_on():
    """With `apply_if_finite` it takes no step at the bad batch, and trains on from where it was."""
    p, bad = problem(), 3
    tx = kf.apply_if_finite(kf.chain(kf.kfac(damping=0.3), kf.sgd(0.2)), 5)
    inputs = p.inputs.clone()
    inputs[1, bad] = float("nan")
    train, params, state = stepper(p, tx), p.params, vmap(tx.init)(p.params)
    for t in (0, 1, 2):
        before = params
        one = lambda p_, s, b, t=t: train(p_, s, b, True)  # noqa: E731
        params, state, _ = vmap(one)(params, state, (inputs[t], CLASSES[t]))
        moved = torch.stack([(params[name] - before[name]).flatten(1).norm(dim=1) for name in params]).sum(0)
        assert (moved > 0).tolist() == [t != 1 or k != bad for k in range(MEMBERS)]
    own = member(p.params, bad)
    alone: Any = own, tx.init(own)
    for t in (0, 2):
        *alone, _ = train(*alone, (inputs[t, bad], CLASSES[t, bad]), True)
    equal(member(params, bad), alone[0])


def trained() -> Any:
    """The parameters and the state of an ensemble."""
    return compare(problem(), kf.chain(kf.kfac(damping=torch.tensor(0.3).double()), kf.sgd(0.2)))


def test_the_state_is_read_by_member():
    params, state = trained()
    (inner,) = _tree.nodes(state, kf.KFacState)
    for name, wanted in {"step": STEPS, "observed": STEPS, "rejected": 0, "failed": 0, "scaled": 0}.items():
        assert getattr(inner, name).tolist() == [wanted] * MEMBERS
    assert inner.curvature.matrix["0.weight"].a.shape == (MEMBERS, 4, 4)
    grads = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    found = vmap(kf.precondition)(state, grads)
    for k in range(MEMBERS):
        equal(member(found, k), kf.precondition(member(state, k), member(grads, k)))


def test_a_description_of_an_ensemble_has_ranges():
    _, state = trained()
    dampings = torch.linspace(0.25, 2.0, MEMBERS).double()
    state = kf.tree_set(state, damping=dampings, rejected=torch.arange(MEMBERS))
    head, *rows, last = kf.describe(state).splitlines()
    assert head.endswith("damping 0.25 to 2, split pi, 4 batches observed, 0 to 7 rejected, 8 members")
    alone = kf.describe(member(state, 0)).splitlines()
    assert [row.split()[0] for row in rows] == [row.split()[0] for row in alone[1:-1]]
    (inner,) = _tree.nodes(state, kf.KFacState)
    once = {id(leaf): leaf.nbytes for leaf in _tree.leaves((inner.curvature, inner.factored))}
    assert last.startswith(f"memory: {sum(once.values()) / 1e6:.3g} MB")


def test_members_differ_by_the_generator_too():
    """`randomness="different"` gives every member numbers of its own, "same" the same ones to all."""
    p = problem()
    p = p._replace(params={name: leaf[:1].expand_as(leaf) for name, leaf in p.params.items()})
    step: Any = kf.value_grad_and_stats(p.fn, LOSS)
    tx = kf.kfac(damping=0.3)
    batch = p.inputs[0, 0], CLASSES[0, 0]

    def first(params: dict) -> Tensor:
        _, grads, stats = step(params, batch, generator=torch.Generator().manual_seed(0))
        return tx.update(grads, tx.init(params), stats=stats)[0]["0.weight"]

    apart = {kind: vmap(first, randomness=kind)(p.params).std(0).max() for kind in ("different", "same")}
    assert apart["different"] > 1e-3
    assert apart["same"] < 1e-14


def test_hyper_gradients_by_member():
    """vmap over grad through two steps: every member has its own derivative with respect to its damping and decay."""
    p = problem()
    hyper = torch.stack([torch.linspace(0.2, 0.9, MEMBERS), torch.linspace(0.1, 0.8, MEMBERS)], dim=1).double()

    def after(h: Tensor, params: dict, inputs: Tensor, classes: Tensor) -> Tensor:
        tx = kf.chain(kf.kfac(damping=h[0], decay=h[1]), kf.sgd(0.5))
        state, train = tx.init(params), stepper(p, tx)
        for t in range(2):
            params, state, _ = train(params, state, (inputs[t], classes[t]), True)
        return LOSS.value(p.fn(params, inputs[2]), classes[2])

    found = vmap(torch.func.grad(after), in_dims=(0, 0, 1, 1))(hyper, p.params, p.inputs, CLASSES)
    for k in range(MEMBERS):
        own = member(p.params, k), p.inputs[:, k], CLASSES[:, k]
        equal(found[k], torch.func.grad(after)(hyper[k], *own))
    assert found.abs().min() > 1e-7
