"""Whole training steps inside torch.func: ensembles by vmap, hyper-gradients by grad, tangents by jvp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import StateError

MEMBERS = 4
G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


class Words(nn.Module):
    """A tied embedding, causal mixing of positions, a norm and a bias that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.mix, self.bias = nn.Parameter(torch.eye(4) + 0.1), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        weights = torch.softmax(self.norm(h) @ h.mT, dim=-1)
        h = weights @ (h @ self.mix + self.bias)
        return F.linear(h.mean(1), self.words.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.sin(), x)[0]


MLP = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))
CONV = nn.Sequential(
    nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Conv1d(4, 3, 2), nn.Flatten(), nn.Linear(9, 2)
)
WIDENED = nn.Sequential(
    nn.ConvTranspose1d(2, 4, 2, stride=2, groups=2), nn.Tanh(), Attention(), nn.Flatten(), nn.Linear(16, 2)
)
MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "mlp": (MLP, rand(6, 3)),
    "conv": (CONV, rand(6, 2, 4)),
    "widened": (WIDENED, rand(6, 2, 2)),
    "words": (Words(), torch.randint(5, (6, 3), generator=G)),
}
TARGETS = torch.randint(2, (6,), generator=G)
LOSS = kf.losses.cross_entropy()
ESTIMATORS = {
    "exact": kf.estimators.exact(),
    "empirical": kf.estimators.empirical(),
    "monte_carlo": kf.estimators.monte_carlo(2),
}
NOISE = {"monte_carlo": torch.rand(2, 6, generator=G)}

models = pytest.mark.parametrize("model", MODELS)
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


def stepper(model: str, estimator: str = "exact", split: Any = "pi") -> tuple[Callable, Callable, dict]:
    """init, one whole step (params, state, damping, rate) -> (params, state, value), and parameters."""
    module, x = MODELS[model]
    torch.manual_seed(0)
    fn, params = kf.make_functional(module.double())
    stats_of: Any = kf.value_grad_and_stats(fn, LOSS, estimator=ESTIMATORS[estimator])

    def tx(damping: Any, rate: Any) -> kf.GradientTransformation:
        return kf.chain(kf.kfac(damping=damping, split=split), kf.sgd(rate, momentum=0.9))

    def step(params: dict, state: Any, damping: Any = 0.1, rate: Any = 0.1, refresh: bool = True) -> Any:
        value, grads, stats = stats_of(params, (x, TARGETS), noise=NOISE.get(estimator))
        updates, state = tx(damping, rate).update(grads, state, params, stats=stats, refresh=refresh)
        return kf.apply_updates(params, updates), state, value

    return lambda params, damping=0.1: tx(damping, 0.1).init(params), step, params


def stacked(params: dict) -> dict:
    g = torch.Generator().manual_seed(1)
    return {k: v + 0.2 * torch.randn(MEMBERS, *v.shape, generator=g, dtype=v.dtype) for k, v in params.items()}


