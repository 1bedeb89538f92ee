"""Damping by path and the l2 coefficient: every block is solved with its own λ_l, in every curvature."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import HyperparameterError
from kfac_func.state import map_damping
from tests import oracles
from tests.theorems.test_natural_gradient import raveled, whole
from tests.theorems.test_two_level import matrix_of
from tests.zoo import CASES, Case, close, run

C = kf.curvature
CASE = CASES["conv"]
_, GRADS, STATS = run(CASE)
RULES = {"first.*": 0.5, "*.bias": 7.0, "head.*": 0.01, "**": 0.1}
OWN = {"first.weight": 0.5, "second.weight": 0.1, "head.weight": 0.01}
BLOCKWISE: dict[str, Any] = {
    "kronecker": C.kronecker(),
    "kronecker, exact": C.kronecker("eigh"),
    "eigen": C.eigen(),
    "kpsvd": C.kpsvd(),
    "corrected": C.corrected(),
    "inverse_free": C.inverse_free(),
    "diagonal": C.diagonal(),
    "block_diagonal": C.blockwise(C.block_diagonal(), C.block_diagonal()),
    "by_path": C.by_path({"head.*": C.diagonal(), "**": C.kronecker()}),
}


def direction(curvature: Any = None, grads: Any = GRADS, stats: Any = STATS, **options: Any) -> dict[str, Tensor]:
    tx = kf.kfac(curvature, **options)
    return tx.update(grads, tx.init(CASE.params), stats=stats)[0]


def equal(one: Any, two: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tree.leaves(one), _tree.leaves(two), strict=True))


@pytest.mark.parametrize("name", BLOCKWISE)
def test_every_block_has_the_damping_of_its_first_pattern(name):
    """Weight and bias together: a block is named by its weight, so that no pattern for biases matters."""
    rules = {pattern: value for pattern, value in RULES.items() if pattern != "*.bias"}
    split = "exact" if name.endswith("exact") else "pi"
    found = direction(BLOCKWISE[name], damping=rules, split=split)
    for block, value in OWN.items():
        wanted = direction(BLOCKWISE[name], damping=value, split=split)
        for leaf in (block, block.replace("weight", "bias")):
            assert torch.equal(found[leaf], wanted[leaf])
    assert not close(found["first.weight"], direction(BLOCKWISE[name], damping=0.1, split=split)["first.weight"], 1e-3)


def test_a_pattern_of_biases_names_no_block():
    with pytest.raises(HyperparameterError, match=r"'\*\.bias' of damping matches nothing"):
        direction(damping=RULES)


def test_the_first_match_decides():
    one, two = (direction(damping=rules) for rules in ({"**": 0.1, "head.*": 0.01}, {"head.*": 0.01, "**": 0.1}))
    assert equal(one, direction(damping=0.1))
    assert torch.equal(two["head.weight"], direction(damping=0.01)["head.weight"])


VALUES: dict[str, Callable[[float], Any]] = {
    "number": lambda value: value,
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "schedule": lambda value: lambda count: value * (1 + count).double(),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_numbers_tensors_and_schedules(kind):
    tx = kf.kfac(damping={"head.*": VALUES[kind](0.01), "**": 0.1}, refresh_every=1)
    state = tx.init(CASE.params)
    for k in range(3):
        found, state = tx.update(GRADS, state, stats=STATS)
        head = 0.01 * (1 + k) if kind == "schedule" else 0.01
        assert state.damping.keys() == {"head.*", "**"}
        assert [(x.dtype, x.shape) for x in state.damping.values()] == [(torch.float64, ())] * 2
        assert float(state.damping["head.*"]) == pytest.approx(head, abs=1e-15)
        assert float(state.damping["**"]) == 0.1
        assert close(found["head.weight"], direction(damping=head)["head.weight"], 1e-12)
        assert close(found["first.weight"], direction(damping=0.1)["first.weight"], 1e-12)


def coordinates(case: Case, values: dict[str, float]) -> Tensor:
    """λ_l for every raveled parameter, by the path of its leaf."""
    return torch.cat(
        [torch.full((x.numel(),), values[path], dtype=x.dtype) for path, x in oracles.flat(case.params).items()]
    )


LEAVES = {path: OWN[path.replace("bias", "weight")] for path in GRADS}
PLAIN = {"first.*": 0.5, "head.*": 0.01, "**": 0.1}


def test_the_natural_gradient_has_a_diagonal_damping():
    """(F + Λ)⁻¹ g with the dense F of the whole net."""
    found, shift = direction(C.full(), damping=PLAIN), coordinates(CASE, LEAVES)
    wanted = torch.linalg.solve(whole("conv") + shift.diag(), raveled(GRADS, CASE))
    assert close(raveled(found, CASE), wanted, 1e-9)


@pytest.mark.parametrize("form", ["residual", "additive"])
@pytest.mark.parametrize("coarse", ["nicolaides", "residual"])
def test_two_levels_have_a_diagonal_damping(coarse, form):
    """R₀ (F + Λ) R₀ᵀ and F + Λ in the residual, against dense matrices."""
    tx = kf.kfac(C.two_level(C.kronecker(), coarse, form=form), damping=PLAIN)
    found, state = tx.update(GRADS, tx.init(CASE.params), stats=STATS)
    g, zeta = raveled(GRADS, CASE), raveled(direction(damping=PLAIN), CASE)
    f = whole("conv") + coordinates(CASE, LEAVES).diag()
    if coarse == "nicolaides":
        r0 = matrix_of(state, CASE)
    else:
        r = g - f @ zeta
        pieces = dict(zip(oracles.flat(CASE.params), r.split([x.numel() for x in GRADS.values()]), strict=True))
        z = raveled(direction(grads={p: x.reshape(GRADS[p].shape) for p, x in pieces.items()}, damping=PLAIN), CASE)
        owner = coordinates(CASE, {path: list(OWN).index(path.replace("bias", "weight")) for path in GRADS})
        r0 = torch.stack([torch.where(owner == k, z, 0.0) for k in range(3)])
    right = r0 @ (g - f @ zeta if form == "residual" else g)
    wanted = zeta + r0.T @ torch.linalg.solve(r0 @ f @ r0.T, right)
    assert close(raveled(found, CASE), wanted, 1e-9)


def test_tangents_and_ensembles_of_a_damping_by_path():
    """Through every λ flows a gradient, and many of them are tried at once."""

    def after(head: Tensor, rest: Tensor) -> Tensor:
        found = direction(damping={"head.*": head, "**": rest})
        return torch.stack([(v * GRADS[path]).sum() for path, v in found.items()]).sum()

    at = torch.tensor(0.03, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    slopes, e = torch.func.grad(after, argnums=(0, 1))(*at), 1e-6
    assert close(slopes[0], (after(at[0] + e, at[1]) - after(at[0] - e, at[1])) / (2 * e), 1e-6)
    assert close(slopes[1], (after(at[0], at[1] + e) - after(at[0], at[1] - e)) / (2 * e), 1e-6)
    many = torch.tensor([0.01, 0.03, 0.5], dtype=torch.float64)
    found = torch.func.vmap(after, in_dims=(0, None))(many, at[1])
    assert close(found, torch.stack([after(x, at[1]) for x in many]))


def test_a_rule_can_multiply_all_of_the_damping():
    """As Levenberg-Marquardt does; what is no schedule stays multiplied."""
    for damping in (0.1, {"head.*": 0.01, "**": 0.1}):
        tx = kf.chain(kf.kfac(damping=damping, refresh_every=1), kf.scale(1.0))
        _, state = tx.update(GRADS, tx.init(CASE.params), stats=STATS)
        moved = map_damping(state, lambda value: 3 * value)
        found, after = tx.update(GRADS, moved, stats=STATS)
        tripled = {p: 3 * x for p, x in damping.items()} if isinstance(damping, dict) else 3 * damping
        wanted = direction(damping=tripled)
        assert all(close(found[path], wanted[path], 1e-12) for path in GRADS)
        assert equal(after[0].damping, moved[0].damping)
        assert not equal(state[0].damping, moved[0].damping)


def test_a_state_with_rules_survives_a_file_and_is_described():
    tx = kf.kfac(damping={"head.*": 0.01, "**": 0.1}, l2=0.5, l2_mask="*.weight", refresh_every=2)
    _, state = tx.update(GRADS, tx.init(CASE.params), stats=STATS)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert kf.describe(state).startswith(
        "kfac: blockwise(kronecker[cholesky], diagonal), damping 0.01 for head.*, 0.1 for ** + l2 0.5, split pi"
    )
    found, wanted = (tx.update(GRADS, one, stats=STATS, refresh=True) for one in (loaded, state))
    assert equal(found, wanted)


@pytest.mark.compile
def test_a_damping_by_path_compiles_in_one_graph():
    tx = kf.kfac(damping={"head.*": lambda count: 0.01 * (1 + count), "**": 0.1}, l2=0.5, l2_mask="head.*")
    _, state = tx.update(GRADS, tx.init(CASE.params), stats=STATS)
    torch._dynamo.reset()

    def step(state: Any) -> Any:
        return tx.update(GRADS, state, stats=STATS, refresh=True)

    found, wanted = torch.compile(step, fullgraph=True, backend="eager")(state), step(state)
    torch.testing.assert_close(_tree.leaves(found), _tree.leaves(wanted), rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------ the l2 term

MASKS: dict[str, tuple[Any, set[str]]] = {
    "all": (None, set(OWN)),
    "pattern": ("head.*", {"head.weight"}),
    "patterns": (["head.weight", "first.weight"], {"head.weight", "first.weight"}),
    "biases only": ("*.bias", set()),
    "function": (lambda params: {path: "second" in path for path in params}, {"second.weight"}),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("curvature", ["kronecker", "kronecker, exact", "eigen", "diagonal"])
def test_the_l2_coefficient_joins_the_damping_of_the_weights_that_it_covers(curvature, mask):
    """λ_l + γ, and nothing else: the gradient is what it was."""
    given, covered = MASKS[mask]
    found = direction(BLOCKWISE[curvature], damping=0.1, l2=0.3, l2_mask=given)
    for block in OWN:
        wanted = direction(BLOCKWISE[curvature], damping=0.1 + 0.3 if block in covered else 0.1)
        for leaf in (block, block.replace("weight", "bias")):
            assert close(found[leaf], wanted[leaf], 1e-12)


def test_the_l2_coefficient_is_the_curvature_of_the_penalty():
    """With the exact damping, v = (F + λ + γ)⁻¹ g: one step on a quadratic objective with its penalty minimises it."""
    case, gamma = CASES["deep_linear"], 0.2
    x, y = case.inputs, case.targets
    params = {"w": torch.ones(2, 3, dtype=torch.float64)}
    step: Any = kf.value_grad_and_stats(
        lambda p, x: x @ p["w"].T, kf.losses.mse("batchmean", scale=0.5), estimator=kf.estimators.exact()
    )
    tx = kf.chain(kf.add_decayed_weights(gamma), kf.kfac(damping=0.0, l2=gamma, split="exact"), kf.sgd(1.0))
    _, grads, stats = step(params, (x, y))
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    ridge = torch.linalg.solve(x.T @ x / len(x) + gamma * torch.eye(3).double(), x.T @ y / len(x)).T
    assert close(kf.apply_updates(params, updates)["w"], ridge, 1e-9)


def test_before_statistics_and_without_a_coefficient_nothing_changes():
    tx = kf.kfac(damping=0.1, l2=0.3)
    assert equal(tx.update(GRADS, tx.init(CASE.params))[0], GRADS)
    assert equal(direction(damping=0.1, l2=0.0, l2_mask="head.*"), direction(damping=0.1))
    with pytest.raises(HyperparameterError, match=r"'tail\.\*'"):
        kf.kfac(l2=0.0, l2_mask="tail.*").init(CASE.params)
