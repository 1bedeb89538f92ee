"""300 cases of the fuzzer; a seed gives one case whatever ran before; what is made wrong on purpose is found."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

import kfac_func as kf
from tests.fuzz.cases import case
from tests.fuzz.dying import dying
from tests.fuzz.report import report
from tests.fuzz.trees import flat, mapped
from tests.fuzz.verdicts import FAILURES, Verdict, judged
from tests.fuzz.workers import run

# The cases come in values of all types, and the checks of types would be most of their time.
pytestmark = pytest.mark.usefixtures("unchecked")

CASES, BLOCK = 300, 25  # half of them hostile
REFUSED = 0.35  # of harmless checks, at most

steps, kronecker = import_module("kfac_func.estimators.statistics"), import_module("kfac_func.curvature.kronecker")


def failures(verdicts: list[Verdict]) -> list[Verdict]:
    return [v for v in verdicts if v.kind in FAILURES]


@pytest.mark.parametrize("start", range(0, CASES, BLOCK))
def test_cases(start):
    verdicts = [v for seed in range(start, start + BLOCK) for v in judged(seed, hostile=bool(start // BLOCK % 2))]
    assert not failures(verdicts), report(verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("hostile", [False, True])
def test_twenty_thousand_cases(hostile):
    verdicts = run(range(10_000), hostile, workers=2)
    assert not failures(verdicts), report(verdicts)


def test_harmless_models_are_seldom_refused():
    verdicts = [v for seed in range(1000, 1040) for v in judged(seed, checks=("gradient",))]
    assert sum(v.kind == "refused" for v in verdicts) <= REFUSED * len(verdicts), report(verdicts)


@pytest.mark.parametrize("hostile", [False, True])
def test_a_seed_gives_one_case(hostile):
    for seed in range(8):
        one = case(seed, hostile)
        torch.rand(3)
        two = case(seed, hostile)
        assert one.names == two.names
        assert all(map(torch.equal, flat(one.problem.params).values(), flat(two.problem.params).values()))
        assert torch.equal(one.problem.targets, two.problem.targets)


def test_verdicts_do_not_depend_on_what_ran_before():
    once = [judged(seed, hostile=True) for seed in (3, 4, 5)]
    again = [judged(seed, hostile=True) for seed in (5, 4, 3)]
    assert [v._replace(trace="") for vs in once for v in vs] == [v._replace(trace="") for vs in again[::-1] for v in vs]


# --------------------------------------------------------------------------------- what is wrong on purpose is found


def off(found: dict[str, Any]) -> dict[str, Any]:
    """One gradient one percent too large."""
    return {path: 1.01 * leaf if k == 0 else leaf for k, (path, leaf) in enumerate(found.items())}


def scaled_gradient(true: Callable) -> Callable:
    return lambda *given: off(true(*given))


def lost_use(true: Callable) -> Callable:
    return lambda layout, uses, shapes: true(layout, uses[:1], shapes)


def swapped(true: Callable) -> Callable:
    def state(*given: Any) -> Any:
        one = true(*given)
        fits = isinstance(one.a, torch.Tensor) and isinstance(one.g, torch.Tensor) and one.a.shape == one.g.shape
        return one._replace(a=one.g, g=one.a) if fits else one

    return state


def forgotten_n(true: Callable) -> Callable:
    return lambda loss, n: 2 * true(loss, n)


def reordered(true: Callable) -> Callable:
    def made(*given: Any, **options: Any) -> Callable:
        grads = true(*given, **options)
        return lambda *batch: mapped(grads(*batch), lambda leaf: leaf.flip(0))

    return made


MUTATIONS: dict[str, tuple[Any, str, Callable[[Callable], Callable], str, range]] = {
    "a gradient is off": (steps, "gradients", scaled_gradient, "gradient", range(12)),
    "a use is lost": (steps, "gradients", lost_use, "gradient", range(60)),
    "A and G are swapped": (kronecker, "kronecker_state", swapped, "K-FAC of one example", range(250)),
    "1/N is forgotten": (steps, "example_weight", forgotten_n, "diagonal", range(20)),
    "examples are in another order": (kf.products, "per_example_grads", reordered, "per_example_grads", range(20)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_defect_is_found(name, monkeypatch):
    where, what, mutate, check, seeds = MUTATIONS[name]
    seeds = [seed for seed in seeds if check != "K-FAC of one example" or case(seed, False).examples == 1]
    before = [v for seed in seeds for v in judged(seed, checks=(check,))]
    assert all(v.kind != "wrong" for v in before)
    monkeypatch.setattr(where, what, mutate(getattr(where, what)))
    found = [v for seed in seeds for v in judged(seed, checks=(check,)) if v.kind == "wrong"]
    assert found
    assert report(before + found).count("wrong") > 2


def test_a_process_that_dies_costs_one_verdict():
    verdicts = run(range(5), False, 2, dying)
    assert [v.seed for v in verdicts] == list(range(5))
    assert [v.kind for v in verdicts] == ["right", "right", "raw", "right", "right"]
