"""Cases of `test_errors` for Laplace posteriors."""

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
X, Y = torch.eye(3), torch.tensor([0, 1, 1])
SOFTMAX = kf.losses.cross_entropy()
HALF = kf.losses.mse("batchmean", scale=0.5)
HYPER, BATCH, STATE = errors.HyperparameterError, errors.BatchError, errors.StateError
NAN = {name: torch.full_like(leaf, torch.nan) for name, leaf in PARAMS.items()}
POSTERIOR = kf.laplace.fit(FN, SOFTMAX, PARAMS, [(X, Y)])
UNSURE = kf.laplace.Prediction(torch.zeros(1, 2), torch.eye(2)[None])


def fit(loss: Any = SOFTMAX, params: Any = PARAMS, batches: Any = None, fn: Any = FN, **options: Any) -> Callable:
    return lambda: kf.laplace.fit(fn, loss, params, [(X, Y)] if batches is None else batches, **options)


def prior(value: Any, **options: Any) -> Callable:
    return lambda: kf.laplace.with_prior(POSTERIOR, value, **options)


def gated(p: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p["weight"], p["bias"]) * p["gate"].sum()


def unbiased(p: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p["weight"])


GATED = PARAMS | {"gate": torch.ones(2)}

CASES = {
    "an iterator": Case(fit(batches=iter([(X, Y)])), HYPER, "list_iterator", "a list or a loader"),
    "no batch": Case(fit(batches=[]), BATCH, "no batch", "at least one"),
    "NaN in the parameters": Case(fit(params=NAN), BATCH, "batch 0 is not finite", "NaN or infinities"),
    "NaN in new inputs": Case(
        lambda: kf.laplace.predict(POSTERIOR, FN, X * torch.nan), BATCH, "NaN for 3 of 3", "the inputs"
    ),
    "no new inputs": Case(lambda: kf.laplace.predict(POSTERIOR, FN, X[:0]), BATCH, "[0, 3]", "at least one"),
    "an average over outputs": Case(
        fit(kf.losses.mse(), batches=[(X, X[:, :2])]), HYPER, "over 2 terms", "'batchmean' or 'sum'"
    ),
    "noise of a classifier": Case(fit(noise=0.1), HYPER, "½‖z − y‖²", "mse('batchmean', scale=0.5)"),
    "noise of another scale": Case(
        fit(kf.losses.mse("batchmean"), batches=[(X, X[:, :2])], noise=0.1), HYPER, "½‖z − y‖²", "scale=0.5"
    ),
    "noise": Case(fit(HALF, batches=[(X, X[:, :2])], noise=-1.0), HYPER, "noise must be", "got      -1.0"),
    "no noise to change": Case(prior(None, noise=0.1), HYPER, "no noise", "fit(..., noise=...)"),
    "observed with no noise": Case(lambda: kf.laplace.observed(UNSURE, 0.0), HYPER, "noise must be", "got      0.0"),
    "only nothing": Case(fit(only=()), HYPER, "chooses no parameter", "None for all"),
    "only a stranger": Case(fit(only=("head.*",)), HYPER, "'head.*'", "mend the pattern"),
    "identity": Case(
        fit(params=GATED, fn=gated, unclaimed={"gate": "identity"}), HYPER, "'gate'", "unclaimed={'gate': 'diagonal'}"
    ),
    "unclaimed": Case(fit(params=GATED, fn=gated), errors.UncapturedParameterError, "'gate'", "unclaimed={'gate'"),
    "no eigenbasis": Case(fit(curvature=kf.curvature.full()), STATE, "full", "blockwise()"),
    "no prior": Case(prior(0.0), HYPER, "prior_precision must be", "tune_prior_precision"),
    "a negative prior": Case(fit(prior_precision=-1.0), HYPER, "prior_precision must be", "got      -1.0"),
    "a prior that is NaN": Case(
        lambda: kf.laplace.log_marginal_likelihood(POSTERIOR, float("nan")), HYPER, "positive, finite", "got      nan"
    ),
    "several priors": Case(prior(torch.ones(3)), HYPER, "[3]", "vmap for several"),
    "a prior by path": Case(prior({"weight": 0.0}), HYPER, "'weight' must be", "tune_prior_precision"),
    "a prior of a stranger": Case(prior({"head.*": 1.0}), HYPER, "'head.*' of prior_precision", "mend the pattern"),
    "no prior for a block": Case(prior({"[!w]*": 1.0, "*": 1.0}), HYPER, "'[!w]*'", "mend the pattern"),
    "bounds": Case(lambda: kf.laplace.tune_prior_precision(POSTERIOR, bounds=(1.0, 0.1)), HYPER, "bounds", "(1e-8"),
    "steps": Case(lambda: kf.laplace.tune_prior_precision(POSTERIOR, steps=0), HYPER, "steps", "at least 1"),
    "another model": Case(lambda: kf.laplace.predict(POSTERIOR, unbiased, X), STATE, "'weight'", "the same model"),
    "method": Case(
        lambda: kf.laplace.probabilities(UNSURE, wrong("bridge")), HYPER, "'bridge'", "'probit' or 'sampled'"
    ),
    "link": Case(lambda: kf.laplace.probabilities(UNSURE, link=wrong("exp")), HYPER, "'exp'", "'softmax' or 'sigmoid'"),
    "no generator": Case(lambda: kf.laplace.probabilities(UNSURE, "sampled"), HYPER, "no generator", "generator="),
    "samples": Case(
        lambda: kf.laplace.probabilities(UNSURE, "sampled", samples=0), HYPER, "samples", "at least 1"
    ),
    "count": Case(lambda: kf.laplace.sample(POSTERIOR, torch.Generator(), 0), HYPER, "count", "at least 1"),
}  # fmt: skip
