"""The options of the recipes of the four published codes: each has a say, its period, and what it cannot go with."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest

import kfac_func as kf
from kfac_func._errors import HyperparameterError
from kfac_func._tree import leaves
from kfac_func.precondition import transform
from tests.unit.transforms.problem import PARAMS, passed
from tests.zoo import CASES, close, run

CASE = CASES["conv"]
BATCHES = [run(CASE._replace(inputs=c * CASE.inputs + c))[2] for c in (1.0, 0.7, 1.6)] * 2
GRADS = run(CASE)[1]
MODEL = kf.quadratic_model(CASE.fn, CASE.loss)
R = kf.recipes
ADAPTIVE = {"adaptive": MODEL, "damping_adaptation_interval": 2}
OUTER = {"momentum": 0.5, "weight_decay": 0.3}
CHANGED: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (R.thrandis, {}, {"method": "ekfac", "sua": True, "pi": True, "alpha": 0.3, "constraint_norm": True, **OUTER}),
    (R.thrandis, {"alpha": 0.5}, {"update_freq": 4, "alpha": 0.6, "damping": 0.3, "learning_rate": 0.2}),
    (R.thrandis, {"method": "ekfac"}, {"sua": True, "ra": True, "update_freq": 4}),
    (R.thrandis, {"method": "ekfac", "ra": True}, {"alpha": 0.3, "sua": True, "update_freq": 4}),
    (R.tselepidis, {"t_inv": 2}, {"method": "ekfac", "stat_decay": 0.3, "damping": 0.3, "kl_clip": 1e-5, "t_inv": 4}),
    (R.tselepidis, {}, {"solver": "approx", **OUTER}),
    (R.tselepidis, {"weight_decay": 0.1}, {"learning_rate": 0.2}),  # without it an active clip decides the length
    (R.tselepidis, {"method": "ekfac", "t_inv": 2}, {"t_scal": 2, "stat_decay": 0.3, "method": "gkfac"}),
    (R.tselepidis, {"method": "gkfac"}, {"omega": (1.0, 2.0), "mode": "area", "solver": "approx"}),
    (R.n_gao, {}, {"cov_ema_decay": 0.5, "norm_constraint": 1e-3, "center": True, "enable_pi_correction": False}),
    (R.n_gao, {}, {"learning_rate": 0.2, "damping": 0.3, "momentum_type": "adam", **OUTER}),
    (R.n_gao, {"norm_constraint": 1e-3}, {"norm_constraint": 1e-4}),
    (R.n_gao, {"momentum_type": "adam"}, {"momentum": 0.5}),
    (R.n_gao, {}, {"adaptive": MODEL}),
    (R.n_gao, ADAPTIVE, {"damping_adaptation_interval": 3, "damping_adaptation_decay": 0.5, "min_damping": 0.3}),
    (R.koroko, {"t_inv": 2}, {"alpha": 0.3, "t_inv": 4, "pi": True, "damping": 0.3, "clipping": None}),
    (R.koroko, {}, {"learning_rate": 0.2, "clipping": 1e-4, **OUTER}),
    (R.koroko, {}, {"method": ("kpsvd", "deflation", "corrected", "lanczos", "two_level", "ng", "ng_bd")}),
    *((R.koroko, {"method": method}, {"radius": 0}) for method in ("kpsvd", "deflation", "corrected", "lanczos")),
    (R.koroko, {"method": "kpsvd"}, {"pi": True}),
    (R.koroko, {"method": "two_level"}, {"coarse_space": ("residual", "spectral", "tselepidis"), "krylov": True}),
    *((R.koroko, {"method": method}, {"heuristic": True, "t_inv": 4}) for method in ("ng", "ng_bd")),
]
ONE_BY_ONE = [
    pytest.param(index, {name: value}, id=f"{make.__name__}-{'-'.join(map(str, given))}-{name}-{value}"[:60])
    for index, (make, given, changed) in enumerate(CHANGED)
    for name, values in changed.items()
    for value in (values if name in ("method", "coarse_space") and isinstance(values, tuple) else (values,))
]


def last(make: Any, **options: Any) -> list[Any]:
    """The last of several updates, on batches that differ."""
    tx: Any = make(**{"learning_rate": 0.1, "damping": 0.1, **options})
    updates, state = GRADS, tx.init(CASE.params)
    more = {"batch": CASE.batch} if options.get("adaptive") is not None else {}
    for stats in BATCHES:
        updates, state = tx.update(GRADS, state, CASE.params, stats=stats, **more)
    return leaves(updates)


@cache
def base(index: int) -> list[Any]:
    make, given, _ = CHANGED[index]
    return last(make, **given)


@pytest.mark.parametrize(("index", "changed"), ONE_BY_ONE)
def test_every_option_changes_the_updates(index, changed):
    make, given, _ = CHANGED[index]
    found = last(make, **{**given, **changed})
    assert not all(close(x, y, 1e-7) for x, y in zip(base(index), found, strict=True))


def test_no_option_is_left_out():
    """Whether λ is inside the model moves ρ: that one is in `test_reference`."""
    seen: dict[Any, set[str]] = {make: set() for make, *_ in CHANGED}
    for make, _, changed in CHANGED:
        seen[make] |= set(changed)
    seen[R.n_gao].add("include_damping_in_qmodel_change")
    assert seen == {make: set(inspect.signature(make).parameters) for make in seen}
    assert len(seen) == 4


DUE = [
    (kf.recipes.thrandis, {"damping": 0.1, "update_freq": 3}, 3),
    (kf.recipes.thrandis, {"damping": 0.1, "update_freq": 4, "method": "ekfac"}, 4),
    (kf.recipes.tselepidis, {"t_inv": 5}, 5),
    (kf.recipes.tselepidis, {"t_inv": 4, "method": "gkfac"}, 4),
    (kf.recipes.tselepidis, {}, 100),
    (kf.recipes.n_gao, {"damping": 0.1}, 1),
    (kf.recipes.koroko, {"t_inv": 3}, 3),
    (kf.recipes.koroko, {}, 100),
    (kf.recipes.koroko, {"method": "ng", "t_inv": 2}, 2),
    (kf.recipes.koroko, {"method": "ng_bd"}, 1),
]


@pytest.mark.parametrize(("make", "options", "every"), DUE)
@pytest.mark.parametrize("t_cov", [1, 4])
def test_a_refresh_every_so_many_updates_from_the_start(make, options, every, t_cov, monkeypatch):
    refreshed, at = transform.refreshed, []
    monkeypatch.setattr(
        transform, "refreshed", lambda state, *due: at.append(int(state.step)) or refreshed(state, *due)
    )
    tx, (grads, stats) = make(0.1, **options), passed()
    state = tx.init(PARAMS)
    for t in range(14):
        state = tx.update(grads, state, PARAMS, stats=stats if t % t_cov == 0 else None)[1]
    assert at == list(range(0, 14, every))


@pytest.mark.parametrize(("t_scal", "wanted"), [(None, [0, 10]), (4, [0, 4, 8, 12])])
def test_scalings_have_their_own_period(t_scal, wanted):
    tx, (grads, stats) = kf.recipes.tselepidis(0.1, method="ekfac", t_scal=t_scal), passed()
    state, at = tx.init(PARAMS), []
    for t in range(14):
        before = int(state[0].scaled)
        state = tx.update(grads, state, PARAMS, stats=stats)[1]
        at += [t] * (int(state[0].scaled) - before)
    assert at == wanted


REFUSED = [
    (kf.recipes.thrandis, {"method": "ekfac", "pi": True}, "pi"),
    (kf.recipes.thrandis, {"method": "ekfac", "constraint_norm": True}, "constraint_norm"),
    (kf.recipes.thrandis, {"method": "ekfac", "alpha": 0.5}, "alpha"),
    (kf.recipes.thrandis, {"method": "kfac", "ra": True}, "ra"),
    *((kf.recipes.tselepidis, {"method": method, "t_scal": 5}, "t_scal") for method in ("kfac", "gkfac")),
    *((kf.recipes.tselepidis, {"method": method, "omega": (1.0, 2.0)}, "omega") for method in ("kfac", "ekfac")),
    *((kf.recipes.tselepidis, {"method": method, "mode": "area"}, "mode") for method in ("kfac", "ekfac")),
    (kf.recipes.tselepidis, {"method": "ekfac", "solver": "approx"}, "solver"),
    *(
        (kf.recipes.n_gao, {"adaptive": None, name: value}, name)
        for name, value in {
            "damping_adaptation_decay": 0.9,
            "damping_adaptation_interval": 2,
            "include_damping_in_qmodel_change": True,
            "min_damping": 1e-3,
        }.items()
    ),
    *((kf.recipes.koroko, {"method": method, "pi": True}, "pi") for method in ("two_level", "deflation", "ng")),
    *((kf.recipes.koroko, {"method": method, "krylov": True}, "krylov") for method in ("kfac", "ng_bd")),
    (kf.recipes.koroko, {"method": "kpsvd", "coarse_space": "residual"}, "coarse_space"),
    *((kf.recipes.koroko, {"method": method, "radius": 1}, "radius") for method in ("kfac", "two_level", "ng")),
    *((kf.recipes.koroko, {"method": method, "heuristic": True}, "heuristic") for method in ("kfac", "two_level")),
    *((kf.recipes.koroko, {"method": method, "alpha": 0.5}, "alpha") for method in ("ng", "ng_bd")),
]


@pytest.mark.parametrize(("make", "options", "name"), REFUSED)
def test_options_that_contradict_each_other_are_named(make, options, name):
    setting = next(f"{key}={value!r}" for key, value in options.items())
    with pytest.raises(HyperparameterError, match=rf"^{name} and {setting}[^\n]* contradict each other.\n"):
        make(0.1, **{"damping": 0.1, **options})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (kf.recipes.thrandis, "method"),
        (kf.recipes.tselepidis, "method"),
        (kf.recipes.tselepidis, "solver"),
        (kf.recipes.n_gao, "momentum_type"),
        (kf.recipes.koroko, "method"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_unknown_names_are_refused(make, name):
    with pytest.raises(HyperparameterError, match=rf"^unknown {name}\.\n  got     'lu'\n  wanted  '"):
        make(0.1, **{"damping": 0.1, name: "lu"})
