"""Cases of `test_errors` for what must not pass in silence: keywords, stored statistics, losses, edges of layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import kfac_func as kf
from kfac_func import errors
from kfac_func.estimators.storing import KINDS, kind_named
from tests.error_cases import Case

FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
STEP: Any = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=kf.estimators.exact())
BATCH = torch.arange(12.0).reshape(4, 3), torch.zeros(4, 2)
STATE = errors.StateError


def homeless() -> None:
    copy.deepcopy(KINDS["base.dense"]._replace(name="mine", rows=lambda x, options: x))


CASES = {
    "a kind of nowhere": Case(homeless, STATE, "'mine'", "right after a step"),
    "a kind of another version": Case(lambda: kind_named("base.sparse", "x"), STATE, "'base.sparse'", "after a step"),
}  # fmt: skip
