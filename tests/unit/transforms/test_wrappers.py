"""Steps that are skipped, and steps that are made of several calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kfac_func as kf
from kfac_func._errors import HyperparameterError, StateError
from kfac_func._tree import leaves, tree_map
from kfac_func.transforms import (
    GradientTransformation,
    adam,
    apply_if_finite,
    chain,
    identity,
    inject_hyperparams,
    multi_steps,
    scale,
    scale_by_schedule,
    sgd,
    trace,
    tree_get,
)
from tests.unit.transforms.problem import FN, PARAMS, X, Y, close, passed, reloaded, run

T = torch.tensor
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_call_that_is_not_finite_leaves_no_trace(bad):
    tx, plain = apply_if_finite(adam(0.1), 5), adam(0.1)
    params = {"a": T([1.0, 2.0], dtype=torch.float64), "b": None, "c": T(3.0, dtype=torch.float64)}
    good = tree_map(torch.sin, params)
    state, own = tx.init(params), plain.init(params)
    for wrong in (False, True, True, False, False):
        if wrong:
            spoilt = {**good, "a": T([1.0, bad], dtype=torch.float64)}
            updates, state = tx.update(spoilt, state, params)
            close(updates, tree_map(torch.zeros_like, params), 0)
        else:
            updates, state = tx.update(good, state, params)
            wanted, own = plain.update(good, own, params)
            close(updates, wanted, 0)
        close(state.inner, own, 0)
        assert state.last_finite.item() is not wrong
    assert (state.notfinite_count.item(), state.total_notfinite.item()) == (0, 2)
    close(reloaded(state), state, 0)


def test_after_too_many_errors_they_go_through():
    tx = apply_if_finite(trace(0.5), 2)
    state, counts = tx.init(T(0.0)), []
    for value in (NAN, NAN, NAN, NAN):
        update, state = tx.update(T(value), state)
        counts.append((state.notfinite_count.item(), update.isnan().item(), state.inner.trace.isnan().item()))
    assert counts == [(1, False, False), (2, False, False), (3, True, True), (4, True, True)]
    tx = apply_if_finite(identity(), 1)
    state = tx.init(T(0.0))
    for value, wanted in ((INF, 0.0), (1.0, 1.0), (INF, 0.0), (INF, INF), (2.0, 2.0)):
        update, state = tx.update(T(value), state)
        assert update.item() == wanted
    assert (state.notfinite_count.item(), state.total_notfinite.item()) == (0, 3)


def test_updates_that_explode_inside_are_skipped():
    tx = apply_if_finite(chain(trace(0.5), scale_by_schedule(lambda count: 1 / count.to(torch.float64))), 3)
    update, state = tx.update(T(1.0), tx.init(T(0.0)))
    assert (update.item(), state.inner[0].trace.item(), state.inner[1].step.item()) == (0.0, 0.0, 0)
    assert not state.last_finite


def test_nothing_in_the_updates_is_finite():
    update, state = apply_if_finite(identity(), 0).update({"a": None}, apply_if_finite(identity(), 0).init({"a": None}))
    assert (update, state.total_notfinite.item()) == ({"a": None}, 0)


def test_gradients_flow_past_a_call_that_is_skipped():
    make = inject_hyperparams(sgd)

    def total(rate):
        tx = apply_if_finite(make(rate, 0.5), 3)
        state, moved = tx.init(T(0.0, dtype=torch.float64)), 0.0
        for gradient in (1.0, NAN, 3.0):
            update, state = tx.update(T(gradient, dtype=torch.float64), state)
            moved = moved + update
        return moved

    assert torch.func.grad(total)(T(0.1, dtype=torch.float64)).item() == -(1.0 + 3.5)


def test_kfac_that_meets_its_first_statistics_when_refused():
    tx = apply_if_finite(chain(kf.kfac(damping=0.1), sgd(0.1, 0.9)), 3)
    grads, stats = passed()
    bad = {**grads, "0.bias": grads["0.bias"] * NAN}
    start = tx.init(PARAMS)
    _, state = tx.update(bad, start, PARAMS, stats=stats)
    assert state.inner[0].curvature == ()
    close(state.inner, start.inner, 0)
    got, wanted = (tx.update(grads, one, PARAMS, stats=stats) for one in (state, start))
    close(got[0], wanted[0], 0)
    close(got[1].inner, wanted[1].inner, 0)
    _, after = tx.update(bad, got[1], PARAMS, stats=stats)
    close(after.inner, got[1].inner, 0)


def test_members_of_an_ensemble_are_skipped_one_by_one():
    tx = apply_if_finite(chain(kf.kfac(damping=0.1), sgd(0.1, 0.9)), 3)
    together = {path: torch.stack([leaf, 2 * leaf]) for path, leaf in PARAMS.items()}
    spoilt = T([[NAN, 1.0, 1.0], [1.0, 1.0, NAN]], dtype=torch.float64)

    def steps(params, factors, **extras):
        state, history = tx.init(params), []
        for factor in factors:
            grads, stats = passed(params)
            grads = {path: factor * leaf for path, leaf in grads.items()}
            updates, state = tx.update(grads, state, params, stats=stats, **extras)
            history.append(updates)
            params = kf.apply_updates(params, updates)
        return history, params, state

    history, params, state = torch.func.vmap(lambda p, f: steps(p, f, refresh=True))(together, spoilt)
    assert state.total_notfinite.tolist() == [1, 1]
    assert state.inner[0].observed.tolist() == [2, 2]
    assert (history[0]["0.weight"][0] == 0).all()
    assert (history[2]["0.weight"][1] == 0).all()
    for i in range(2):
        _, own, alone = steps({path: leaf[i] for path, leaf in together.items()}, spoilt[i], refresh=True)
        close({path: leaf[i] for path, leaf in params.items()}, own)
        close(tree_map(lambda x, i=i: x[i], state), alone)


def test_a_leaf_that_changes_its_shape_where_nobody_can_look():
    growing = GradientTransformation(
        lambda params: torch.zeros(1), lambda updates, state, params=None, **extra: (1 * updates, state.repeat(2))
    )
    tx = apply_if_finite(growing, 3)
    for gradient, size in ((1.0, 2), (NAN, 1)):
        _, state = tx.update(T(gradient), tx.init(T(0.0)))
        assert state.inner.shape == (size,)
    with pytest.raises(StateError, match=r"changes its shape(.|\n)*\[2\](.|\n)*\[1\]"):
        torch.func.vmap(lambda g: tx.update(g, tx.init(g))[0])(torch.ones(3))


def test_numbers_of_errors_and_calls():
    with pytest.raises(HyperparameterError, match="max_consecutive_errors must be at least 0"):
        apply_if_finite(identity(), -1)
    with pytest.raises(HyperparameterError, match="every must be at least 1"):
        multi_steps(identity(), 0)


def test_several_calls_are_one_step_on_the_mean():
    tx, plain = multi_steps(adam(0.1), 3), adam(0.1)
    params = {"a": T([1.0, -2.0], dtype=torch.float64), "b": T(0.5, dtype=torch.float64)}
    state, own, updates = tx.init(params), plain.init(params), None
    for step in range(2):
        grads = [tree_map(lambda x, k=k, step=step: x * (1 + k) ** 2 + step, params) for k in range(3)]
        for k, grad in enumerate(grads):
            assert (state.mini_step.item(), state.gradient_step.item()) == (k, step)
            updates, state = tx.update(grad, reloaded(state), params)
            if k < 2:
                close(updates, tree_map(torch.zeros_like, params), 0)
                close(state.inner, own)
        wanted, own = plain.update(tree_map(lambda *g: sum(g) / 3, *grads), own, params)
        close(updates, wanted)
        close(state.inner, own)


def test_micro_batches_of_kfac_are_one_batch():
    whole = chain(kf.kfac(damping=0.1), sgd(0.1, 0.9))
    parts, params, state = multi_steps(whole, 2), PARAMS, None
    state = parts.init(params)
    for _ in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            grads, stats = passed(params, rows)
            updates, state = parts.update(grads, state, params, stats=stats)
            params = kf.apply_updates(params, updates)
    wanted, own = run(whole)
    close(params, wanted, 1e-9)
    close(state.inner, own, 1e-9)
    assert tree_get(state, "observed").item() == 3


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("estimator", [kf.estimators.exact(), kf.estimators.forward_only()], ids=["exact", "forward"])
def test_a_run_goes_on_from_a_checkpoint_between_two_calls(at, estimator):
    tx = multi_steps(chain(kf.kfac(damping=0.1), sgd(0.1, 0.9)), 3)
    step: Any = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=estimator, rows=True)

    def go_on(start, calls):
        params, state = start
        for call in calls:
            rows = slice(call % 5, call % 5 + 3)
            _, grads, stats = step(params, (X[rows], Y[rows]))
            updates, state = tx.update(grads, state, params, stats=stats)
            params = kf.apply_updates(params, updates)
        return params, state

    start = PARAMS, tx.init(PARAMS)
    found = go_on(reloaded(go_on(start, range(at))), range(at, 7))
    close(found, go_on(start, range(7)), 0)


def test_moments_that_are_pending_are_stored_too():
    measure = kf.curvature.blockwise(kf.curvature.kronecker(), kf.curvature.diagonal()).measure
    step: Any = kf.value_grad_and_stats(FN, kf.losses.mse(), estimator=kf.estimators.exact(), measure=measure)
    tx = multi_steps(chain(kf.kfac(damping=0.1), sgd(0.1, 0.9)), 2)
    _, grads, stats = step(PARAMS, (X, Y))
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    (wanted, _), (got, _) = (tx.update(grads, one, PARAMS, stats=stats) for one in (state, reloaded(state)))
    close(got, wanted, 0)


def collected(seen):
    def update(updates, state, params=None, *, stats=None, value=None):
        seen.append((stats, value, params))
        return updates, state

    return (lambda params: ()), update


def test_what_the_inner_transformation_is_passed():
    seen, one = [], T(1.0)
    tx = multi_steps(collected(seen), 3)
    state = tx.init(one)
    batches = [{"x": T([float(k)])} for k in range(6)]
    for k, stats in enumerate([batches[0], None, batches[2], None, None, None]):
        _, state = tx.update(one, state, T(float(k)), stats=stats, value=k)
        if stats is not None:
            stats["x"].fill_(-1.0)  # a loader that uses its buffers again
    (stats, value, params), nothing = seen
    assert [one["x"].item() for one in stats] == [0.0, -1.0]
    assert (value, params.item()) == (2, 2.0)
    assert nothing == (None, 5, T(5.0))


def test_the_call_may_say_whether_it_is_the_last():
    tx = multi_steps(scale(1.0), 3)
    grads = (2.0, 4.0, 6.0, 8.0)
    state, got = tx.init(T(0.0)), []
    for gradient, emit in zip(grads, (True, False, True, False), strict=True):
        update, state = tx.update(T(gradient), state, emit=emit)
        got.append(update.item())
    assert got == [2.0, 0.0, 5.0, 0.0]
    assert (state.mini_step.item(), state.gradient_step.item(), state.acc_grads.item()) == (1, 2, 8.0)
    _, state = tx.update(T(1.0), state)
    assert tx.update(T(1.0), state)[0].item() == pytest.approx((8.0 + 1.0 + 1.0) / 3)


def test_a_missing_gradient_counts_as_zero_and_its_sum_waits():
    tx = multi_steps(identity(), 2)
    state = tx.init([T(0.0), T(0.0)])
    _, state = tx.update([T(1.0), None], state)
    updates, state = tx.update([T(3.0), T(4.0)], state)
    assert updates == [T(2.0), T(2.0)]
    _, state = tx.update([T(1.0), T(6.0)], state)
    updates, state = tx.update([T(1.0), None], state)
    assert updates == [T(1.0), None]
    assert state.acc_grads == [T(0.0), T(6.0)]


def test_where_the_count_cannot_be_read_it_is_asked_for(monkeypatch):
    together = torch.zeros(2)
    tx = multi_steps(identity(), 2)
    state = torch.func.vmap(tx.init)(together)
    with pytest.raises(StateError, match=r"emit=True or emit=False"):
        torch.func.vmap(tx.update)(together, state)
    every = multi_steps(identity(), 1)
    updates, _ = torch.func.vmap(every.update)(together + 1, torch.func.vmap(every.init)(together))
    assert updates.tolist() == [1.0, 1.0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(StateError, match=r"torch.compile"):
        tx.update(T(1.0), tx.init(T(0.0)))


def test_an_ensemble_of_several_calls_is_a_loop_over_its_members():
    tx = multi_steps(chain(kf.kfac(damping=0.1), sgd(0.1)), 2)
    together = {path: torch.stack([leaf, 2 * leaf]) for path, leaf in PARAMS.items()}

    def steps(params, **options):
        state = tx.init(params)
        for emit in (False, True):
            grads, stats = passed(params)
            said = {"emit": emit, "refresh": True} if options else {}
            updates, state = tx.update(grads, state, params, stats=stats, **said)
            params = kf.apply_updates(params, updates)
        return params, state

    params, state = torch.func.vmap(lambda p: steps(p, said=True))(together)
    for i in range(2):
        own, alone = steps({path: leaf[i] for path, leaf in together.items()})
        close({path: leaf[i] for path, leaf in params.items()}, own)
        close(tree_map(lambda x, i=i: x[i], state), alone)
    assert len(leaves(state.stats)) == 0
