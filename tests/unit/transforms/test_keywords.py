"""A keyword that nothing takes is refused, wherever the transformation that would take it is; all others arrive."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import kfac_func as kf
from kfac_func._errors import HyperparameterError, KeywordError
from kfac_func.transforms import (
    GradientTransformation,
    apply_if_finite,
    chain,
    identity,
    inject_hyperparams,
    masked,
    multi_steps,
    named_chain,
    partition,
    reduce_on_plateau,
    scale,
    sgd,
    stateless,
    trace,
)
from tests.unit.transforms.problem import PARAMS, passed

GRADS, STATS = passed()
PLATEAU = reduce_on_plateau()

AROUND = {
    "alone": lambda tx: tx,
    "chain": lambda tx: chain(tx, sgd(0.1)),
    "nested": lambda tx: chain(sgd(0.1), chain(chain(tx))),
    "named": lambda tx: named_chain(("a", tx), ("b", sgd(0.1))),
    "masked": lambda tx: masked(tx, "*"),
    "partition": lambda tx: partition({"a": tx, "b": sgd(0.1)}, {"0.*": "a", "*": "b"}),
    "partition in a chain": lambda tx: chain(partition({"a": sgd(0.1), "b": tx}, {"0.*": "b", "*": "a"})),
    "several calls": lambda tx: multi_steps(tx, 2),
    "finite": lambda tx: apply_if_finite(tx, 2),
    "injected": lambda tx: inject_hyperparams(lambda rate: chain(tx, scale(rate)))(0.1),
    "deep": lambda tx: chain(masked(multi_steps(apply_if_finite(chain(tx), 2), 1), "*"), trace(0.9)),
    "beside a foreign one": lambda tx: chain((lambda p: (), lambda u, s, params=None: (u, s)), tx),
    "beside one that only counts": lambda tx: chain((lambda p: (), lambda u, s: (u, s)), tx),
}
each_place = pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)


def call(tx: Any, **keywords: Any) -> Any:
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, **keywords)


@each_place
def test_a_misspelt_keyword_is_refused_with_the_nearest_one(around):
    with pytest.raises(KeywordError, match=r"got valeu=(.|\n)*wanted .*value(.|\n)*value=, if that was meant"):
        call(around(PLATEAU), value=1.0, valeu=1.0)
    tx = around(kf.kfac())
    if around is not AROUND["alone"]:
        with pytest.raises(KeywordError, match=r"got stat=(.|\n)*refresh(.|\n)*stats=, if"):
            call(tx, stat=STATS)


@each_place
def test_what_is_inside_may_be_named(around):
    call(around(PLATEAU), value=1.0, stats=STATS, inplace=True)
    tx = around(kf.kfac())
    call(tx, stats=STATS, refresh=True, scale=False)


def test_the_error_may_be_caught_as_a_type_error():
    for kind in (TypeError, HyperparameterError):
        with pytest.raises(kind, match="stat="):
            call(chain(kf.kfac(), sgd(0.1)), stat=STATS)


def test_several_at_once_and_none_that_is_near():
    with pytest.raises(KeywordError) as caught:
        call(sgd(0.1), zzz=1, pramas=2)
    assert "zzz=, pramas=" in str(caught.value)
    assert "wanted   params or stats" in str(caught.value)
    assert "options  params=, if that was meant" in str(caught.value)
    with pytest.raises(KeywordError, match="options  name it in the signature"):
        call(sgd(0.1), zzz=1)


def test_the_stars_of_a_foreign_function_take_anything():
    seen = []

    def update(updates, state, params=None, *, trail=None, **keywords):
        seen.append(keywords)
        return updates, state

    call(chain(identity(), ((lambda params: ()), update)), own=1)
    assert seen == [{"own": 1, "stats": None, "inplace": False}]
    own = GradientTransformation(lambda params: (), update)
    with pytest.raises(KeywordError, match="own="):
        call(chain(own), own=1)


def test_what_is_called_in_a_chain_was_checked_there():
    def through(inner):
        def update(updates, state, params=None, *, value=None, refresh=None, **extra):
            return inner.update(updates, state, params, value=value, refresh=refresh, **extra)

        return GradientTransformation(inner.init, update)

    tx = chain(through(chain(stateless(lambda updates, params: updates))))
    assert torch.equal(call(tx, value=1.0)[0]["0.bias"], GRADS["0.bias"])


def test_the_two_phases_of_a_damping_that_adapts():
    tx = kf.adapt_damping(chain(kf.kfac(), sgd(0.1)))
    state = tx.init(PARAMS)
    for call in (tx.propose, tx.update):
        with pytest.raises(KeywordError, match=rf"{call.__name__} got stat=(.|\n)*batch(.|\n)*refresh"):
            call(GRADS, state, PARAMS, stat=STATS)
    tx.propose(GRADS, state, PARAMS, stats=STATS, refresh=True)
    with pytest.raises(KeywordError, match="stat="):
        chain(tx).update(GRADS, (state,), PARAMS, stat=STATS)


def test_signatures_stay_readable():
    assert list(inspect.signature(multi_steps(sgd(0.1), 2).update).parameters)[:3] == ["updates", "state", "params"]
