"""Cases of `test_errors` for ensembles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import kfac_func as kf
from kfac_func import errors
from tests.error_cases import Case

FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
STEP: Any = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=kf.estimators.exact())
BATCH = torch.arange(12.0).reshape(4, 3), torch.zeros(4, 2)
MANY = {name: torch.stack([leaf, 2 * leaf]) for name, leaf in PARAMS.items()}
STATE = errors.StateError


def ensemble(tx: Any) -> Any:
    """The stacked state of two members after their first step."""

    def first(params: dict) -> Any:
        _, grads, stats = STEP(params, BATCH)
        return tx.update(grads, tx.init(params), stats=stats)[1]

    return torch.func.vmap(first)(MANY)


def scaled(**options: bool) -> None:
    tx = kf.ekfac(scale_every=2)
    stats = STEP(PARAMS, BATCH)[2]
    torch.func.vmap(lambda g, s: tx.update(g, s, stats=stats, refresh=True, **options))(MANY, ensemble(tx))


CASES = {
    "update of an ensemble": Case(
        lambda: kf.kfac().update(MANY, ensemble(kf.kfac())), STATE, "[2] members", "torch.func.vmap over parameters"
    ),
    "observation of an ensemble": Case(
        lambda: kf.observe(ensemble(kf.kfac()), STEP(PARAMS, BATCH)[2]), STATE, "ensemble", "torch.func.vmap"
    ),
    "solve of an ensemble": Case(
        lambda: kf.precondition(ensemble(kf.kfac()), MANY), STATE, "[2] members", "one member"
    ),
    "scalings of an ensemble": Case(scaled, STATE, "whether to scale", "scale=True or scale=False"),
}  # fmt: skip
