"""Moving averages against their closed forms, and the number of factorisations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import kfac_func as kf
from kfac_func._tree import leaves
from tests import oracles
from tests.zoo import CASES, close, randn, run, subset

CASE = CASES["mlp"]
_, GRADS, STATS = run(CASE)
OTHER = run(CASE._replace(inputs=2 * CASE.inputs))[2]
K = kf.curvature.kronecker()


def _moments(stats) -> list[torch.Tensor]:
    return leaves({name: K.measure(block) for name, block in stats.blocks().items()})


def _averages(stream, **options) -> list[list[torch.Tensor]]:
    """The averages after every update of a stream of statistics (None: a step without)."""
    tx = kf.kfac(**options)
    state, found = tx.init(CASE.params), []
    for stats in stream:
        _, state = tx.update(GRADS, state, stats=stats)
        found.append(leaves(state.curvature.matrix))
    return found


def _mixed(weight: float) -> list[torch.Tensor]:
    """weight · this batch + (1 − weight) · the other."""
    return [weight * a + (1 - weight) * b for a, b in zip(_moments(STATS), _moments(OTHER), strict=True)]


def _equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(close(a, b, 1e-12) for a, b in zip(one, two, strict=True))


averages = pytest.mark.parametrize("average", ["debiased", "warmup", "constant"])


@averages
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.999])
def test_a_constant_stream_gives_the_value_of_the_batch(decay, average):
    for found in _averages([STATS] * 6, decay=decay, average=average):
        assert _equal(found, _moments(STATS))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(("early", "late"), [(1, 1), (2, 3), (4, 1)])
def test_debiased_closed_form(decay, early, late):
    """Weights β^(n-k), normalised: Σ over the first m of n is (1 − β^m) β^(n−m) / (1 − β^n)."""
    found = _averages([STATS] * early + [OTHER] * late, decay=decay)[-1]
    total = early + late
    weight = (1 - decay**early) * decay**late / (1 - decay**total)
    assert _equal(found, _mixed(weight))


@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_warmup_closed_form(decay):
    """x ← β_k x + (1 − β_k) new, β_k = min(1 − 1/k, β)."""
    stream, weight = [STATS, OTHER, OTHER, STATS, OTHER, STATS], 0.0
    for k, (found, stats) in enumerate(
        zip(_averages(stream, decay=decay, average="warmup"), stream, strict=True), start=1
    ):
        beta = min(1 - 1 / k, decay)
        weight = beta * weight + (1 - beta) * (stats is STATS)
        assert _equal(found, _mixed(weight))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(("early", "late"), [(1, 1), (2, 3), (4, 1)])
def test_constant_closed_form(decay, early, late):
    """The first batch starts the average and keeps the weight β^(n−1); so m of one value are left with β^(n−m)."""
    found = _averages([STATS] * early + [OTHER] * late, decay=decay, average="constant")[-1]
    assert _equal(found, _mixed(decay**late))


def test_warmup_is_the_plain_mean_at_first():
    """While 1 − 1/k < β every batch counts the same."""
    stream = [STATS, OTHER, OTHER, STATS, OTHER]
    found = _averages(stream, decay=0.95, average="warmup")
    for k in range(1, 6):
        assert _equal(found[k - 1], _mixed(sum(s is STATS for s in stream[:k]) / k))


@averages
@pytest.mark.parametrize("gap", [1, 3])
def test_steps_without_statistics_do_not_count(gap, average):
    stream = [STATS, OTHER, OTHER]
    sparse = list(itertools.chain.from_iterable([s] + [None] * (gap - 1) for s in stream))
    assert _equal(_averages(sparse, average=average)[-1], _averages(stream, average=average)[-1])


def test_a_batch_that_is_not_finite_does_not_start_a_constant_average():
    bad = run(CASE._replace(inputs=CASE.inputs * float("nan")))[2]
    tx = kf.kfac(decay=0.9, average="constant")
    state = tx.init(CASE.params)
    for stats in (bad, STATS, bad, OTHER):
        _, state = tx.update(GRADS, state, stats=stats)
    assert _equal(leaves(state.curvature.matrix), _mixed(0.9))


def test_the_schedules_differ():
    one, two, three = (
        _averages([STATS, OTHER], decay=0.95, average=average)[-1] for average in ("debiased", "warmup", "constant")
    )
    assert not _equal(one, two)
    assert not _equal(one, three)
    assert not _equal(two, three)


# ------------------------------------------------------------------ burn-in


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_the_first_batches_only_feed_the_averages(burn_in):
    """Gradients pass until more than `burn_in` batches were absorbed; from then on it is as if there was no burn-in."""
    bad = run(CASE._replace(inputs=CASE.inputs * float("nan")))[2]
    plain, late = kf.kfac(damping=0.1), kf.kfac(damping=0.1, burn_in=burn_in)
    one, two = plain.init(CASE.params), late.init(CASE.params)
    for stats in (None, STATS, None, bad, OTHER, None, STATS, bad, OTHER, None):
        wanted, one = plain.update(GRADS, one, stats=stats)
        found, two = late.update(GRADS, two, stats=stats)
        assert all(torch.equal(x, y) for x, y in zip(leaves(one), leaves(two), strict=True))
        wanted = wanted if int(two.observed) > burn_in else GRADS
        assert all(torch.equal(x, y) for x, y in zip(leaves(found), leaves(wanted), strict=True))
        assert not any(x.data_ptr() == y.data_ptr() for x, y in zip(leaves(found), leaves(GRADS), strict=True))
        assert all(torch.equal(x, y) for x, y in zip(leaves(found), leaves(kf.precondition(two, GRADS)), strict=True))
    assert int(two.observed) == 4


def test_observe_is_the_same_average():
    tx = kf.kfac(decay=0.9)
    state = tx.init(CASE.params)
    for stats in (STATS, OTHER, STATS):
        state = kf.observe(state, stats)
    assert _equal(leaves(state.curvature.matrix), _averages([STATS, OTHER, STATS], decay=0.9)[-1])
    assert math.isclose(float(state.weight), 1 + 0.9 + 0.81)


def test_gradients_pass_unchanged_before_the_first_statistics():
    tx = kf.kfac()
    updates, state = tx.update(GRADS, tx.init(CASE.params))
    assert all(bool((a == b).all()) for a, b in zip(leaves(updates), leaves(GRADS), strict=True))
    assert int(state.observed) == 0


class Counted:
    """A curvature that counts what is asked of it."""

    def __init__(self):
        plain = kf.curvature.blockwise(kf.curvature.kronecker(), kf.curvature.diagonal())
        self.factorised = 0
        self.curvature = plain._replace(factorize=self._count(plain.factorize))

    def _count(self, factorize):
        def counted(*args):
            self.factorised += 1
            return factorize(*args)

        return counted


SMALL = run(subset(CASE, 0, 2), measure=Counted().curvature.measure)[2]


@pytest.mark.parametrize(
    ("period", "every", "start"),
    [(1, 1, 0), (1, 10, 0), (1, 64, 7), (4, 3, 7), (4, 64, 0), (50, 1, 7), (50, 10, 0), (50, 64, 7)],
)
def test_refreshes_over_250_updates(period, every, start):
    """From the first statistics on; the interval grows from 1 to `every` as the averages age."""
    counted = Counted()
    tx = kf.kfac(counted.curvature, refresh_every=every)
    state = tx.init(CASE.params)
    for k in range(250):
        stats = SMALL if k >= start and (k - start) % period == 0 else None
        _, state = tx.update(GRADS, state, stats=stats)
        if k % 100 == 0:
            kf.precondition(state, GRADS)  # asking must not count
    wanted = sum(k == start or (k > start and k % min(every, 1 + k // every) == 0) for k in range(250))
    assert counted.factorised == wanted
    assert int(state.step) == 250
    assert int(state.observed) == len(range(start, 250, period))


def test_refresh_can_be_asked_for_and_forbidden():
    counted = Counted()
    tx = kf.kfac(counted.curvature, refresh_every=2)
    state = tx.init(CASE.params)
    for refresh, wanted in ((False, 1), (False, 1), (False, 1), (True, 2), (None, 3), (None, 3), (None, 4)):
        _, state = tx.update(GRADS, state, stats=STATS, refresh=refresh)
        assert counted.factorised == wanted


def test_a_refresh_uses_the_statistics_of_its_own_step():
    tx = kf.kfac(refresh_every=1, decay=0.0, damping=0.1)
    state = tx.init(CASE.params)
    _, state = tx.update(GRADS, state, stats=STATS)
    updates, _ = tx.update(GRADS, state, stats=OTHER)
    fresh, _ = tx.update(GRADS, tx.init(CASE.params), stats=OTHER)
    assert all(close(a, b) for a, b in zip(leaves(updates), leaves(fresh), strict=True))


def test_the_same_step_twice_is_the_same():
    """A state is a value: the second call does not see the first."""
    tx, u = kf.kfac(), {k: {c: randn(*v.shape) for c, v in p.items()} for k, p in CASE.params.items()}
    state = kf.observe(tx.init(CASE.params), STATS)
    one, two = (oracles.flat(tx.update(u, state, stats=OTHER)[0]) for _ in range(2))
    assert all(bool((one[path] == two[path]).all()) for path in one)
