"""Hyperparameters that live in the state."""

from __future__ import annotations

import pytest
import torch

import kfac_func as kf
from kfac_func._errors import HyperparameterError
from kfac_func._tree import tree_map
from kfac_func.transforms import (
    adamw,
    add_decayed_weights,
    chain,
    inject_hyperparams,
    scale,
    schedules,
    sgd,
    stateless,
    trace,
    tree_set,
)
from tests.unit.transforms.problem import FN, PARAMS, X, Y, close, passed, reloaded, run

RATE = schedules.cosine_decay(0.3, 5)


def test_the_updates_are_those_of_the_factory():
    got, state = run(inject_hyperparams(sgd)(RATE, momentum=0.9, nesterov=True), 4)
    close(got, run(sgd(RATE, 0.9, nesterov=True), 4)[0])
    assert state.hyperparams.keys() == {"learning_rate", "momentum"}
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in state.hyperparams.values())
    assert (state.step.item(), state.hyperparams["learning_rate"].item()) == (4, RATE(3).item())


def test_an_option_without_schedules_gets_one():
    decay = lambda count: 0.5 / (1.0 + count)  # noqa: E731
    tx = inject_hyperparams(trace)(decay)
    state, momentum = tx.init(torch.tensor(0.0)), 0.0
    for count in range(4):
        momentum = (1.0 + count) + decay(count) * momentum
        update, state = tx.update(torch.tensor(1.0 + count), state)
        assert update.item() == pytest.approx(momentum, rel=1e-6)


def test_a_value_may_be_changed_between_steps_unless_it_has_a_schedule():
    tx = inject_hyperparams(sgd)(0.1, momentum=lambda count: 0.5)
    one = torch.tensor(1.0, dtype=torch.float64)
    state = tree_set(tx.init(one), learning_rate=0.25, momentum=0.0)
    first, state = tx.update(one, state)
    second, state = tx.update(one, state)
    assert (first.item(), second.item()) == (-0.25, -0.25 * 1.5)
    third, _ = tx.update(one, tree_set(reloaded(state), learning_rate=1))
    assert third.item() == -1.75


def test_what_is_injected():
    got = []

    def factory(a, b, c, d, e, f=1.0, **more):
        got.append((a, b, c, d, e, f, more))
        return scale(1.0)

    given, count = torch.tensor(0.5, dtype=torch.float64), torch.tensor(7)
    make = inject_hyperparams(factory, static=["e", "k"])
    tx = make(1.0, given, 2, True, e=3.0, g="x", h=None, i=count, k=RATE, m=RATE)
    state = tx.init(PARAMS)
    assert state.hyperparams.keys() == {"a", "b", "m"}
    assert state.hyperparams["b"].dtype == torch.float64
    assert state.hyperparams["b"].data_ptr() != given.data_ptr()
    a, b, *rest, f, more = got[-1]
    assert all(isinstance(value, torch.Tensor) for value in (a, b, more.pop("m")))
    assert (rest, f, more) == ([2, True, 3.0], 1.0, {"g": "x", "h": None, "i": count, "k": RATE})


def test_static_names_what_would_be_taken_for_a_schedule():
    plain = adamw(0.1, weight_decay=0.5, mask=lambda params: "*.weight")
    make = inject_hyperparams(adamw, static="mask")
    close(run(make(0.1, weight_decay=0.5, mask=lambda params: "*.weight"))[0], run(plain)[0])
    for mask in (lambda params: "*.weight", lambda params: True):
        with pytest.raises(HyperparameterError, match=r"mask is a function, and no schedule(.|\n)*static='mask'"):
            inject_hyperparams(adamw)(0.1, mask=mask)


