"""Cases of `test_errors` for step-size control and the recipes that are more than a curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kfac_func as kf
from kfac_func import errors
from tests.error_cases import Case, wrong

FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
BATCH = torch.ones(4, 3), torch.zeros(4, 2)
MSE = kf.losses.mse()
MODEL = kf.quadratic_model(FN, MSE)
HYPER, MISMATCH, STATE = errors.HyperparameterError, errors.TreeMismatchError, errors.StateError


def updated(tx: Any, **extras: Any) -> Callable[[], Any]:
    """One update that lacks something."""
    return lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extras)


def accepted() -> None:
    tx = kf.adapt_damping(kf.kfac(), kf.levenberg_marquardt(interval=1), model=MODEL)
    tx.accept(*tx.propose(PARAMS, tx.init(PARAMS), PARAMS, batch=BATCH), before=1.0)


def ensemble() -> None:
    auto = kf.kfac_auto(FN, MSE)
    many = {name: torch.stack([p, p]) for name, p in PARAMS.items()}
    torch.func.vmap(lambda p, s: auto.step(p, s, BATCH)[0])(many, torch.func.vmap(auto.init)(many))


EVERY = kf.levenberg_marquardt(interval=1)
LAST = kf.scale_by_quadratic_model(MODEL)
PLAIN, FIXED = kf.adapt_damping(kf.kfac(), EVERY), kf.adapt_damping(kf.chain(kf.kfac(), LAST), EVERY)

CASES = {
    "calibration without a model": Case(
        lambda: kf.adapt_damping(kf.kfac(), calibrate=True), HYPER, "calibrate=True and model=None", "model=quadratic_"
    ),
    "adapted schedule": Case(
        lambda: kf.adapt_damping(kf.kfac(damping=lambda t: 0.1)).init(PARAMS), HYPER, "scheduled damping", "a number"
    ),
    "adapted tensor": Case(
        lambda: kf.adapt_damping(kf.kfac(damping={"**": torch.tensor(0.1)})).init(PARAMS), HYPER, "damping", "a number"
    ),
    "nothing adapted": Case(updated(kf.adapt_damping(kf.sgd(0.1))), STATE, "no K-FAC state", "kfac()"),
    "nothing foretells": Case(updated(PLAIN), HYPER, "foretells the loss", "model=quadratic_model(fn, loss)"),
    "no value_fn": Case(updated(FIXED, batch=BATCH), HYPER, "needs value_fn", "value_fn=lambda params"),
    "one loss": Case(accepted, HYPER, "needs after", "accept(updates, proposal, after=...)"),
    "no batch to foretell": Case(
        updated(kf.adapt_damping(kf.kfac(), EVERY, model=MODEL)), HYPER, "needs batch", "update(..., batch=...)"
    ),
    "decay of the rule": Case(lambda: kf.levenberg_marquardt(decay=1.0), HYPER, "decay", "(0, 1)"),
    "interval of the rule": Case(lambda: kf.levenberg_marquardt(0), HYPER, "interval", "at least 1"),
    "thresholds": Case(lambda: kf.levenberg_marquardt(low=0.9, high=0.1), HYPER, "low and high", "high=0.1"),
    "bounds": Case(lambda: kf.levenberg_marquardt(min=1.0, max=0.1), HYPER, "min and max", "max=0.1"),
    "model: l2": Case(lambda: kf.quadratic_model(FN, MSE, l2=-1.0), HYPER, "l2", "not negative"),
    "model: mask": Case(lambda: kf.quadratic_model(FN, MSE, mask="w*"), HYPER, "mask and l2", "leave out the mask"),
    "model: examples": Case(lambda: kf.quadratic_model(FN, MSE, examples=0), HYPER, "examples", "a float in (0, 1]"),
    "model: directions": Case(
        lambda: MODEL.form(PARAMS, BATCH, [{"v": torch.ones(2)}], PARAMS), MISMATCH, "'v' of shape [2]", "pass trees"
    ),
    "both fixed": Case(
        lambda: kf.scale_by_quadratic_model(MODEL, learning_rate=0.1, momentum=0.9),
        HYPER, "learning_rate and momentum", "fix one of them",
    ),
    "no batch": Case(updated(kf.chain(kf.kfac(), LAST)), HYPER, "needs batch", "batch=(inputs, targets)"),
    "no gradient": Case(updated(LAST, batch=BATCH), HYPER, "needs gradient", "put it in a chain"),
    "no params": Case(
        lambda: kf.chain(LAST).update(PARAMS, kf.chain(LAST).init(PARAMS), batch=BATCH),
        HYPER, "needs params", "update(updates, state, params",
    ),
    "kfac_auto under vmap": Case(ensemble, STATE, "kfac_auto", "pass generator="),
    "method": Case(lambda: kf.recipes.koroko(0.1, method=wrong("ekfac")), HYPER, "'ekfac'", "'ng' or 'ng_bd'"),
    "options of another method": Case(
        lambda: kf.recipes.tselepidis(method="gkfac", t_scal=5), HYPER, "t_scal and method='gkfac'", "leave out t_scal"
    ),
}  # fmt: skip
