"""Agreement with torch.optim over many steps, and hyper-gradients through whole runs."""

from __future__ import annotations

import pytest
import torch

from kfac_func._errors import HyperparameterError
from kfac_func._tree import leaves, tree_map
from kfac_func.transforms import adam, adamw, apply_updates, sgd
from kfac_func.transforms.schedules import cosine_decay, exponential_decay, multistep

STEPS = 50


GENERATOR = torch.Generator().manual_seed(3)
START = {"w": torch.randn(4, 3, generator=GENERATOR).double(), "b": torch.randn(4, generator=GENERATOR).double()}


def start() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in START.items()}


def objective(params):
    """Curved, not quadratic, with strong coupling of the leaves."""
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
    return (torch.tanh(x @ params["w"].T + params["b"]) - 0.3).square().sum() + 0.1 * params["w"].pow(4).sum()


def displacement(tx, steps=STEPS):
    params = start()
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(torch.func.grad(objective)(params), state, params)
        params = apply_updates(params, updates)
    return tree_map(torch.sub, params, start())


def torch_displacement(make, schedule=None):
    params = {name: value.requires_grad_() for name, value in start().items()}
    optimizer = make(list(params.values()))
    for step in range(STEPS):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule(step).item()
        optimizer.zero_grad()
        objective(params).backward()
        optimizer.step()
    return tree_map(lambda p, p0: p.detach() - p0, params, start())


def t(value):
    return torch.tensor(value, dtype=torch.float64)


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
PEERS = {
    "sgd": (sgd(0.01), lambda p: SGD(p, 0.01)),
    "sgd_momentum": (sgd(0.01, 0.9), lambda p: SGD(p, 0.01, 0.9)),
    "sgd_nesterov": (sgd(0.01, 0.9, nesterov=True), lambda p: SGD(p, 0.01, 0.9, nesterov=True)),
    "sgd_decay": (sgd(0.01, weight_decay=0.1), lambda p: SGD(p, 0.01, weight_decay=0.1)),
    "sgd_all": (
        sgd(0.01, 0.8, nesterov=True, weight_decay=0.1),
        lambda p: SGD(p, 0.01, 0.8, nesterov=True, weight_decay=0.1),
    ),
    "sgd_tensors": (sgd(t(0.01), t(0.8), weight_decay=t(0.1)), lambda p: SGD(p, 0.01, 0.8, weight_decay=0.1)),
    "adam": (adam(0.02), lambda p: ADAM(p, 0.02)),
    "adam_options": (adam(0.02, 0.7, 0.95, 1e-3), lambda p: ADAM(p, 0.02, (0.7, 0.95), 1e-3)),
    "adam_tensors": (adam(t(0.02), t(0.7), t(0.95), t(1e-3)), lambda p: ADAM(p, 0.02, (0.7, 0.95), 1e-3)),
    "adamw": (adamw(0.02, weight_decay=0.5), lambda p: ADAMW(p, 0.02, weight_decay=0.5)),
    "adamw_default": (adamw(0.02), lambda p: ADAMW(p, 0.02, weight_decay=1e-4)),
    "adamw_options": (
        adamw(0.02, 0.7, 0.95, 1e-3, weight_decay=0.1),
        lambda p: ADAMW(p, 0.02, (0.7, 0.95), 1e-3, weight_decay=0.1),
    ),
}


def assert_same_way(ours, theirs):
    for name in theirs:
        assert theirs[name].abs().min() > 1e-6
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), PEERS.values(), ids=PEERS)
def test_goes_the_same_way_as_torch(ours, theirs):
    assert_same_way(displacement(ours), torch_displacement(theirs))


SCHEDULED = {
    "sgd": (sgd, lambda p: SGD(p, 1.0, 0.9), exponential_decay(0.02, 0.95), {"momentum": 0.9}),
    "adam": (adam, lambda p: ADAM(p, 1.0), cosine_decay(0.02, 30, 0.1), {}),
    "adamw": (adamw, lambda p: ADAMW(p, 1.0, weight_decay=0.5), multistep(0.02, {10: 0.5}), {"weight_decay": 0.5}),
}


@pytest.mark.parametrize(("ours", "theirs", "schedule", "options"), SCHEDULED.values(), ids=SCHEDULED)
def test_schedules_start_at_count_zero(ours, theirs, schedule, options):
    assert_same_way(displacement(ours(schedule, **options)), torch_displacement(theirs, schedule))


HYPER = {
    "rate": lambda x: sgd(x, 0.9),
    "momentum": lambda x: sgd(0.01, 10 * x),
    "nesterov": lambda x: sgd(0.01, 10 * x, nesterov=True),
    "decay": lambda x: sgd(0.01, weight_decay=x),
    "schedule": lambda x: sgd(cosine_decay(x, 30)),
    "adam_rate": adam,
    "adam_b1": lambda x: adam(0.01, b1=10 * x),
    "adam_b2": lambda x: adam(0.01, b2=10 * x),
    "adamw_decay": lambda x: adamw(0.01, weight_decay=x),
}


@pytest.mark.parametrize("make", HYPER.values(), ids=HYPER)
def test_hyper_gradients_agree_with_differences(make):
    def outcome(x):
        return torch.cat([leaf.flatten() for leaf in leaves(displacement(make(x), steps=5))]).square().sum()

    x, h = t(0.03), 1e-6
    got = torch.func.grad(outcome)(x)
    assert got.abs() > 1e-7
    torch.testing.assert_close(got, (outcome(x + h) - outcome(x - h)) / (2 * h), rtol=1e-5, atol=1e-10)


def test_adam_differentiates_where_a_gradient_is_zero():
    def moved(rate):
        params = torch.tensor([1.0, 2.0], dtype=torch.float64)
        tx = adam(rate)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params * torch.tensor([1.0, 0.0]), state, params)
            params = apply_updates(params, updates)
        return params

    slope = torch.func.jacrev(moved)(t(0.1))
    assert slope[0].item() < -1
    assert slope[1].item() == 0


def test_ensembles_may_differ_in_their_rates():
    rates = t([0.01, 0.02, 0.05])
    together = torch.func.vmap(lambda rate: displacement(adam(rate), steps=5)["w"])(rates)
    for rate, wanted in zip(rates, together, strict=True):
        torch.testing.assert_close(displacement(adam(rate.item()), steps=5)["w"], wanted, rtol=1e-12, atol=1e-12)


def test_plain_descent_needs_no_params():
    tx = sgd(0.5, momentum=0.9)
    assert tx.update(torch.ones(2), tx.init(torch.ones(2)))[0].tolist() == [-0.5, -0.5]


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(HyperparameterError, match="nesterov needs momentum"):
        sgd(0.1, nesterov=True)
    sgd(0.1, momentum=torch.tensor(0.0), nesterov=True)
