"""Every option changes the output; none is ignored."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch

import kfac_func as kf
from kfac_func._tree import leaves
from kfac_func.damping import Split
from tests import oracles
from tests.zoo import CASES, close, measured, run, unclaimed_case

CASE = CASES["conv"]
HALVES = [run(CASE._replace(inputs=c * CASE.inputs))[2] for c in (1.0, 0.7, 1.6)]
_, GRADS, STATS = run(CASE)


def _path(**options: Any) -> list[torch.Tensor]:
    """The last of several updates, on batches that differ."""
    tx = kf.kfac(**options)
    updates, state = None, tx.init(CASE.params)
    for stats in (*HALVES, *HALVES):
        updates, state = tx.update(GRADS, state, stats=stats)
    return leaves(updates)


def _differ(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return not any(close(a, b, 1e-6) for a, b in zip(one, two, strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "damping": {"damping": 1e-2},
    "split none": {"split": "none"},
    "split exact": {"split": "exact"},
    "decay": {"decay": 0.5},
    "decay 0": {"decay": 0.0},
    "average": {"average": "warmup"},
    "refresh": {"refresh_every": 4},
    "diagonal": {"curvature": kf.curvature.diagonal()},
    "identity": {"curvature": kf.curvature.identity()},
}
OUTPUTS = {name: _path(**options) for name, options in OPTIONS.items()}


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(OPTIONS, 2)))
def test_options_of_kfac(one, two):
    assert _differ(OUTPUTS[one], OUTPUTS[two])


def test_the_same_options_give_the_same_output():
    assert not _differ(_path(), OUTPUTS["default"])


def _first(**options: Any) -> list[torch.Tensor]:
    _, grads, stats = run(CASE, **options)
    tx = kf.kfac(damping=0.01)
    return leaves(tx.update(grads, tx.init(CASE.params), stats=stats)[0])


STEPS: dict[str, dict[str, Any]] = {
    "exact": {},
    "reduce": {"sharing": "reduce"},
    "empirical": {"estimator": kf.estimators.empirical()},
    "forward_only": {"estimator": kf.estimators.forward_only()},
    "monte_carlo": {"estimator": kf.estimators.monte_carlo()},
    "monte_carlo 2": {"estimator": kf.estimators.monte_carlo(2)},
    "curvature_prop": {"estimator": kf.estimators.curvature_prop()},
    "other seed": {"estimator": kf.estimators.monte_carlo(), "seed": 1},
}


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(STEPS, 2)))
def test_options_of_the_step(one, two):
    a, b = _first(**STEPS[one]), _first(**STEPS[two])
    paths = list(oracles.flat(CASE.params))
    convolutions = [k for k, path in enumerate(sorted(paths)) if not path.startswith("head")]
    assert _differ([a[k] for k in convolutions], [b[k] for k in convolutions])


def test_policies_of_unclaimed_leaves():
    case = unclaimed_case()
    _, grads, diagonal = run(case, unclaimed="diagonal")
    _, _, identity = run(case, unclaimed={"gain": "identity"})
    tx = kf.kfac(damping=0.01)
    one, two = (tx.update(grads, tx.init(case.params), stats=s)[0] for s in (diagonal, identity))
    assert close(two["gain"], grads["gain"])
    assert not close(one["gain"], grads["gain"], 1e-3)
    named, _ = tx.update(grads, tx.init(case.params), stats=run(case, strict=False)[2])
    assert close(named["gain"], grads["gain"])


def test_a_policy_takes_a_leaf_from_its_kind():
    case = CASES["mlp"]
    _, grads, stats = run(case, unclaimed={"second.*": "identity"})
    tx = kf.kfac(damping=0.01)
    updates, _ = tx.update(grads, tx.init(case.params), stats=stats)
    assert close(updates["second"]["w"], grads["second"]["w"])
    assert close(updates["second"]["b"], grads["second"]["b"])
    assert not close(updates["first"]["w"], grads["first"]["w"], 1e-3)


def test_solvers_differ_where_a_factor_is_not_positive():
    """Cholesky says so with NaN (and the factorisation before it stays), eigh cuts the negative eigenvalue."""
    a = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    one = torch.tensor(1.0, dtype=torch.float64)
    g = torch.eye(3, dtype=torch.float64)
    state = kf.curvature.KroneckerState(a, g, one, one)
    v, damping = torch.ones(3, 2, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    found = {}
    for solver in ("cholesky", "eigh"):
        k = kf.curvature.kronecker(solver)
        found[solver] = k.solve(k.factorize(state, damping, "none"), v)
    assert bool(found["cholesky"].isnan().any())
    wanted = oracles.damped(a.clamp(min=0), g, 1.0, 0.01, "none")
    assert close(wanted @ found["eigh"].flatten(), v.flatten())


def test_solvers_agree_elsewhere():
    one, two = _path(), _path(curvature=kf.curvature.kronecker("eigh"))
    assert all(close(a, b, 1e-9) for a, b in zip(one, two, strict=True))


def test_damping_may_be_a_tensor_or_a_schedule():
    fixed = _path(damping=0.02)
    assert not _differ(_path(damping=torch.tensor(0.02, dtype=torch.float64)), fixed)
    assert not _differ(_path(damping=lambda step: 0.02 + 0.0 * step), fixed)
    assert _differ(_path(damping=lambda step: 0.02 * (1.0 + step)), fixed)


def test_gradients_flow_through_the_damping():
    """The derivative of the update in λ, against differences."""
    stats = run(CASES["mlp"])[2]
    grads = run(CASES["mlp"])[1]

    def norm(damping: torch.Tensor, split: Split) -> torch.Tensor:
        tx = kf.kfac(damping=damping, split=split)
        updates, _ = tx.update(grads, tx.init(CASES["mlp"].params), stats=stats)
        products = [(u * g).sum() for u, g in zip(leaves(updates), leaves(grads), strict=True)]
        return cast(torch.Tensor, sum(products))

    at, h = torch.tensor(0.05, dtype=torch.float64), 1e-5
    for split in ("pi", "none", "exact"):
        slope = torch.func.grad(norm)(at, split)
        assert close(slope, (norm(at + h, split) - norm(at - h, split)) / (2 * h), 1e-6)
        assert slope < 0


def test_a_leaf_of_one_block_alone_is_packed_with_its_partner():
    """V = [W | b]: the bias takes part in the solve of its weight."""
    case = CASES["mlp"]
    block = measured(case)["first.w"]
    assert block.layout.leaves == ("first.w", "first.b")
    k = kf.curvature.kronecker()
    state = k.measure(block)
    _, grads, stats = run(case)
    tx = kf.kfac(damping=0.01, split="exact")
    updates, _ = tx.update(grads, tx.init(case.params), stats=stats)
    matrix = oracles.damped(state.a, state.g, 1.0, 0.01, "exact")
    packed, solved = (torch.cat([t["first"]["w"].T, t["first"]["b"][:, None]], 1) for t in (grads, updates))
    assert close(matrix @ solved.flatten(), packed.flatten(), 1e-9)
