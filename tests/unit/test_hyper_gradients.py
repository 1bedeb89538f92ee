"""Gradients through whole runs of the preconditioner: with respect to decay, damping and the weights of the loss."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import HyperparameterError

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


torch.manual_seed(0)
FN, PARAMS = kf.make_functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double())
STEPS, EXAMPLES = 3, 12
INPUTS = rand(STEPS + 1, EXAMPLES, 3)
CLASSES = torch.randint(3, (STEPS + 1, EXAMPLES), generator=G)
TARGETS = {"ce": CLASSES, "bce": torch.rand((*CLASSES.shape, 3), generator=G).double(), "mse": rand(*CLASSES.shape, 3)}
PLAIN: dict[str, kf.losses.Loss] = {
    "ce": kf.losses.cross_entropy(),
    "bce": kf.losses.bce_with_logits(),
    "mse": kf.losses.mse("batchmean"),
}
RATE = 0.4


def trained(tx: kf.GradientTransformation, loss: Any = PLAIN["ce"], kind: str = "ce") -> tuple[dict, Any]:
    """Parameters and state after some steps on different batches, with a refresh at all but the second."""
    step: Any = kf.value_grad_and_stats(FN, loss, estimator=kf.estimators.exact())
    params, state = PARAMS, tx.init(PARAMS)
    for t in range(STEPS):
        _, grads, stats = step(params, (INPUTS[t], TARGETS[kind][t]))
        updates, state = tx.update(grads, state, params, stats=stats, refresh=t != 1)
        params = kf.apply_updates(params, _tree.tree_map(lambda u: -RATE * u, updates))
    return params, state


def reached(params: dict, kind: str = "ce") -> Tensor:
    """The plain loss on a batch that no step has seen."""
    return PLAIN[kind].value(FN(params, INPUTS[STEPS]), TARGETS[kind][STEPS])


def slope(fn: Callable[[Tensor], Tensor], at: Tensor, along: Tensor, e: float = 2e-4) -> Tensor:
    """The derivative of fn at a point along a direction, by five points: its error is of order e⁴."""
    near, far = (fn(at + k * e * along) - fn(at - k * e * along) for k in (1, 2))
    return (8 * near - far) / (12 * e)


def agrees(fn: Callable[[Tensor], Tensor], at: Tensor, rtol: float = 1e-6) -> None:
    """`torch.func.grad` and finite differences, entry by entry."""
    found = torch.func.grad(fn)(at)
    units = torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape)
    wanted = torch.stack([slope(fn, at, unit) for unit in units]).reshape(at.shape)
    assert (wanted.abs() > 1e-6).all(), wanted
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


RECIPES: dict[str, Callable[..., kf.GradientTransformation]] = {
    "pi": kf.kfac,
    "none": lambda **options: kf.kfac(split="none", **options),
    "exact": lambda **options: kf.kfac(split="exact", **options),
    "diagonal": lambda **options: kf.kfac(kf.curvature.diagonal(), **options),
    "ekfac": kf.ekfac,
    "kpsvd": lambda **options: kf.kpsvd(split="pi", iterations=5, tolerance=0.0, **options),
    "two_level": lambda **options: kf.two_level_kfac("residual", split="pi", **options),
    "inverse_free": kf.inverse_free,
}
recipes = pytest.mark.parametrize("recipe", RECIPES)
AVERAGES: list[tuple[str, Any]] = [(recipe, "debiased") for recipe in RECIPES]
AVERAGES += [(recipe, average) for recipe in ("pi", "ekfac") for average in ("warmup", "constant")]


@pytest.mark.parametrize(("recipe", "average"), AVERAGES)
def test_the_gradient_with_respect_to_the_decay(recipe, average):
    agrees(lambda decay: reached(trained(RECIPES[recipe](damping=0.2, decay=decay, average=average))[0]), scalar(0.6))


@recipes
def test_the_gradient_with_respect_to_the_damping(recipe):
    agrees(lambda damping: reached(trained(RECIPES[recipe](damping=damping, decay=0.6))[0]), scalar(0.2))


def test_the_gradient_with_respect_to_the_damping_of_each_path():
    def fn(dampings: Tensor) -> Tensor:
        first, rest = dampings
        return reached(trained(kf.kfac(damping={"0.*": first, "**": rest}, decay=0.6))[0])

    agrees(fn, torch.tensor([0.1, 0.3]).double())


AT = torch.tensor([0.5, 1.0, 2.0]).double()
LOSSES: dict[str, tuple[str, Callable[[Tensor], kf.losses.Loss], Tensor]] = {
    "cross_entropy": ("ce", lambda w: kf.losses.cross_entropy(w), AT),
    "cross_entropy sum": ("ce", lambda w: kf.losses.cross_entropy(w / 20, reduction="sum"), AT),
    "cross_entropy ignored": ("ce", lambda w: kf.losses.cross_entropy(w, label_smoothing=0.1, ignore_index=1), AT),
    "bce weight": ("bce", lambda w: kf.losses.bce_with_logits(w, reduction="batchmean"), AT),
    "bce pos_weight": ("bce", lambda w: kf.losses.bce_with_logits(pos_weight=w), AT),
    "mse scale": ("mse", lambda s: kf.losses.mse("batchmean", scale=s), scalar(0.7)),
}
WEIGHTED = [(loss, "pi") for loss in LOSSES] + [("cross_entropy", "ekfac"), ("bce pos_weight", "exact")]


@pytest.mark.parametrize(("loss", "recipe"), WEIGHTED)
def test_the_gradient_with_respect_to_the_weights_of_the_loss(loss, recipe):
    kind, make, at = LOSSES[loss]
    tx = RECIPES[recipe](damping=0.2, decay=0.6)
    agrees(lambda w: reached(trained(tx, make(w), kind)[0], kind), at)


def test_the_gradient_with_respect_to_the_scale_of_a_drawn_loss():
    """The draws of squared error depend on its scale as well."""
    noise = torch.rand(2, EXAMPLES, 3, generator=G)

    def fn(scale: Tensor) -> Tensor:
        loss = kf.losses.mse("batchmean", scale=scale)
        step: Any = kf.value_grad_and_stats(FN, loss, estimator=kf.estimators.monte_carlo(2))
        _, grads, stats = step(PARAMS, (INPUTS[0], TARGETS["mse"][0]), noise=noise)
        tx = kf.kfac(damping=0.2)
        updates, _ = tx.update(grads, tx.init(PARAMS), stats=stats)
        return reached(kf.apply_updates(PARAMS, _tree.tree_map(torch.neg, updates)), "mse")

    agrees(fn, scalar(0.7))


def test_all_hyper_gradients_at_once_by_backward():
    hyper = {"damping": scalar(0.2), "decay": scalar(0.6), "weight": AT}
    leaves = {name: value.clone().requires_grad_() for name, value in hyper.items()}

    def fn(h: dict[str, Tensor]) -> Tensor:
        loss = kf.losses.cross_entropy(h["weight"])
        return reached(trained(kf.kfac(damping=h["damping"], decay=h["decay"]), loss)[0])

    fn(leaves).backward()
    for name, wanted in torch.func.grad(fn)(hyper).items():
        assert wanted.abs().min() > 1e-6
        torch.testing.assert_close(leaves[name].grad, wanted, rtol=1e-10, atol=1e-14)


# ------------------------------------------------------------------ a decay that is a tensor or a schedule


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(_tree.leaves(one), _tree.leaves(other), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("average", ["debiased", "warmup", "constant"])
@pytest.mark.parametrize("recipe", ["pi", "ekfac"])
def test_a_tensor_is_the_number(recipe, average):
    make = RECIPES[recipe]
    params, state = trained(make(damping=0.2, decay=0.7, average=average))
    found, own = trained(make(damping=0.2, decay=scalar(0.7), average=average))
    assert own.decay == 0.7
    close(found, params)
    close(own._replace(decay=()), state)


def test_members_have_their_own_decay():
    decays = torch.tensor([0.0, 0.5, 0.9]).double()
    params, state = torch.func.vmap(lambda decay: trained(kf.kfac(damping=0.2, decay=decay)))(decays)
    assert state.decay.tolist() == decays.tolist()
    for k, decay in enumerate(decays.tolist()):
        close({name: leaf[k] for name, leaf in params.items()}, trained(kf.kfac(damping=0.2, decay=decay))[0])
    assert (params["0.weight"].std(0) > 1e-4).all()


def stats_of(t: int) -> Any:
    step: Any = kf.value_grad_and_stats(FN, PLAIN["ce"], estimator=kf.estimators.exact())
    return step(PARAMS, (INPUTS[t], CLASSES[t]))


@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "injected"])
def test_a_scheduled_decay_is_that_of_its_update(injected):
    decays = [0.0, 0.5, 0.8, 0.2]
    make: Any = kf.inject_hyperparams(kf.kfac) if injected else kf.kfac
    tx = make(damping=0.2, decay=lambda count: torch.tensor(decays, dtype=torch.float64)[count])
    state, weight, wanted = tx.init(PARAMS), 0.0, torch.zeros(())
    for t, decay in enumerate(decays):
        _, grads, stats = stats_of(t)
        _, state = tx.update(grads, state, stats=stats)
        own = kf.observe(kf.kfac().init(PARAMS), stats).curvature.matrix["0.weight"].a
        wanted = (decay * weight * wanted + own) / (decay * weight + 1)
        weight = decay * weight + 1
        inner = _tree.nodes(state, kf.KFacState)[0]
        close(inner.curvature.matrix["0.weight"].a, wanted)
        close(inner.weight, scalar(weight))


def test_observe_takes_the_decay_of_the_state():
    state, number = (kf.kfac(decay=decay).init(PARAMS) for decay in (scalar(0.5), 0.5))
    for t in range(2):
        state, number = (kf.observe(one, stats_of(t)[2]) for one in (state, number))
    close(state._replace(decay=()), number)
    assert float(state.weight) == 1.5


def test_files_keep_the_decay_and_old_ones_without_it_load():
    tx = kf.kfac(damping=0.2, decay=scalar(0.6))
    _, state = trained(tx)
    old = trained(kf.kfac(damping=0.2, decay=0.6))[1]
    for one in (state, old):
        file = io.BytesIO()
        torch.save(one, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert all(map(torch.equal, _tree.leaves(loaded), _tree.leaves(one)))
        assert len(_tree.leaves(loaded)) == len(_tree.leaves(one))
    assert old.decay == ()
    assert kf.KFacState(*old[:-1]) == old  # as in files from before there was this field
    _, grads, stats = stats_of(0)
    close(tx.update(grads, old, stats=stats)[0], tx.update(grads, state, stats=stats)[0])


def test_members_have_their_own_loss():
    """Losses are made under vmap too, where no value can be read."""
    weights = torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.0, 3.0]]).double()
    tx = kf.kfac(damping=0.2)
    makes: dict[str, Any] = {
        "ce": kf.losses.cross_entropy,
        "bce": lambda w: kf.losses.bce_with_logits(w, pos_weight=w + 1),
        "mse": lambda w: kf.losses.mse("batchmean", scale=w[2]),
    }
    for kind, make in makes.items():

        def run(w: Tensor, make: Any = make, kind: str = kind) -> dict:
            return trained(tx, make(w), kind)[0]

        found = torch.func.vmap(run)(weights)
        for k in range(2):
            close({name: leaf[k] for name, leaf in found.items()}, run(weights[k]))
        assert (found["0.weight"].std(0) > 1e-6).all()


BAD: dict[str, Callable[[], Any]] = {
    "decay of 1": lambda: kf.kfac(decay=1.0),
    "decay of several numbers": lambda: kf.kfac(decay=torch.ones(2)),
    "scale of several numbers": lambda: kf.losses.mse(scale=torch.ones(2)),
    "scale of 0": lambda: kf.losses.mse(scale=scalar(0.0)),
    "scale of NaN": lambda: kf.losses.mse(scale=scalar(float("nan"))),
}


@pytest.mark.parametrize("bad", BAD)
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(HyperparameterError, match=bad.split()[0]):
        BAD[bad]()
