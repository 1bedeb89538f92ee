"""Three independent periods: how often statistics come, refreshes and scalings happen; and whose turn a refresh is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import kfac_func as kf
from kfac_func._tree import leaves
from kfac_func.precondition.periods import dealt
from tests.zoo import CASES, run, subset

FN, PARAMS = kf.make_functional(nn.Linear(2, 1).double())
STEP: Any = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=kf.estimators.exact())
_, GRADS, STATS = STEP(PARAMS, (torch.eye(2).double(), torch.ones(2, 1).double()))
UPDATES = 250


class Counted:
    """EKFAC that counts what is asked of it."""

    def __init__(self) -> None:
        plain = kf.curvature.blockwise(kf.curvature.eigen())
        self.calls: dict[str, int] = dict.fromkeys(("absorb", "refresh", "scale"), 0)
        self.curvature = plain._replace(**{name: self._counted(name, getattr(plain, name)) for name in self.calls})

    def _counted(self, name: str, fn: Callable) -> Callable:
        def counted(*args: Any) -> Any:
            self.calls[name] += 1
            return fn(*args)

        return counted


def others(seed: int) -> Iterator[str]:
    """What else happens between two updates: statistics that are only absorbed, and directions that are only asked."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield ("observe", "precondition", "nothing", "nothing")[int(torch.randint(4, (), generator=draw))]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("t_cov", "offset", "t_inv", "t_scal"),
    [(1, 0, 1, 1), (1, 0, 10, 5), (10, 0, 100, 10), (10, 3, 7, 10), (2, 1, 4, 2), (7, 0, 3, 5), (50, 9, 64, 20)],
)
def test_counts_over_250_updates(t_cov, offset, t_inv, t_scal, interleaved):
    """Whatever happens in between, refreshes fall on the multiples of T_inv, and every multiple of T_scal is served by
    the first update with statistics from there on: no two periods can miss each other for good.
    """
    counted, between = Counted(), others(t_cov + t_inv)
    tx = kf.kfac(counted.curvature, refresh_every=t_inv, scale_every=t_scal, growing=False)
    state, seen = tx.init(PARAMS), 0
    with_stats = range(offset, UPDATES, t_cov)
    for k in range(UPDATES):
        _, state = tx.update(GRADS, state, stats=STATS if k in with_stats else None)
        extra = next(between) if interleaved and k >= offset else "nothing"
        if extra == "observe":
            state = kf.observe(state, STATS, refresh=False)
            seen += 1
        elif extra == "precondition":
            kf.precondition(state, GRADS)
    refreshes = {offset} | {k for k in range(0, UPDATES, t_inv) if k >= offset}
    multiples = [k for k in range(0, UPDATES, t_scal) if k <= with_stats[-1]]
    scalings = {offset} | {min(k for k in with_stats if k >= m) for m in multiples}
    assert counted.calls == {"absorb": len(with_stats) + seen, "refresh": len(refreshes), "scale": len(scalings)}
    assert (int(state.step), int(state.observed), int(state.scaled)) == (UPDATES, len(with_stats) + seen, len(scalings))
    assert interleaved == (seen > 20)


def test_growth_is_an_option():
    at: dict[bool, list[int]] = {}
    for growing in (True, False):
        counted = Counted()
        tx, at[growing] = kf.kfac(counted.curvature, refresh_every=3, growing=growing), []
        state = tx.init(PARAMS)
        for k in range(13):
            before = counted.calls["refresh"]
            _, state = tx.update(GRADS, state, stats=STATS)
            at[growing] += [k] * (counted.calls["refresh"] - before)
    assert at == {True: [0, 1, 2, 4, 6, 9, 12], False: [0, 3, 6, 9, 12]}


def test_a_step_back_in_time_is_a_step_back():
    """The count is part of the state: an old state refreshes as it did the first time."""
    tx = kf.kfac(refresh_every=3, growing=False)
    state, states = tx.init(PARAMS), []
    for _ in range(7):
        states.append(state)
        _, state = tx.update(GRADS, state, stats=STATS)
    for before, after in zip(states, [*states[1:], state], strict=True):
        again = tx.update(GRADS, before, stats=STATS)[1]
        assert all(torch.equal(x, y) for x, y in zip(leaves(again), leaves(after), strict=True))


