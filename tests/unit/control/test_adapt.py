"""Damping by how well the model foretold the loss, steps taken back, and the unit of damping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from kfac_func._typing import PyTree
from kfac_func.control import AdaptDampingState, QuadraticModelState
from kfac_func.state import inside
from tests.zoo import CASES, close, randn, run

CASE = CASES["mlp"]
MODEL = kf.quadratic_model(CASE.fn, CASE.loss)


def same(one: PyTree, two: PyTree) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tree.leaves(one), _tree.leaves(two), strict=True))


def controlled(model: Any = MODEL, damping: float = 0.1, **options: Any) -> Any:
    inner = kf.chain(kf.kfac(damping=damping), kf.scale_by_quadratic_model(model))
    options.setdefault("rule", kf.levenberg_marquardt(interval=2, decay=0.9))
    return kf.adapt_damping(inner, model=model, **options)


def damping(state: Any) -> float:
    found: Any = inside(state)[0].damping
    return float(found)


def trained(tx: Any, steps: int, case: Any = CASE, **extra: Any) -> tuple[PyTree, list[AdaptDampingState]]:
    params, state, states = case.params, tx.init(case.params), []
    for _ in range(steps):
        _, grads, stats = run(case._replace(params=params))
        updates, state = tx.update(grads, state, params, stats=stats, batch=case.batch, **extra)
        params = kf.apply_updates(params, updates)
        states.append(state)
    return params, states


def linear(p: Any, x: Tensor) -> Tensor:
    return x @ p["w"] + p["b"]


def test_a_quadratic_loss_with_exact_curvature_is_foretold_exactly_at_every_step():
    x, y = randn(9, 4, seed=1), randn(9, 3, seed=2)
    loss = kf.losses.mse(reduction="batchmean", scale=0.5)
    model = kf.quadratic_model(linear, loss, l2=0.05, mask="w")
    step = kf.value_grad_and_stats(linear, loss, estimator=kf.estimators.exact())
    inner = kf.chain(kf.kfac(damping=1.0), kf.scale_by_quadratic_model(model))
    tx = kf.adapt_damping(inner, kf.levenberg_marquardt(interval=1, decay=0.9), model=model)
    params = {"w": randn(4, 3, seed=3), "b": randn(3, seed=4)}
    state = tx.init(params)
    for k in range(6):
        _, grads, stats = step(params, (x, y))
        updates, state = tx.update(grads, state, params, stats=stats, batch=(x, y))
        params = kf.apply_updates(params, updates)
        assert abs(float(state.ratio) - 1) < 1e-6
        assert damping(state) == pytest.approx(0.9 ** (k + 1))


def test_the_rule_acts_at_every_interval_and_only_then():
    _, states = trained(controlled(), 5)
    found = [damping(state) for state in states]
    assert found[0] == 0.1
    assert found[1] != 0.1
    assert found[2] == found[1]
    assert found[4] == found[3]
    assert states[0].ratio == 1
    assert states[1].ratio != 1


@pytest.mark.parametrize(("ratio", "moves"), [(1.0, 0.81), (0.5, 1.0), (0.1, 1 / 0.81), (math.nan, 1 / 0.81)])
def test_the_loss_after_the_step_decides(ratio: float, moves: float):
    tx = controlled(rule=kf.levenberg_marquardt(interval=1, decay=0.81))
    _, grads, stats = run(CASE)
    step, proposal = tx.propose(grads, tx.init(CASE.params), CASE.params, stats=stats, batch=CASE.batch)
    before = torch.tensor(3.0).double()
    _, state = tx.accept(step, proposal, before=before, after=before + ratio * proposal.predicted)
    assert damping(state) == pytest.approx(0.1 * moves)
    assert math.isnan(ratio) or float(state.ratio) == pytest.approx(ratio)


def test_two_phases_are_one():
    tx = controlled(reject=True)
    params, states = trained(tx, 3)
    other, state = CASE.params, tx.init(CASE.params)
    for _ in range(3):
        _, grads, stats = run(CASE._replace(params=other))
        step, proposal = tx.propose(grads, state, other, stats=stats, batch=CASE.batch)
        assert tx.due(state)
        before, after = (MODEL.value(p, CASE.batch) for p in (other, kf.apply_updates(other, step)))
        step, state = tx.accept(step, proposal, before=before, after=after)
        other = kf.apply_updates(other, step)
    assert same(params, other)
    assert same(states[-1], state)


def test_value_fn_takes_the_place_of_the_model_and_value_saves_a_pass():
    calls: list[int] = []

    def value_fn(p: PyTree) -> Tensor:
        calls.append(1)
        return MODEL.value(p, CASE.batch)

    inner = kf.chain(kf.kfac(damping=0.1), kf.scale_by_quadratic_model(MODEL))
    tx = kf.adapt_damping(inner, kf.levenberg_marquardt(interval=2, decay=0.9))
    params, _ = trained(tx, 4, value_fn=value_fn)
    assert same(params, trained(controlled(), 4)[0])
    assert len(calls) == 4  # two of four steps are due, before and after
    trained(tx, 4, value_fn=value_fn, value=torch.tensor(1.0))
    assert len(calls) == 6


def test_any_chain_is_foretold_by_the_model():
    """K-FAC with a fixed rate: M(δ) of the step that was taken."""
    tx = kf.adapt_damping(kf.chain(kf.kfac(damping=0.1), kf.sgd(0.05)), kf.levenberg_marquardt(interval=1), model=MODEL)
    _, grads, stats = run(CASE)
    step, proposal = tx.propose(grads, tx.init(CASE.params), CASE.params, stats=stats, batch=CASE.batch)
    wanted = MODEL.form(CASE.params, CASE.batch, [step], grads).change(torch.ones(1).double())
    assert close(proposal.predicted, wanted)


@pytest.mark.parametrize("rate", [False, True])
def test_damping_in_the_model_is_an_option(rate: bool):
    last = kf.sgd(0.05) if rate else kf.scale_by_quadratic_model(MODEL)
    inner = kf.chain(kf.kfac(damping=0.1), last)
    _, grads, stats = run(CASE)
    found = {}
    for option in (False, True):
        rule = kf.levenberg_marquardt(interval=1, damping_in_model=option)
        tx = kf.adapt_damping(inner, rule, model=MODEL)
        step, proposal = tx.propose(grads, tx.init(CASE.params), CASE.params, stats=stats, batch=CASE.batch)
        found[option] = proposal.predicted, sum(leaf.square().sum() for leaf in _tree.leaves(step))
    assert close(found[True][0] - found[False][0], 0.05 * found[True][1], 1e-9)


def overshooting(rate: float, **options: Any) -> Any:
    rule = kf.levenberg_marquardt(interval=100, decay=0.99)
    inner = kf.chain(kf.kfac(damping=0.1), kf.sgd(rate, momentum=0.5))
    return kf.adapt_damping(inner, rule, model=MODEL, **options)


def test_a_step_is_taken_back_only_when_the_loss_rises():
    plain, _ = trained(overshooting(0.05), 3)
    params, states = trained(overshooting(0.05, reject=True), 3)
    assert same(plain, params)
    assert int(states[-1].rejected) == 0
    assert damping(states[-1]) == 0.1
    params, states = trained(overshooting(50.0, reject=True), 3)
    assert same(params, CASE.params)
    assert [int(state.rejected) for state in states] == [1, 2, 3]
    assert damping(states[-1]) == pytest.approx(0.1 / 0.99**300)
    assert not same(trained(overshooting(50.0), 3)[0], CASE.params)


def test_a_step_taken_back_keeps_what_was_observed_and_nothing_else():
    tx = overshooting(50.0, reject=True)
    start = tx.init(CASE.params)
    _, grads, stats = run(CASE)
    updates, state = tx.update(grads, start, CASE.params, stats=stats, batch=CASE.batch)
    assert all((leaf == 0).all() for leaf in _tree.leaves(updates))
    kept = inside(state)[0]
    assert int(kept.observed) == int(kept.step) == int(state.step) == 1
    assert same(state.inner[1], start.inner[1])  # the momentum of sgd


def test_the_numbers_of_a_step_taken_back_are_those_of_the_trial():
    tx = controlled(reject=True)
    _, grads, stats = run(CASE)
    start = tx.init(CASE.params)
    step, proposal = tx.propose(grads, start, CASE.params, stats=stats, batch=CASE.batch)
    _, state = tx.accept(step, proposal, before=torch.tensor(1.0), after=torch.tensor(2.0))
    (link,) = _tree.nodes(state, QuadraticModelState)
    assert close(link.value, MODEL.value(CASE.params, CASE.batch))
    assert link.learning_rate > 0
    assert int(link.step) == 0
    assert same(link.velocity, start.inner[-1].velocity)


def test_a_loss_that_is_not_a_number_is_a_loss_that_rises():
    tx = controlled(reject=True)
    _, grads, stats = run(CASE)
    step, proposal = tx.propose(grads, tx.init(CASE.params), CASE.params, stats=stats, batch=CASE.batch)
    updates, state = tx.accept(step, proposal, before=torch.tensor(1.0), after=torch.tensor(math.nan))
    assert all((leaf == 0).all() for leaf in _tree.leaves(updates))
    assert int(state.rejected) == 1
    assert damping(state) == pytest.approx(0.1 / 0.81)


def test_no_gradient_is_no_evidence():
    tx = controlled(rule=kf.levenberg_marquardt(interval=1), reject=True)
    zeros = _tree.tree_map(torch.zeros_like, CASE.params)
    updates, state = tx.update(zeros, tx.init(CASE.params), CASE.params, stats=run(CASE)[2], batch=CASE.batch)
    assert all((leaf == 0).all() for leaf in _tree.leaves(updates))
    assert damping(state) == 0.1
    assert state.ratio == 1
    assert int(state.rejected) == 0


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e4])
def test_calibrated_training_does_not_depend_on_the_scale_of_the_loss(factor: float):
    case = CASES["mlp"]._replace(targets=randn(8, 3, seed=4))
    found = []
    for scale in (1.0, factor):
        loss = kf.losses.mse(reduction="batchmean", scale=scale)
        tx = controlled(kf.quadratic_model(case.fn, loss), calibrate=True, damping=1e-3)
        found.append(trained(tx, 6, case._replace(loss=loss)))
    (one, first), (two, second) = found
    assert all(close(x, y, 1e-6) for x, y in zip(_tree.leaves(one), _tree.leaves(two), strict=True))
    assert close(second[-1].unit, factor * first[-1].unit, 1e-9)
    assert damping(second[-1]) == pytest.approx(factor * damping(first[-1]))


def test_the_unit_is_the_curvature_along_the_gradient_and_bounds_count_in_it():
    _, grads, _ = run(CASE)
    form = MODEL.form(CASE.params, CASE.batch, [grads], grads, 1.0)
    rule = kf.levenberg_marquardt(interval=1, decay=0.9, min=0.095)
    _, states = trained(controlled(rule=rule, calibrate=True), 4)
    assert close(states[0].unit, form.curvature[0, 0] / form.damping[0, 0])
    assert damping(states[-1]) == pytest.approx(0.095 * float(states[0].unit))
    assert same(states[-1].unit, states[0].unit)


def test_damping_by_path_moves_together():
    inner = kf.chain(kf.kfac(damping={"first*": 0.1, "**": 0.4}), kf.scale_by_quadratic_model(MODEL))
    tx = kf.adapt_damping(inner, kf.levenberg_marquardt(interval=1, decay=0.9), model=MODEL)
    _, states = trained(tx, 2)
    now: Any = inside(states[-1])[0].damping
    assert float(now["**"] / now["first*"]) == pytest.approx(4.0)
    assert float(now["first*"]) != 0.1
    (link,) = _tree.nodes(states[-1], QuadraticModelState)
    assert link.penalty > 0


def test_an_ensemble_adapts_member_by_member():
    stacked = _tree.tree_map(lambda p: torch.stack([p, 1.5 * p]), CASE.params)
    tx = kf.adapt_damping(
        kf.chain(kf.kfac(damping=0.1, refresh_every=1), kf.scale_by_quadratic_model(MODEL)),
        kf.levenberg_marquardt(interval=2, decay=0.9),
        model=MODEL,
        reject=True,
        calibrate=True,
    )
    step = kf.value_grad_and_stats(CASE.fn, CASE.loss, estimator=kf.estimators.exact())
    plan = kf.make_plan(CASE.fn, CASE.params, CASE.inputs)

    def two(params: PyTree) -> tuple[PyTree, PyTree]:
        state = tx.init(params)
        for _ in range(2):
            _, grads, stats = step(params, CASE.batch, plan=plan)
            updates, state = tx.update(grads, state, params, stats=stats, batch=CASE.batch)
            params = kf.apply_updates(params, updates)
        return params, inside(state)[0].damping

    together = torch.func.vmap(two)(stacked)
    for k in range(2):
        alone = two(_tree.tree_map(lambda p, k=k: p[k], stacked))
        mine = _tree.tree_map(lambda p, k=k: p[k], together)
        assert all(close(x, y, 1e-8) for x, y in zip(_tree.leaves(mine), _tree.leaves(alone), strict=True))


def test_roundings_of_a_converged_loss_move_nothing():
    x = randn(64, 4, seed=1).float()
    y = x @ randn(4, 2, seed=2).float() + 1
    loss = kf.losses.mse()
    model = kf.quadratic_model(linear, loss)
    step = kf.value_grad_and_stats(linear, loss, estimator=kf.estimators.exact())
    tx = controlled(model, reject=True, rule=kf.levenberg_marquardt(interval=1, decay=0.9))
    params = {"w": torch.zeros(4, 2), "b": torch.zeros(2)}
    y = y + 0.1 * randn(64, 2, seed=3).float()  # the loss stays above zero, its changes do not
    state, found = tx.init(params), []
    for _ in range(80):
        _, grads, stats = step(params, (x, y))
        updates, state = tx.update(grads, state, params, stats=stats, batch=(x, y))
        params = kf.apply_updates(params, updates)
        found.append(damping(state))
    assert found[40] == found[-1]
    assert int(state.rejected) == 0