def close(one: Any, other: Any, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    torch.testing.assert_close(_tree.leaves(one), _tree.leaves(other), rtol=rtol, atol=atol)


@estimators
@models
def test_an_ensemble_is_a_loop_over_its_members(model, estimator):
    init, step, params = stepper(model, estimator)
    together = stacked(params)
    members = [{k: v[i] for k, v in together.items()} for i in range(MEMBERS)]
    state, states, values = torch.func.vmap(init)(together), [init(one) for one in members], None
    for k in range(4):
        together, state, values = torch.func.vmap(lambda p, s, k=k: step(p, s, refresh=k != 2))(together, state)
        moved = [step(one, own, refresh=k != 2) for one, own in zip(members, states, strict=True)]
        members, states = [m[0] for m in moved], [m[1] for m in moved]
        close(values, torch.stack([m[2] for m in moved]))
    for i in range(MEMBERS):
        close({k: v[i] for k, v in together.items()}, members[i])
        close([leaf[i] for leaf in _tree.leaves(state)], states[i])
    assert (together["0.weight" if model != "words" else "mix"].std(0) > 0).all()


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
def test_many_dampings_at_once(split):
    init, step, params = stepper("mlp", split=split)
    dampings = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    found = torch.func.vmap(lambda damping: step(params, init(params, damping), damping)[0])(dampings)
    for i, damping in enumerate(dampings):
        close({k: v[i] for k, v in found.items()}, step(params, init(params, damping), damping)[0])


def test_under_vmap_the_refresh_is_asked_for():
    fn, params = kf.make_functional(MLP.double())
    stats_of: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    _, _, stats = stats_of(params, (MODELS["mlp"][1], TARGETS))
    for every, options in ((10, {"refresh": False}), (10, {"refresh": True}), (10, {}), (1, {})):
        tx = kf.kfac(refresh_every=every)
        again = torch.func.vmap(lambda g, s, tx=tx, options=options: tx.update(g, s, **options))
        together = stacked(params)
        _, state = torch.func.vmap(lambda p, tx=tx: tx.update(p, tx.init(p), stats=stats))(together)
        if every == 1 or options:
            assert again(together, state)[1].step.tolist() == [2] * MEMBERS
            continue
        with pytest.raises(StateError, match="refresh=True"):
            again(together, state)


def objective(model: str, steps: int, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss after some steps, as a function of the damping and the rate."""
    init, step, params = stepper(model, **options)
    module, x = MODELS[model]
    fn, _ = kf.make_functional(module)

    def after(damping: Tensor, rate: Tensor) -> Tensor:
        found, state = params, init(params, damping)
        for _ in range(steps):
            found, state, _ = step(found, state, damping, rate)
        return LOSS.value(fn(found, x), TARGETS)

    return after


HYPER = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)


def differences(fn: Callable, at: tuple[Tensor, ...], e: float = 1e-5) -> list[Tensor]:
    return [
        (fn(*at[:i], at[i] + e, *at[i + 1 :]) - fn(*at[:i], at[i] - e, *at[i + 1 :])) / (2 * e) for i in range(len(at))
    ]


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize(("model", "steps"), [("mlp", 1), ("mlp", 2), ("conv", 1), ("words", 2)])
def test_hyper_gradients_are_finite_differences(model, steps, split):
    after = objective(model, steps, split=split, estimator="exact" if model != "words" else "empirical")
    found = torch.func.grad(after, argnums=(0, 1))(*HYPER)
    wanted = differences(after, HYPER)
    assert all(abs(w) > 1e-5 for w in wanted), wanted
    close(found, wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it loads its forward formulas
@models
def test_tangents_of_a_step_are_finite_differences(model):
    after = objective(model, 1)
    tangents = torch.ones_like(HYPER[0]), torch.zeros_like(HYPER[1])
    found = torch.func.jvp(after, HYPER, tangents)[1]
    close(found, differences(after, HYPER)[0], rtol=1e-5, atol=1e-9)


@models
def test_a_step_is_differentiable_in_the_parameters(model):
    """The gradient goes through the forward pass, the statistics, their factors and the direction."""
    init, step, params = stepper(model)
    x = MODELS[model][1]
    fn, _ = kf.make_functional(MODELS[model][0])
    moves = {k: rand(*v.shape) for k, v in params.items()}

    def after(t: Tensor) -> Tensor:
        moved = {k: v + t * moves[k] for k, v in params.items()}
        found, _, _ = step(moved, init(moved), refresh=True)
        return LOSS.value(fn(found, x), TARGETS)

    zero = torch.zeros((), dtype=torch.float64)
    close(torch.func.grad(after)(zero), differences(after, (zero,))[0], rtol=1e-5, atol=1e-8)


@models
def test_the_gradient_of_a_step_is_differentiable(model):
    """A Hessian-vector product through `value_grad_and_stats` is that of plain differentiation."""
    module, x = MODELS[model]
    fn, params = kf.make_functional(module.double())
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.empirical())
    moves = {k: rand(*v.shape) for k, v in params.items()}

    def along(stats: bool) -> Any:
        def slope(p: dict) -> Tensor:
            grads = step(p, (x, TARGETS), stats=stats)[1]
            return torch.stack([(grads[k] * moves[k]).sum() for k in p]).sum()

        return torch.func.grad(slope)(params)

    close(along(True), along(False))


def test_backward_reaches_the_parameters_through_the_statistics():
    init, step, params = stepper("mlp")
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    moved, _, _ = step(leaves, init(leaves))
    torch.stack([v.square().sum() for v in moved.values()]).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in leaves.values())