# ------------------------------------------------------------------ staggered

CASE = CASES["conv"]
_, CONV, _ = run(CASE)
STREAM = [
    run(subset(CASE, k % 3, k % 3 + 4)._replace(inputs=(1 + k % 5) * CASE.inputs[k % 3 : k % 3 + 4]))[2]
    for k in range(15)
]


def factors(state: Any) -> dict[str, list[torch.Tensor]]:
    """What solving needs, by block."""
    return {name: leaves(one) for name, one in (state.factored.matrix | state.factored.vector).items()}


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("every", [2, 3, 5])
def test_every_block_has_one_turn_in_a_period(every):
    """What is done is what a whole refresh would do; the first statistics do all of it."""
    tx = kf.kfac(damping=0.1, refresh_every=every, growing=False, stagger=True)
    state, done = tx.init(CASE.params), []
    _, state = tx.update(CONV, state, stats=STREAM[0])
    for stats in STREAM[1 : 1 + 2 * every]:
        before = factors(state)
        whole = factors(tx.update(CONV, state, stats=stats, refresh=True)[1])
        _, state = tx.update(CONV, state, stats=stats)
        after = factors(state)
        moved = [name for name in after if not equal(before[name], after[name])]
        assert all(equal(after[name], whole[name]) for name in moved)
        assert not any(equal(before[name], whole[name]) for name in after)
        done.append(moved)
    names = sorted(factors(state))
    assert len(names) == 3
    for turn in range(every + 1):
        assert sorted(name for moved in done[turn : turn + every] for name in moved) == names
    assert max(len(moved) for moved in done) == -(-3 // every)


def test_turns_can_be_overruled_and_grow():
    tx = kf.kfac(damping=0.1, refresh_every=3, stagger=True)
    _, state = tx.update(CONV, tx.init(CASE.params), stats=STREAM[0])
    for asked, count in ((True, 3), (False, 0)):
        after = tx.update(CONV, state, stats=STREAM[1], refresh=asked)[1]
        assert (
            sum(not equal(x, y) for x, y in zip(factors(state).values(), factors(after).values(), strict=True)) == count
        )
    counts = []
    for stats in STREAM[1:12]:
        _, after = tx.update(CONV, state, stats=stats)
        counts.append(
            sum(not equal(x, y) for x, y in zip(factors(state).values(), factors(after).values(), strict=True))
        )
        state = after
    assert counts[:2] == [3, 3]
    assert [sum(counts[2:4]), counts[5:]] == [3, [1] * 6]


def test_scalings_do_not_wait_for_a_turn():
    """EKFAC: bases move when it is their turn, scalings with every batch."""
    tx = kf.ekfac(damping=0.1, refresh_every=3, growing=False, stagger=True)
    _, state = tx.update(CONV, tx.init(CASE.params), stats=STREAM[0])
    for stats in STREAM[1:7]:
        before = state
        _, state = tx.update(CONV, state, stats=stats)
        old, new = before.curvature.matrix, state.curvature.matrix
        assert sum(not equal(leaves(old[name].bases), leaves(new[name].bases)) for name in new) == 1
        for name, own in state.factored.matrix.items():
            assert not torch.equal(own.inverse, before.factored.matrix[name].inverse)
            assert torch.equal(own.inverse, 1 / (new[name].scalings + 0.1))
            assert equal([own.a_basis, own.g_basis], leaves(new[name].bases))


def test_groups_cost_about_the_same():
    costs = {str(k): k**3 for k in range(1, 41)}
    groups = dealt(costs, 6)
    loads = [sum(costs[name] for name in group) for group in groups]
    assert sorted(name for group in groups for name in group) == sorted(costs)
    assert max(loads) - min(loads) <= 0.05 * max(loads)
    assert dealt({"a": 1}, 3) == [["a"], [], []]


def test_a_block_costs_the_cubes_of_its_factors():
    tx = kf.kfac(kf.curvature.blockwise(kf.curvature.kronecker()))
    state = kf.observe(tx.init(CASE.params), STREAM[0])
    costs = state.rules.value.curvature.costs(state.curvature)
    assert costs == {
        "first.weight": 13**3 + 3**3 + 2,
        "second.weight": 19**3 + 4**3 + 2,
        "head.weight": 9**3 + 5**3 + 2,
    }
