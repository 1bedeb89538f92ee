"""The linear operator of a state against matrices written out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from kfac_func.blocks import pack
from kfac_func.precondition.rules import block_damping
from kfac_func.state import KFacState
from tests.zoo import CASES, Case, run

C = kf.curvature
STRUCTURES: dict[str, tuple[Any, Any]] = {
    "kronecker": (C.kronecker(), "exact"),
    "pi": (C.kronecker(), "pi"),
    "none": (C.kronecker(), "none"),
    "sua": (C.kronecker(sua=True), "exact"),
    "blocks": (C.kronecker(max_dim=2), "pi"),
    "flat": (C.kronecker(max_dim=2, oversize="diagonal"), "exact"),
    "eigen": (C.eigen(), "exact"),
    "kpsvd": (C.kpsvd(), "pi"),
    "kpsvd exact": (C.kpsvd(), "exact"),
    "diagonal": (C.diagonal(), "exact"),
    "by_path": ((), "exact"),
}
DENSE: dict[str, tuple[Any, Any]] = {
    "deflation": (C.deflation(), "pi"),
    "block_diagonal": (C.blockwise(C.block_diagonal(), C.block_diagonal()), "exact"),
    "inverse_free": (C.inverse_free(), "pi"),
    "identity": (C.blockwise(C.identity(), C.identity()), "exact"),
}
NETS = ["mlp", "conv", "grouped", "tokens", "tied", "attention"]
structures = pytest.mark.parametrize("structure", STRUCTURES)
nets = pytest.mark.parametrize("net", NETS)


def same(got: Any, wanted: Any, tolerance: float) -> None:
    """Two trees with equal numbers, relative to the largest."""
    one, two = (_tree.ravel(tree)[0] for tree in (got, wanted))
    torch.testing.assert_close(one, two, rtol=0, atol=tolerance * float(two.abs().max()))


@cache
def fitted(structure: str, net: str, damping: float = 0.3) -> tuple[Case, KFacState]:
    case, (curvature, split) = CASES[net], (STRUCTURES | DENSE)[structure]
    if structure == "by_path":  # rules without a block are refused, so each net has its own
        curvature = C.by_path({next(iter(case.blocks)): C.eigen(), "**": C.kronecker()})
    state = kf.kfac(curvature, damping=damping, split=split).init(case.params)
    return case, kf.observe(state, run(case)[2])


def places(case: Case, state: KFacState) -> dict[str, Tensor]:
    """By block, where the entries of its array V are among all parameters, one after the other in tree order."""
    vector, back = _tree.ravel(case.params)
    numbers = _tree.unique_paths(back(torch.arange(len(vector)).to(vector)))
    return {at.name: pack(at, numbers).flatten().long() for at in state.rules.value.layouts}


def undamped(case: Case, state: KFacState) -> Tensor:
    """F̂ from the dense blocks of the curvature."""
    size = len(_tree.ravel(case.params)[0])
    matrix = torch.zeros(size, size, dtype=torch.float64)
    where, blocks = places(case, state), state.rules.value.curvature.dense(state.curvature)
    for name, block in blocks.items():
        matrix[where[name].unsqueeze(1), where[name]] = block.to(torch.float64)
    return matrix


@nets
@structures
def test_solve_is_precondition(structure: str, net: str):
    case, state = fitted(structure, net)
    grads = run(case)[1]
    operator = kf.linear_operator(state, case.params)
    same(operator.solve(grads), kf.precondition(state, grads), 1e-9)
    same(operator.matvec(operator.solve(grads)), grads, 1e-9)


@nets
@pytest.mark.parametrize("structure", ["kronecker", "sua", "flat", "eigen", "kpsvd exact", "diagonal", "by_path"])
def test_exact_damping_adds_the_identity(structure: str, net: str):
    case, state = fitted(structure, net)
    matrix = undamped(case, state)
    for damping in (0.3, 0.0, 2.5):
        found = kf.linear_operator(state, case.params, damping=damping).to_dense()
        torch.testing.assert_close(found, matrix + damping * torch.eye(len(matrix)).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("structure", ["deflation", "block_diagonal", "inverse_free"])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_without_damping_it_is_the_dense_curvature(structure: str, net: str):
    case, state = fitted(structure, net)
    values, basis = torch.linalg.eigh(undamped(case, state))
    matrix = (basis * values.clamp(min=0)) @ basis.mT  # deflation may be indefinite
    torch.testing.assert_close(kf.linear_operator(state, case.params, damping=0).to_dense(), matrix, rtol=0, atol=1e-9)


def test_identity_is_undamped():
    case, state = fitted("identity", "mlp")
    found = kf.linear_operator(state, case.params, damping=7.0).to_dense()
    torch.testing.assert_close(found, torch.eye(len(found), dtype=torch.float64))


@pytest.mark.parametrize("net", ["mlp", "conv", "tied"])
@pytest.mark.parametrize("structure", ["pi", "eigen", "kpsvd", "diagonal"])
def test_functions_of_the_operator(structure: str, net: str):
    case, state = fitted(structure, net)
    operator = kf.linear_operator(state, case.params)
    matrix = operator.to_dense()
    values, basis = torch.linalg.eigh(matrix)
    torch.testing.assert_close(operator.trace(), matrix.trace(), rtol=1e-8, atol=0)
    torch.testing.assert_close(operator.logdet(), torch.logdet(matrix), rtol=1e-8, atol=1e-8)
    found = torch.cat(list(operator.eigenvalues().values())).sort().values
    torch.testing.assert_close(found, values, rtol=1e-8, atol=1e-10)
    vector, back = _tree.ravel(run(case)[1])
    for p in (-1, -0.5, 0.5, 2, 1 / 3, torch.tensor(-1.7)):
        wanted = (basis * values**p) @ (basis.mT @ vector)
        torch.testing.assert_close(_tree.ravel(operator.power(p)(back(vector)))[0], wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("structure", "net"), [("kronecker", "mlp"), ("eigen", "conv"), ("diagonal", "tokens")])
def test_draws_have_the_inverse_as_covariance(structure: str, net: str, generator: torch.Generator):
    """Each entry of an empirical covariance has variance (C_ii C_jj + C_ij²)/n."""
    case, state = fitted(structure, net)
    operator = kf.linear_operator(state, case.params)
    wanted, n = torch.linalg.inv(operator.to_dense()), 20_000
    noise = {
        path: torch.randn(n, *x.shape, generator=generator, dtype=x.dtype)
        for path, x in _tree.unique_paths(case.params).items()
    }
    stacked = _tree.with_leaves(case.params, list(noise.values()))
    draws = torch.func.vmap(lambda e: _tree.ravel(operator.sample(noise=e))[0])(stacked)
    error = ((wanted.diagonal().outer(wanted.diagonal()) + wanted.square()) / n).sqrt()
    off = ((draws.mT @ draws / n - wanted) / error).abs()
    assert (off <= 3).double().mean() > 0.99  # normal numbers: 0.9973
    assert off.max() < 5.5
    assert ((draws.mean(0) / wanted.diagonal().sqrt()) * n**0.5).abs().max() < 5


def test_a_draw_follows_its_generator():
    case, state = fitted("eigen", "mlp")
    operator = kf.linear_operator(state, case.params)
    before = torch.get_rng_state()
    one, two, other = (operator.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    same(one, two, 0)
    assert not torch.equal(_tree.ravel(one)[0], _tree.ravel(other)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_vectors_may_lack_blocks():
    case, state = fitted("kronecker", "mlp")
    operator, grads = kf.linear_operator(state, case.params), run(case)[1]
    found = operator.solve({"first": grads["first"], "second": {"w": None, "b": None}})
    same(found["first"], operator.solve(grads)["first"], 1e-12)
    assert found["second"]["w"] is None


def test_leaves_without_curvature():
    """A leaf that is never read has F̂ = 0; one with the policy "identity" is left alone."""

    def fn(p: Any, x: Tensor) -> Tensor:
        return (x @ p["w"]) * p["gain"]

    params = {"w": torch.ones(3, 2).double(), "gain": torch.ones(2).double(), "idle": torch.ones(4).double()}
    exact = kf.estimators.exact()
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=exact, unclaimed={"gain": "identity"})
    _, grads, stats = step(params, (torch.eye(3).double(), torch.ones(3, 2).double()))
    state = kf.observe(kf.kfac(damping=0.5, split="exact").init(params), stats)
    operator = kf.linear_operator(state, params)
    values = operator.eigenvalues()
    assert values["gain"].tolist() == [1, 1]
    assert values["idle"].tolist() == [0.5] * 4
    same(operator.solve(grads)["gain"], kf.precondition(state, grads)["gain"], 0)
    found = operator.sample(torch.Generator().manual_seed(0))
    assert found["idle"].shape == (4,)
    by_pattern = kf.observe(kf.kfac(damping={"w": 0.5, "**": 0.25}, split="exact").init(params), stats)
    assert kf.linear_operator(by_pattern, params).eigenvalues()["idle"].tolist() == [0.25] * 4


def test_it_knows_dampings_by_path_and_the_l2_term():
    case = CASES["mlp"]
    settings: dict[str, Any] = {"damping": {"first.*": 0.2, "**": 0.7}, "split": "exact", "l2": 0.05}
    state = kf.observe(kf.kfac(**settings).init(case.params), run(case)[2])
    assert {name: float(value) for name, value in block_damping(state).items()} == {"first.w": 0.25, "second.w": 0.75}
    grads = run(case)[1]
    same(kf.linear_operator(state, case.params).solve(grads), kf.precondition(state, grads), 1e-10)


def test_it_is_a_pytree_under_vmap_and_grad():
    case, state = fitted("kronecker", "mlp")
    two = _tree.tree_map(lambda x: torch.stack([x, 2 * x]), state.curvature)

    def logdet(curvature: Any) -> Tensor:
        return kf.linear_operator(state._replace(curvature=curvature), case.params, damping=0.3).logdet()

    wanted = [logdet(_tree.tree_map(lambda x, k=k: x[k], two)) for k in (0, 1)]
    torch.testing.assert_close(torch.func.vmap(logdet)(two), torch.stack(wanted))

    def of(damping: Tensor) -> Tensor:
        return kf.linear_operator(state, case.params, damping=damping).logdet()

    damping = torch.tensor(0.3, dtype=torch.float64)
    slope = torch.func.grad(of)(damping)
    matrix = kf.linear_operator(state, case.params, damping=0.3).to_dense()
    torch.testing.assert_close(slope, torch.linalg.inv(matrix).trace(), rtol=1e-8, atol=0)  # d log det(F + λ) / dλ


def test_a_chain_has_it_inside():
    case, state = fitted("kronecker", "mlp")
    tx = kf.chain(kf.kfac(damping=0.3, split="exact"), kf.sgd(0.1))
    inside = kf.observe(tx.init(case.params), run(case)[2])
    same(kf.linear_operator(inside, case.params).to_dense(), kf.linear_operator(state, case.params).to_dense(), 1e-12)
