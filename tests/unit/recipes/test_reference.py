"""The recipes of the four published codes against loops written out in flat vectors, in the order of the codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import leaves, nodes, ravel
from kfac_func.transforms.norms import ClipByKLState
from tests.unit.transforms.problem import PARAMS, X, Y, close, passed

ROWS = [slice(0, 6), slice(2, 8), slice(1, 5), slice(3, 8)]
DAMPING, DECAY, MOMENTUM, KAPPA = 0.1, 0.2, 0.7, 1e-3
OUTER: dict[str, Any] = {"damping": DAMPING, "momentum": MOMENTUM, "weight_decay": DECAY}
Body = Callable[..., tuple[Tensor, Tensor]]


SCHEDULE = kf.schedules.exponential_decay(0.3, 0.9)


def rate(t: int) -> float:
    return 0.3 * 0.9**t


def loop(first: Any, body: Body, every: int, scale_every: int | None = None) -> list[Tensor]:
    """The steps of `body(P, g, w, buffer, t)`, with the P of all statistics so far, refreshed at t mod every = 0."""
    w, unravel = ravel(PARAMS)
    state, buffer, steps = first.init(PARAMS), torch.zeros_like(w), []
    for t, rows in enumerate(ROWS):
        grads, stats = passed(unravel(w), rows)
        due = {"refresh": t % every == 0, "scale": t % (scale_every or every) == 0}
        state = first.update(grads, state, stats=stats, **due)[1]
        step, buffer = body(lambda g, s=state: ravel(kf.precondition(s, unravel(g)))[0], ravel(grads)[0], w, buffer, t)
        w = w + step
        steps.append(step)
    return steps


def trained(tx: Any) -> tuple[list[Tensor], list[float]]:
    """The steps of a recipe on the same batches, and the factors ν of its clip."""
    params, state, steps, factors = PARAMS, tx.init(PARAMS), [], []
    for rows in ROWS:
        grads, stats = passed(params, rows)
        updates, state = tx.update(grads, state, params, stats=stats)
        params = kf.apply_updates(params, updates)
        steps.append(ravel(updates)[0])
        factors += [float(one.scale) for one in nodes(state, ClipByKLState)]
    return steps, factors


def clipped(v: Tensor, g: Tensor, kappa: float, eta: float) -> Tensor:
    return v * min(1.0, float(kappa / (eta**2 * (v @ g))) ** 0.5)


def thrandis(P: Any, g: Tensor, w: Tensor, buffer: Tensor, t: int, unit: bool = False) -> tuple[Tensor, Tensor]:
    v = P(g)
    v = v / (v @ g).sqrt() if unit else v
    buffer = MOMENTUM * buffer + (v + DECAY * w)
    return -rate(t) * buffer, buffer


def tselepidis(P: Any, g: Tensor, w: Tensor, buffer: Tensor, t: int) -> tuple[Tensor, Tensor]:
    buffer = MOMENTUM * buffer + (clipped(P(g), g, KAPPA, rate(t)) + DECAY * w)
    return -rate(t) * buffer, buffer


def koroko(P: Any, g: Tensor, w: Tensor, buffer: Tensor, t: int) -> tuple[Tensor, Tensor]:
    buffer = MOMENTUM * buffer + (clipped(P(g), g, KAPPA, 1.0) + DECAY * w)
    return -rate(t) * buffer, buffer


def n_gao_regular(P: Any, g: Tensor, w: Tensor, buffer: Tensor, t: int) -> tuple[Tensor, Tensor]:
    buffer = MOMENTUM * buffer + clipped(P(g), g, KAPPA, rate(t))
    return -rate(t) * (buffer + DECAY * w), buffer


def n_gao_adam(P: Any, g: Tensor, w: Tensor, buffer: Tensor, t: int) -> tuple[Tensor, Tensor]:
    buffer = MOMENTUM * buffer + g
    return -rate(t) * (clipped(P(buffer), buffer, KAPPA, rate(t)) + DECAY * w), buffer


def own(make: Callable[..., Any] = kf.kfac, *args: Any, **options: Any) -> Any:
    return make(*args, damping=DAMPING, **options)


def assert_steps(tx: Any, wanted: list[Tensor], clips: bool = True) -> None:
    found, factors = trained(tx)
    close(found, wanted, 1e-9)
    assert len(factors) == clips * len(ROWS)
    assert all(factor < 0.9 for factor in factors)


THRANDIS = {
    "kfac": ({}, own(split="none", decay=0.0, average="constant"), 1),
    "pi, averaged": ({"pi": True, "alpha": 0.3, "update_freq": 2}, own(split="pi", decay=0.7, average="constant"), 2),
    "ekfac": ({"method": "ekfac", "update_freq": 3}, own(kf.ekfac, "intra_batch", decay=0.0, average="constant"), 3),
    "ra": (
        {"method": "ekfac", "ra": True, "update_freq": 2},
        own(kf.ekfac, "mean_gradient", decay=0.75, average="constant"),
        2,
    ),
    "ra, alpha": (
        {"method": "ekfac", "ra": True, "alpha": 0.5},
        own(kf.ekfac, "mean_gradient", decay=0.5, average="constant"),
        1,
    ),
}


@pytest.mark.parametrize("name", THRANDIS)
def test_thrandis(name):
    options, first, every = THRANDIS[name]
    tx = kf.recipes.thrandis(SCHEDULE, **OUTER, **options)
    assert_steps(tx, loop(first, thrandis, every, scale_every=1), clips=False)


def test_thrandis_unit_norm():
    first = own(split="none", decay=0.0)
    tx = kf.recipes.thrandis(SCHEDULE, **OUTER, constraint_norm=True)
    assert_steps(tx, loop(first, lambda *args: thrandis(*args, unit=True), 1), clips=False)


WARM: dict[str, Any] = {"decay": 0.5, "average": "warmup"}
TSELEPIDIS = {
    "symeig": ({}, own(split="exact", **WARM), 100),
    "approx": ({"solver": "approx"}, own(split="pi", **WARM), 100),
    "ekfac": ({"method": "ekfac", "t_scal": 3}, own(kf.ekfac, **WARM), 3),
    "gkfac": (
        {"method": "gkfac", "omega": (0.5, 2.0), "mode": "area"},
        own(kf.two_level_kfac, "tselepidis", form="additive", weights=(0.5, 2.0), split="exact", **WARM),
        100,
    ),
    "gkfac approx": (
        {"method": "gkfac", "solver": "approx"},
        own(kf.two_level_kfac, "tselepidis", form="additive", split="pi", **WARM),
        100,
    ),
}


@pytest.mark.parametrize("name", TSELEPIDIS)
def test_tselepidis(name):
    options, first, scale_every = TSELEPIDIS[name]
    tx = kf.recipes.tselepidis(SCHEDULE, **OUTER, stat_decay=0.5, kl_clip=KAPPA, t_inv=2, **options)
    assert_steps(tx, loop(first, tselepidis, 2, scale_every))


@pytest.mark.parametrize(("kind", "body"), [("regular", n_gao_regular), ("adam", n_gao_adam)])
@pytest.mark.parametrize("pi", [True, False])
def test_n_gao(kind, body, pi):
    structure = kf.curvature.kronecker(centred=True)
    first = own(curvature=structure, split="pi" if pi else "none", decay=0.6)
    options = {"cov_ema_decay": 0.6, "norm_constraint": KAPPA, "center": True, "enable_pi_correction": pi}
    assert_steps(kf.recipes.n_gao(SCHEDULE, **OUTER, **options, momentum_type=kind), loop(first, body, 1))


KOROKO = {
    "kfac": ({}, own(split="none", **WARM)),
    "pi": ({"pi": True}, own(split="pi", **WARM)),
    "kpsvd": ({"method": "kpsvd", "radius": 1}, own(kf.kpsvd, radius=1, split="none", **WARM)),
    "deflation": ({"method": "deflation"}, own(kf.deflation, split="none", **WARM)),
    "corrected": ({"method": "corrected"}, own(kf.corrected, split="none", **WARM)),
    "lanczos": ({"method": "lanczos"}, own(kf.lanczos, split="none", **WARM)),
    "two_level": ({"method": "two_level"}, own(kf.two_level_kfac, split="exact", **WARM)),
    "residual": (
        {"method": "two_level", "coarse_space": "residual", "krylov": True},
        own(kf.two_level_kfac, "residual", krylov=True, split="exact", **WARM),
    ),
    "tselepidis": (
        {"method": "two_level", "coarse_space": "tselepidis"},
        own(kf.two_level_kfac, "tselepidis", form="additive", split="exact", **WARM),
    ),
}


@pytest.mark.parametrize("name", KOROKO)
def test_koroko(name):
    options, first = KOROKO[name]
    tx = kf.recipes.koroko(SCHEDULE, **OUTER, alpha=0.5, t_inv=2, clipping=KAPPA, **options)
    assert_steps(tx, loop(first, koroko, 2))


@pytest.mark.parametrize(("method", "blocks"), [("ng", False), ("ng_bd", True)])
@pytest.mark.parametrize(("heuristic", "rule"), [(False, "standard"), (True, "heuristic")])
def test_koroko_exact_natural_gradients_follow_every_batch(method, blocks, heuristic, rule):
    first = own(kf.exact_natural_gradient, blocks, rule=rule)
    tx = kf.recipes.koroko(SCHEDULE, **OUTER, method=method, heuristic=heuristic, clipping=KAPPA)
    assert_steps(tx, loop(first, koroko, 1))


LINEAR, FIRST = kf.make_functional(torch.nn.Linear(3, 2).double())


def adapted(steps: int = 4, **options: Any) -> tuple[float, Any]:
    """λ after some steps on a problem whose model is exact, and the state."""
    model = kf.quadratic_model(LINEAR, kf.losses.mse())
    run: Any = kf.value_grad_and_stats(LINEAR, kf.losses.mse(), estimator=kf.estimators.exact())
    tx: Any = kf.recipes.n_gao(0.1, damping=0.1, adaptive=model, **options)
    params, state = FIRST, tx.init(FIRST)
    for _ in range(steps):
        _, grads, stats = run(params, (X, Y))
        updates, state = tx.update(grads, state, params, stats=stats, batch=(X, Y))
        params = kf.apply_updates(params, updates)
    (damping,) = leaves(nodes(state, kf.KFacState)[0].damping)
    return float(damping), state


@pytest.mark.parametrize("kind", ["regular", "adam"])
def test_n_gao_adapts_by_the_step_that_was_taken(kind):
    short = {"damping_adaptation_interval": 2, "damping_adaptation_decay": 0.9}
    damping, state = adapted(**short, momentum_type=kind)
    assert abs(float(state.ratio) - 1) < 1e-9
    assert abs(damping - 0.1 * 0.9**4) < 1e-12
    assert abs(adapted(**short, min_damping=0.09)[0] - 0.09) < 1e-12
    assert abs(adapted(steps=5)[0] - 0.1 * 0.99**5) < 1e-12
    ratio = float(adapted(**short, include_damping_in_qmodel_change=True)[1].ratio)
    assert ratio > 1 + 1e-6


def test_without_a_clip_there_is_none():
    for tx in (kf.recipes.koroko(0.1, clipping=None), kf.recipes.n_gao(0.1, damping=0.1)):
        assert nodes(tx.init(PARAMS), ClipByKLState) == []
