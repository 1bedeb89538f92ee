"""Cases of `test_errors` for influence functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import kfac_func as kf
from kfac_func import errors
from tests.error_cases import Case, wrong

FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
BATCH = torch.eye(3), torch.zeros(3, 2)
MSE = kf.losses.mse()
STATE = kf.fit_curvature(FN, MSE, PARAMS, [BATCH])
HYPER, STATE_ERROR = errors.HyperparameterError, errors.StateError


def scores(train: Any = (BATCH,), queries: Any = (BATCH,), state: Any = STATE, **options: Any) -> Callable[[], Any]:
    return lambda: kf.influence.scores(FN, MSE, PARAMS, state, train, queries, **options)


def own(batches: Any = (BATCH,), state: Any = STATE, params: Any = PARAMS, **options: Any) -> Callable:
    return lambda: kf.influence.self_influence(FN, MSE, params, state, batches, **options)


def turned() -> None:
    """A state of x Wᵀ for the model x W."""
    params, batch = {"w": torch.eye(3)}, (torch.eye(3), torch.zeros(3, 3))
    state = kf.fit_curvature(lambda p, x: F.linear(x, p["w"]), MSE, params, [batch])
    kf.influence.self_influence(lambda p, x: x @ p["w"], MSE, params, state, [batch])


DEAD = kf.fit_curvature(FN, MSE, PARAMS, [(torch.zeros(3, 3), BATCH[1])], curvature=kf.curvature.diagonal())
NAN = torch.full((3, 3), float("nan")), BATCH[1]
EMPTY = torch.zeros(0, 3), torch.zeros(0, 2)

CASES = {
    "an iterator": Case(scores(iter([BATCH])), HYPER, "only once", "a list or a loader"),
    "no training batch": Case(scores(()), errors.BatchError, "training examples", "at least one"),
    "no query batch": Case(scores(queries=()), errors.BatchError, "queries", "at least one"),
    "no batch of its own": Case(own(()), errors.BatchError, "training examples", "at least one"),
    "empty": Case(scores((EMPTY,)), errors.BatchError, "[0, 3]", "at least one"),
    "NaN in a training batch": Case(scores((NAN,)), errors.BatchError, "NaN", "the inputs"),
    "NaN in a query": Case(scores(queries=(NAN,)), errors.BatchError, "NaN", "the inputs"),
    "NaN in a target": Case(own(((BATCH[0], NAN[0][:, :2]),)), errors.BatchError, "NaN", "the targets"),
    "no damping": Case(scores(state=DEAD, damping=0.0), HYPER, "no inverse", "0.1 times the mean eigenvalue"),
    "negative damping": Case(own(damping=-1.0), HYPER, "damping", "not negative"),
    "a pattern": Case(own(only=["head*"]), HYPER, "'head*' of only", "mend the pattern"),
    "a route": Case(own(route=wrong("tapes")), HYPER, "'tapes'", "'tape' or 'vmap'"),
    "nothing seen": Case(own(state=kf.kfac().init(PARAMS)), STATE_ERROR, "no statistics", "kf.fit_curvature"),
    "another form": Case(turned, STATE_ERROR, "'w'", "route='vmap'"),
    "other parameters": Case(
        own(params={"v": torch.ones(2)}), errors.TreeMismatchError, "'v'", "value_grad_and_stats was given"
    ),
    "no eigenbasis": Case(
        own(state=kf.fit_curvature(FN, MSE, PARAMS, [BATCH], curvature=kf.curvature.full())),
        STATE_ERROR, "no eigenbasis", "blockwise()",
    ),
}  # fmt: skip
