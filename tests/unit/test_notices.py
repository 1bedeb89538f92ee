"""What a run is told once, and what it is not told."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import kfac_func as kf
from kfac_func._tree import tree_map
from kfac_func.precondition.notices import PATIENCE, UNSEEN

C = kf.curvature
FN, PARAMS = kf.make_functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
STEP = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=kf.estimators.exact())
NOTICES = sys.modules["kfac_func.precondition.notices"]


def seen(bad: bool = False) -> Any:
    """(gradients, statistics) of a batch."""
    x = torch.full((5, 3), torch.nan) if bad else torch.ones(5, 3)
    _, grads, stats = STEP(PARAMS, (x, torch.zeros(5, 2)))
    return tree_map(torch.nan_to_num, grads), stats


GOOD, BAD = seen(), seen(bad=True)


def told(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert all(w.category is kf.errors.KFacWarning for w in caught)
    return [str(w.message).splitlines()[0] for w in caught]


def updates(tx: Any, *batches: Any) -> list[str]:
    def run() -> None:
        state = tx.init(PARAMS)
        for grads, stats in batches:
            _, state = tx.update(grads, state, PARAMS, stats=stats)

    return told(run)


@pytest.mark.parametrize("make", [kf.kfac, kf.ekfac, lambda: kf.chain(kf.kfac(), kf.sgd(0.1))])
def test_a_state_that_never_saw_statistics(make):
    plain = (GOOD[0], None)
    assert updates(make(), *[plain] * UNSEEN) == []
    (message,) = updates(make(), *[plain] * 3 * UNSEEN)
    assert f"made {UNSEEN} updates and never seen statistics" in message
    assert updates(make(), *[plain] * (UNSEEN - 1), GOOD, *[plain] * 3 * UNSEEN) == []
    assert updates(make(), GOOD, *[plain] * 3 * UNSEEN) == []


def test_a_state_that_observes_is_not_told_so():
    tx = kf.kfac()

    def run() -> None:
        state = kf.observe(tx.init(PARAMS), GOOD[1])
        for _ in range(3 * UNSEEN):
            _, state = tx.update(GOOD[0], state)

    assert told(run) == []


def test_several_batches_in_a_row_that_are_rejected():
    few, many = [BAD] * (PATIENCE - 1), [BAD] * (3 * PATIENCE)
    for tx in (kf.kfac(), kf.chain(kf.ekfac(), kf.sgd(0.1))):
        assert updates(tx, *few, GOOD, *few, GOOD, *few) == []
        (first,) = updates(tx, *many)
        assert f"all of the first {PATIENCE} batches are not finite" in first
        (later,) = updates(tx, GOOD, *many)
        assert f"the last {PATIENCE} batches are not finite" in later
        assert updates(tx, GOOD, GOOD) == []


def test_the_same_for_observe():
    def run() -> None:
        state = kf.kfac().init(PARAMS)
        for _ in range(3 * PATIENCE):
            state = kf.observe(state, BAD[1])

    assert len(told(run)) == 1


def test_nothing_is_said_where_nothing_can_be_read():
    tx = kf.kfac(refresh_every=1)

    def member(params: Any) -> Any:
        state = tx.init(params)
        for _ in range(2 * PATIENCE):
            _, grads, stats = STEP(params, (torch.full((5, 3), torch.nan), torch.zeros(5, 2)))
            _, state = tx.update(grads, state, stats=stats)
        return state.rejected

    stacked = {name: torch.stack([leaf, leaf]) for name, leaf in PARAMS.items()}
    assert told(lambda: torch.func.vmap(member)(stacked)) == []


WIDTHS: dict[str, Any] = {
    "kronecker": (C.kronecker(), ["'0.weight' (4 rows)", "'2.weight' (5 rows)"]),
    "eigen": (C.eigen(), ["'0.weight' (4 rows)", "'2.weight' (5 rows)"]),
    "corrected": (C.corrected(), ["'0.weight' (4 rows)", "'2.weight' (5 rows)"]),
    "two_level": (C.two_level(C.kronecker()), ["'0.weight' (4 rows)", "'2.weight' (5 rows)"]),
    "by_path": (C.by_path({"0.*": C.diagonal(), "**": C.kronecker()}), ["'2.weight' (5 rows)"]),
    "max_dim": (C.kronecker(max_dim=2), []),
    "diagonal": (C.diagonal(), []),
    "inverse_free": (C.inverse_free(), []),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_wide_dense_factors(name, monkeypatch):
    curvature, wanted = WIDTHS[name]
    monkeypatch.setattr(NOTICES, "WIDE", 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tx = kf.kfac(curvature, refresh_every=1)
        state = tx.init(PARAMS)
        for grads, stats in (GOOD, GOOD, GOOD):
            _, state = tx.update(grads, state, stats=stats)
    got = [str(w.message).splitlines()[1].split("got", 1)[1].strip() for w in caught]
    assert got == ([", ".join(wanted)] if wanted else [])
    assert all("max_dim=" in str(w.message) for w in caught)
    monkeypatch.setattr(NOTICES, "WIDE", 5)
    assert updates(kf.kfac(curvature), GOOD) == []


def test_wide_factors_of_a_data_set(monkeypatch):
    monkeypatch.setattr(NOTICES, "WIDE", 3)
    batch = torch.ones(5, 3), torch.zeros(5, 2)
    assert len(told(lambda: kf.fit_curvature(FN, kf.losses.mse(), PARAMS, [batch]))) == 1


def test_a_warning_is_about_the_line_of_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tx = kf.kfac()
        state = tx.init(PARAMS)
        for _ in range(UNSEEN + 1):
            _, state = tx.update(GOOD[0], state)
    assert len(caught) == 1
    assert not any("kfac_func" in part for part in caught[0].filename.split("/")[-2:-1])
