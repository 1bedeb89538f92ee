"""Averages of updates and of parameters, against sums written out."""

from __future__ import annotations

import pytest
import torch

import kfac_func as kf
from kfac_func._errors import HyperparameterError, StateError
from kfac_func._tree import leaves, tree_map
from kfac_func.transforms import average_params, averaged_params, chain, ema, sgd, trace
from tests.unit.transforms.problem import PARAMS, close, passed, reloaded

G = torch.Generator().manual_seed(0)
UPDATES = [{"w": torch.randn(3, generator=G).double(), "b": torch.randn((), generator=G).double()} for _ in range(7)]
START = {"w": torch.ones(3, dtype=torch.float64), "b": torch.tensor(-2.0, dtype=torch.float64)}


def weighted(trees, weights):
    return tree_map(lambda *x: sum(w * leaf for w, leaf in zip(weights, x, strict=True)), *trees)


@pytest.mark.parametrize("decay", [0.0, 0.9, torch.tensor(0.5, dtype=torch.float64)])
def test_ema_is_a_weighted_sum(decay):
    for debias in (True, False):
        tx = ema(decay, debias)
        state = tx.init(START)
        for t, update in enumerate(UPDATES, start=1):
            got, state = tx.update(update, state)
            weights = torch.tensor([(1 - decay) * float(decay) ** (t - k) for k in range(1, t + 1)])
            weights = weights.double()
            close(got, weighted(UPDATES[:t], weights / weights.sum() if debias else weights), 1e-6)


def test_ema_is_exact():
    tx = ema(0.75)
    state, average = tx.init(START), weighted(UPDATES[:1], [0.0])
    for t, update in enumerate(UPDATES, start=1):
        got, state = tx.update(update, state)
        average = weighted([average, update], [0.75, 0.25])
        close(got, weighted([average], [1 / (1 - 0.75**t)]))
        close(state.ema, average)


def path_of(updates):
    params, found = START, []
    for update in updates:
        params = kf.apply_updates(params, update)
        found.append(params)
    return found


def followed(tx, updates=UPDATES):
    params, state = START, tx.init(START)
    for update in updates:
        passed_on, state = tx.update(update, state, params)
        close(passed_on, update, 0)
        assert not {id(leaf) for leaf in leaves(passed_on)} & {id(leaf) for leaf in leaves(update)}
        params = kf.apply_updates(params, passed_on)
    return state


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("decay", [None, 0.0, 0.9])
def test_the_average_of_the_parameters_is_a_weighted_sum(decay, start):
    for t in range(1, len(UPDATES) + 1):
        state = followed(average_params(decay, start), UPDATES[:t])
        tail = path_of(UPDATES[:t])[start:] or path_of(UPDATES[:t])[-1:]
        weights = [1.0 if decay is None else decay ** (len(tail) - 1 - k) for k in range(len(tail))]
        close(averaged_params(state), weighted(tail, [w / sum(weights) for w in weights]))


def test_options_change_the_average():
    plain = averaged_params(followed(average_params(0.9)))
    for other in (average_params(None), average_params(0.5), average_params(0.9, start=2)):
        other = averaged_params(followed(other))
        assert (other["w"] - plain["w"]).abs().max() > 1e-3
    default = averaged_params(followed(average_params()))
    close(default, averaged_params(followed(average_params(0.999, 0))), 0)


def test_the_average_before_the_first_step_and_of_a_leaf_that_rests():
    tx = average_params(None)
    state = tx.init(START)
    close(averaged_params(state), START, 0)
    _, state = tx.update({"w": UPDATES[0]["w"], "b": None}, state, START)
    close(averaged_params(state), {"w": START["w"] + UPDATES[0]["w"], "b": START["b"]})
    assert averaged_params(state)["w"].data_ptr() != state.average["w"].data_ptr()


def test_the_average_is_found_in_the_state_of_a_chain():
    plain, tx = chain(kf.kfac(), sgd(0.1, 0.9)), chain(kf.kfac(), sgd(0.1, 0.9), average_params(None))
    params, path, one, two = PARAMS, [], plain.init(PARAMS), tx.init(PARAMS)
    for _ in range(3):
        grads, stats = passed(params)
        wanted, one = plain.update(grads, one, params, stats=stats)
        updates, two = tx.update(grads, two, params, stats=stats)
        close(updates, wanted, 0)
        params = kf.apply_updates(params, updates)
        path.append(params)
    close(averaged_params(reloaded(two)), weighted(path, [1 / 3] * 3))
    for state in (one, (two, two), ()):
        with pytest.raises(StateError, match="does not hold one average"):
            averaged_params(state)


def test_gradients_flow_through_the_decay():
    def average(decay):
        return averaged_params(followed(average_params(decay)))["w"].sum()

    def smoothed(decay):
        tx = chain(trace(0.5), ema(decay))
        state, total = tx.init(START), torch.tensor(0.0)
        for update in UPDATES:
            moved, state = tx.update(update, state)
            total = total + moved["w"].sum()
        return total

    at, h = torch.tensor(0.5, dtype=torch.float64), 1e-6
    for f in (average, smoothed):
        slope = (f(at + h) - f(at - h)) / (2 * h)
        torch.testing.assert_close(torch.func.grad(f)(at), slope, rtol=1e-7, atol=1e-7)
        assert slope.abs() > 1e-3


def test_a_negative_start_is_refused():
    with pytest.raises(HyperparameterError, match="start must be at least 0"):
        average_params(start=-1)