WRONG = {
    "unknown": (lambda: inject_hyperparams(sgd, static="rate"), "rate.*\n.*learning_rate or momentum"),
    "nothing": (lambda: inject_hyperparams(sgd)(1), "nothing to inject.*\n.*learning_rate=1"),
    "no arguments": (lambda: inject_hyperparams(chain)(), "nothing to inject.*\n.*no arguments"),
    "a number": (lambda: inject_hyperparams(sgd)(-0.1), "learning_rate has a value"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_injected_is_refused(make, message):
    with pytest.raises(HyperparameterError, match=message):
        make()


def test_kfac_follows_a_damping_in_the_state():
    make = inject_hyperparams(kf.kfac, static="decay")
    tx = make(damping=0.5, decay=0.9, refresh_every=1, split="none")
    plain = kf.kfac(damping=0.5, decay=0.9, refresh_every=1, split="none")
    got, state = run(tx, 2)
    wanted, own = run(plain, 2)
    close(got, wanted)
    close(state.inner.curvature, own.curvature)
    grads, stats = passed()
    changed = tree_set(state, **{"hyperparams.damping": 0.01})
    updates, after = tx.update(grads, changed, stats=stats)
    close(updates, plain.update(grads, tree_set(own, damping=0.01), stats=stats)[0])
    assert (updates["0.weight"] - plain.update(grads, own, stats=stats)[0]["0.weight"]).abs().max() > 0.01
    assert after.inner.damping.item() == 0.01
    close(tx.update(grads, reloaded(changed), stats=stats), (updates, after))


def test_kfac_by_path_follows_a_damping_in_the_state():
    def factory(first, rest):
        return kf.kfac(damping={"0.*": first, "**": rest}, refresh_every=1)

    grads, stats = passed()
    tx = inject_hyperparams(factory)(0.5, rest=0.1)
    state = tree_set(tx.init(PARAMS), first=0.02)
    plain = factory(0.02, 0.1)
    close(tx.update(grads, state, stats=stats)[0], plain.update(grads, plain.init(PARAMS), stats=stats)[0])


def loss_after(tx, state=None):
    params, _ = run(tx, 3, state)
    return kf.losses.mse().value(FN(params, X), Y)


def test_hyper_gradients_flow_through_injected_values():
    rate = torch.tensor(0.1, dtype=torch.float64)
    wanted = torch.func.grad(lambda r: loss_after(sgd(r, 0.9)))(rate)
    make = inject_hyperparams(sgd)
    close(torch.func.grad(lambda r: loss_after(make(r, 0.9)))(rate), wanted)
    tx = make(0.7, momentum=0.9)
    close(torch.func.grad(lambda r: loss_after(tx, tree_set(tx.init(PARAMS), learning_rate=r)))(rate), wanted)
    assert wanted.abs() > 1e-3
    tx = chain(inject_hyperparams(kf.kfac)(damping=0.7), sgd(0.1))
    h = 1e-5

    def after(damping):
        return loss_after(tx, tree_set(tx.init(PARAMS), **{"hyperparams.damping": damping}))

    slope = (after(rate + h) - after(rate - h)) / (2 * h)
    close(torch.func.grad(after)(rate), slope, 1e-7)
    assert slope.abs() > 1e-3


def test_every_member_of_an_ensemble_has_its_own():
    tx = chain(kf.kfac(damping=0.1), inject_hyperparams(sgd)(0.1, momentum=0.9))
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def trained(rate):
        return run(tx, 3, tree_set(tx.init(PARAMS), learning_rate=rate), refresh=True)[0]

    together = torch.func.vmap(trained)(rates)
    for i, rate in enumerate(rates):
        close(
            tree_map(lambda x, i=i: x[i], together), run(chain(kf.kfac(damping=0.1), sgd(rate, 0.9)), refresh=True)[0]
        )


def test_extras_reach_the_inner_transformation():
    def factory(rate):
        def update(updates, state, params=None, *, stats=None, special=0.0):
            return tree_map(lambda u: rate * u + special + stats, updates), state

        return (lambda params: ()), update

    tx = chain(inject_hyperparams(factory)(2.0), inject_hyperparams(add_decayed_weights)(0.5))
    one = torch.tensor(1.0)
    assert tx.update(one, tx.init(one), one, stats=10.0, special=100.0)[0].item() == 112.5
    lazy = inject_hyperparams(lambda s: stateless(lambda u, p: u * s))(3.0)
    assert lazy.update(one, lazy.init(one))[0].item() == 3.0
