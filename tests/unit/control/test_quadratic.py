"""The quadratic model against dense matrices, and the rate and momentum that it chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from kfac_func.control.quadratic_model import solve_semidefinite
from tests import oracles
from tests.zoo import CASES, Case, close, randn, run

CASE, PADDING = CASES["mlp"], 0


def like(case: Case, seed: int) -> Any:
    leaves = [randn(*leaf.shape, seed=seed + k) for k, leaf in enumerate(_tree.leaves(case.params))]
    return _tree.with_leaves(case.params, leaves)


def joined(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in _tree.leaves(tree)])


def dense(case: Case) -> Tensor:
    order = [path for path, _ in _tree.leaves_with_paths(case.params)]
    return oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value).whole(order)


@pytest.mark.parametrize("name", CASES)
def test_the_curvature_is_that_of_the_dense_matrix(name: str):
    case = CASES[name]
    vs = [like(case, 1), like(case, 50), like(case, 90)]
    if name == "tokens":  # backwards torch leaves out the row of `padding_idx`, forwards it does not
        for v in vs:
            v["embedding.weight"][PADDING] = 0
    form = kf.quadratic_model(case.fn, case.loss).form(case.params, case.batch, vs, vs[2], 0.3)
    columns = torch.stack([joined(v) for v in vs], dim=1)
    assert close(form.curvature, columns.T @ dense(case) @ columns, 1e-9)
    assert close(form.damping, 0.3 * columns.T @ columns)
    assert close(form.slope, columns.T @ columns[:, 2])
    assert close(form.value, case.value(case.fn(case.params, case.inputs), case.targets))


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_the_curvature_is_that_of_the_loss_in_its_own_reduction(reduction: str):
    targets = randn(8, 3, seed=4)

    def value(z: Tensor, t: Tensor) -> Tensor:
        total = F.mse_loss(z, t, reduction="mean" if reduction == "mean" else "sum")
        return total / len(z) if reduction == "batchmean" else total

    case = CASE._replace(loss=kf.losses.mse(reduction=reduction), value=value, targets=targets)
    v = like(case, 1)
    form = kf.quadratic_model(case.fn, case.loss).form(case.params, case.batch, [v], v)
    assert close(form.curvature[0, 0], joined(v) @ dense(case) @ joined(v), 1e-9)
    second = torch.func.hessian(lambda z: value(z, targets))(CASE.fn(CASE.params, CASE.inputs)).reshape(24, 24)
    dz = torch.func.jvp(lambda p: CASE.fn(p, CASE.inputs), (CASE.params,), (v,))[1].reshape(-1)
    assert close(form.curvature[0, 0], dz @ second @ dz, 1e-9)


def test_l2_covers_its_mask_in_value_slope_and_curvature():
    v, g = like(CASE, 1), like(CASE, 50)
    mask = ["*.w"]
    plain = kf.quadratic_model(CASE.fn, CASE.loss).form(CASE.params, CASE.batch, [v], g)
    form = kf.quadratic_model(CASE.fn, CASE.loss, l2=0.2, mask=mask).form(CASE.params, CASE.batch, [v], g)
    w, vw = (torch.cat([t["first"]["w"].reshape(-1), t["second"]["w"].reshape(-1)]) for t in (CASE.params, v))
    assert close(form.l2[0, 0], 0.2 * vw @ vw)
    assert close(form.slope - plain.slope, (0.2 * w @ vw)[None])
    assert close(form.value - plain.value, 0.1 * w @ w)
    assert close(kf.quadratic_model(CASE.fn, CASE.loss, l2=0.2, mask=mask).value(CASE.params, CASE.batch), form.value)


def test_damping_by_leaf_weighs_each_leaf():
    v = like(CASE, 1)
    form = kf.quadratic_model(CASE.fn, CASE.loss).form(
        CASE.params, CASE.batch, [v], v, {"first.w": torch.tensor(2.0), "second.b": 3.0}
    )
    assert close(form.damping[0, 0], 2 * v["first"]["w"].square().sum() + 3 * v["second"]["b"].square().sum())


def test_examples_are_the_first_of_the_batch():
    v = like(CASE, 1)
    few = kf.quadratic_model(CASE.fn, CASE.loss, examples=3).form(CASE.params, CASE.batch, [v], v)
    cut = CASE.inputs[:3], CASE.targets[:3]
    assert torch.equal(few.curvature, kf.quadratic_model(CASE.fn, CASE.loss).form(CASE.params, cut, [v], v).curvature)
    assert not close(few.curvature, kf.quadratic_model(CASE.fn, CASE.loss).form(CASE.params, CASE.batch, [v], v)[0])


def test_directions_may_have_holes():
    v = like(CASE, 1)
    holes = {"first": {"w": v["first"]["w"], "b": None}, "second": {"w": None, "b": None}}
    zeros = _tree.tree_map(torch.zeros_like, v) | {"first": {"w": v["first"]["w"], "b": 0 * v["first"]["b"]}}
    model = kf.quadratic_model(CASE.fn, CASE.loss)
    one, two = (model.form(CASE.params, CASE.batch, [d], v, 1.0) for d in (holes, zeros))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_the_minimizer_solves_the_damped_system():
    v, u, g = like(CASE, 1), like(CASE, 50), like(CASE, 90)
    form = kf.quadratic_model(CASE.fn, CASE.loss, l2=0.1).form(CASE.params, CASE.batch, [v, u], g, 0.3)
    matrix = form.curvature + form.l2 + form.damping
    assert close(form.minimizer([None, None]), -torch.linalg.solve(matrix, form.slope))
    w = form.minimizer([-0.5, None])
    assert w[0] == -0.5
    assert close(w[1], -(form.slope[1] - 0.5 * matrix[1, 0]) / matrix[1, 1])
    assert torch.equal(form.minimizer([1.0, 2.0]), torch.tensor([1.0, 2.0]).double())


def test_dependent_directions_get_nothing():
    v, g = like(CASE, 1), like(CASE, 90)
    model = kf.quadratic_model(CASE.fn, CASE.loss)
    alone = model.form(CASE.params, CASE.batch, [v], g).minimizer([None])
    for other in (_tree.tree_map(torch.zeros_like, v), kf.scale(2.0).update(v, ())[0]):
        w = model.form(CASE.params, CASE.batch, [v, other], g).minimizer([None, None])
        assert close(w[0], alone[0])
        assert w[1] == 0


def test_elimination_is_the_inverse():
    root = randn(3, 3, seed=7)
    matrix, b = root @ root.T, randn(3, seed=8)
    assert close(solve_semidefinite(matrix, b), torch.linalg.solve(matrix, b), 1e-9)
    assert torch.equal(solve_semidefinite(torch.zeros(2, 2), torch.ones(2)), torch.zeros(2))


def chained(**options: Any) -> kf.GradientTransformation:
    model = kf.quadratic_model(CASE.fn, CASE.loss)
    return kf.chain(kf.kfac(damping=0.1), kf.scale_by_quadratic_model(model, **options))


def steps(tx: kf.GradientTransformation, count: int = 3) -> tuple[list[Any], Any]:
    params, state, found = CASE.params, tx.init(CASE.params), []
    for _ in range(count):
        _, grads, stats = run(CASE._replace(params=params))
        updates, state = tx.update(grads, state, params, stats=stats, batch=CASE.batch)
        params = kf.apply_updates(params, updates)
        found.append((updates, state[-1], grads, state[0]))
    return found, params


def test_a_chain_takes_the_damping_of_its_preconditioner_and_the_gradient_that_entered_it():
    found, _ = steps(chained())
    (before, *_), (updates, state, grads, inner) = found[1:]
    params = kf.apply_updates(kf.apply_updates(CASE.params, found[0][0]), before)
    v = kf.precondition(inner, grads)
    columns = torch.stack([joined(v), joined(before)], dim=1)
    case = CASE._replace(params=params)
    matrix = columns.T @ dense(case) @ columns
    w = -torch.linalg.solve(matrix + 0.1 * columns.T @ columns, columns.T @ joined(grads))
    assert close(joined(updates), columns @ w, 1e-8)
    assert close(torch.stack([-state.learning_rate, state.momentum]), w, 1e-8)
    assert close(state.change, 0.5 * w @ matrix @ w + w @ columns.T @ joined(grads), 1e-8)
    assert close(state.penalty, 0.05 * joined(updates) @ joined(updates))
    assert torch.equal(joined(state.velocity), joined(updates))


def test_the_first_step_has_no_momentum_and_fixed_ones_are_kept():
    assert steps(chained(), 1)[0][0][1].momentum == 0
    assert steps(chained(momentum=0.5))[0][2][1].momentum == 0.5
    assert steps(chained(learning_rate=lambda count: 0.1 * (1 + count)))[0][2][1].learning_rate == pytest.approx(0.3)
    ordinary = joined(steps(chained())[1])
    for options in ({"momentum": 0.5}, {"learning_rate": 0.1}, {"damping": 1.0}):
        assert not close(joined(steps(chained(**options))[1]), ordinary, 1e-3)


def test_a_zero_gradient_gives_a_zero_step():
    tx = kf.scale_by_quadratic_model(kf.quadratic_model(CASE.fn, CASE.loss))
    zeros = _tree.tree_map(torch.zeros_like, CASE.params)
    updates, state = tx.update(zeros, tx.init(zeros), CASE.params, batch=CASE.batch, gradient=zeros)
    assert all((leaf == 0).all() for leaf in _tree.leaves(updates))
    assert state.change == 0
    assert state.learning_rate == 0


@pytest.mark.parametrize("missing", ["params", "batch", "gradient"])
def test_what_is_missing_is_named(missing: str):
    tx = kf.scale_by_quadratic_model(kf.quadratic_model(CASE.fn, CASE.loss))
    given: dict[str, Any] = {"params": CASE.params, "batch": CASE.batch, "gradient": CASE.params}
    given[missing] = None
    with pytest.raises(kf.errors.HyperparameterError, match=f"scale_by_quadratic_model needs {missing}"):
        tx.update(CASE.params, tx.init(CASE.params), given.pop("params"), **given)
