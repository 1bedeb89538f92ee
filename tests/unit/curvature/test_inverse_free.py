"""Inverse-free roots: their fixed points in every structure, their safety, and that nothing is ever inverted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_func._tree import tree_map
from kfac_func.blocks import Diagonal, KroneckerState, densify, merged
from kfac_func.curvature.base import Batch, Structure
from kfac_func.curvature.inverse_free import inverse_free
from tests import oracles
from tests.contracts.structures import BLOCKS, block_of, shape_of
from tests.zoo import absorbed, close, randn

MATRICES = [name for name in BLOCKS if name != "norm"]
STRUCTURES: dict[str, Structure] = {
    "dense": inverse_free(),
    "lower": inverse_free("lower_triangular"),
    "blocks": inverse_free("block_diagonal", block_size=3),
    "diagonal": inverse_free("diagonal"),
    "adaptive": inverse_free(adaptive=True),
    "momentum": inverse_free(momentum=0.5),
}
DAMPING = torch.tensor(0.03, dtype=torch.float64)
every = pytest.mark.parametrize("s", STRUCTURES.values(), ids=STRUCTURES)


def moments_of(o: int = 6, i: int = 9, t: float = 3.0, *, scale: float = 1.0, seed: int = 0, n: int = 40) -> Any:
    """Factors of n random rows."""
    a, g = randn(n, i, seed=2 * seed), scale * randn(n, o, seed=2 * seed + 1)
    number = torch.tensor(t, dtype=torch.float64)
    return KroneckerState(a.T @ a / n, g.T @ g / n, number, number)


def advanced(s: Structure, moments: Any, state: Any = (), *, damping: Any = DAMPING, split: str = "pi", n: int = 1):
    state = s.absorb(state, Batch(moments, lambda question: None), torch.tensor(1.0, dtype=torch.float64))
    for _ in range(n):
        state = s.refresh(state, torch.as_tensor(damping, dtype=torch.float64), split)
    return state


def operator(state: Any) -> Tensor:
    """The dense C Cᵀ ⊗ K Kᵀ / T."""
    k, c = (densify(root).double() for root in state.roots)
    return oracles.kron((c @ c.mT).contiguous(), (k @ k.mT).contiguous()) / merged(state.factors)[2]


# ------------------------------------------------------------------ fixed points


@pytest.mark.parametrize("block", MATRICES)
@pytest.mark.parametrize("split", ["pi", "none"])
@pytest.mark.parametrize("name", ["dense", "lower", "blocks", "diagonal", "momentum"])
def test_it_converges_to_the_inverse_of_the_damped_factors(name, split, block):
    """The factors are seen in the structure's pattern, so one formula holds for all."""
    s = STRUCTURES[name]
    state = absorbed(s, block_of(block), split=split)
    for _ in range(60 if name == "momentum" else 10):
        state = s.refresh(state, DAMPING, split)
    a, g, t = merged(state.factors)
    wanted = oracles.damped(densify(a), densify(g), float(t), float(DAMPING), split)
    u = randn(*shape_of(block_of(block)))
    assert close(wanted @ s.solve(s.factorize(state, DAMPING, split), u).flatten(), u.flatten(), 1e-9)


def test_the_structures_differ_and_lower_is_triangular():
    block = block_of("conv")
    states = {name: absorbed(s, block) for name, s in STRUCTURES.items()}
    full = operator(states["dense"])
    assert close(operator(states["lower"]), full, 1e-6)
    assert torch.count_nonzero(states["lower"].roots.k.triu(1)) == 0
    assert torch.count_nonzero(states["dense"].roots.k.triu(1)) > 0
    assert not close(operator(states["blocks"]), full, 1e-2)
    assert not close(operator(states["diagonal"]), full, 1e-2)
    assert isinstance(states["diagonal"].roots.k, Diagonal)


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_the_joint_fixed_point_of_the_adaptive_step(t):
    """At λ → 0 the inverse of T · G ⊗ A; at λ > 0 the stationary point of both sides."""
    s, moments = STRUCTURES["adaptive"], moments_of(t=t)
    state = advanced(s, moments, damping=1e-14, n=40, split="exact")
    assert close(operator(state) @ (t * oracles.kron(moments.g, moments.a)), torch.eye(54).double(), 1e-6)
    state, lam = advanced(s, moments, n=40), DAMPING / t
    k, c = state.roots
    h, e, eye = k.T @ moments.a @ k, c.T @ moments.g @ c, torch.eye
    assert close((e.trace() * h + lam * (c.T @ c).trace() * k.T @ k) / 6, eye(9).double(), 1e-9)
    assert close((h.trace() * e + lam * (k.T @ k).trace() * c.T @ c) / 9, eye(6).double(), 1e-9)


def test_small_steps_arrive_as_well():
    slow, moments = inverse_free(step=0.1), moments_of()
    state = advanced(slow, moments)
    fast = operator(advanced(STRUCTURES["dense"], moments))
    assert not close(operator(state), fast, 1e-3)
    for _ in range(300):
        state = slow.refresh(state, DAMPING, "pi")
    assert close(operator(state), fast, 1e-9)


def test_it_follows_slow_statistics_with_one_step_per_refresh():
    s = STRUCTURES["dense"]
    state = advanced(s, moments_of())
    stale = operator(state)
    for seed in range(1, 60):
        state = s.absorb(state, Batch(moments_of(seed=seed), lambda question: None), torch.tensor(0.05).double())
        state = s.refresh(state, DAMPING, "pi")
    inverse = _inverse(state.factors)
    assert float((operator(state) - inverse).norm() / inverse.norm()) < 0.02
    assert float((stale - inverse).norm() / inverse.norm()) > 0.2


def _inverse(factors: KroneckerState) -> Tensor:
    a, g, t = merged(factors)
    return torch.linalg.inv(oracles.damped(densify(a), densify(g), float(t), float(DAMPING), "pi"))


# ------------------------------------------------------------------ the operator


@pytest.mark.parametrize("block", MATRICES)
@every
def test_solve_is_its_own_dense_matrix(s, block):
    state, shape = absorbed(s, block_of(block)), shape_of(block_of(block))
    factored, matrix = s.factorize(state, DAMPING, "pi"), operator(state)
    u, w = randn(*shape), randn(*shape, seed=1)

    def solve(v: Tensor) -> Tensor:
        return s.solve(factored, v)

    assert close(solve(u).flatten(), matrix @ u.flatten(), 1e-9)
    assert close(solve(2 * u - w), 2 * solve(u) - solve(w), 1e-9)
    assert close((w * solve(u)).sum(), (u * solve(w)).sum(), 1e-9)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    assert torch.count_nonzero(solve(0 * u)) == 0


@pytest.mark.parametrize("block", MATRICES)
@every
def test_large_damping_gives_the_gradient(s, block):
    state, u = absorbed(s, block_of(block), damping=1e14), randn(*shape_of(block_of(block)))
    factored = s.factorize(state, torch.tensor(1e14).double(), "pi")
    assert close(1e14 * s.solve(factored, u), u, 1e-4)


@every
def test_dense_is_the_averaged_product(s):
    moments = moments_of()
    assert close(s.dense(advanced(s, moments)), 3 * oracles.kron(moments.g, moments.a))


@every
def test_vmap_is_a_loop(s):
    moments = [moments_of(seed=k, scale=10.0**k) for k in range(3)]
    vs = torch.stack([randn(6, 9, seed=k) for k in range(3)])

    def solved(moments: Any, v: Tensor) -> Tensor:
        state = advanced(s, moments, n=3)
        return s.solve(s.factorize(state, DAMPING, "pi"), v)

    found = torch.vmap(solved)(tree_map(lambda *x: torch.stack(x), *moments), vs)
    loop = torch.stack([solved(m, v) for m, v in zip(moments, vs, strict=True)])
    assert all(close(x, y, 1e-9) for x, y in zip(found, loop, strict=True))
    assert not close(found[0], found[1], 1e-3)


@every
def test_its_derivative_in_the_damping(s):
    moments, v = moments_of(), randn(6, 9)

    def energy(damping: Tensor) -> Tensor:
        state = advanced(s, moments, n=3, damping=damping)
        return (v * s.solve(s.factorize(state, damping, "pi"), v)).sum()

    lam, h = DAMPING, 1e-6
    wanted = (energy(lam + h) - energy(lam - h)) / (2 * h)
    assert wanted < 0
    assert close(torch.func.grad(energy)(lam), wanted, 1e-5)


def test_nothing_observed_is_the_identity_over_the_damping():
    s = STRUCTURES["dense"]
    empty = tree_map(torch.zeros_like, advanced(s, moments_of()))
    v = randn(6, 9)
    assert close(s.solve(s.factorize(empty, torch.tensor(0.5).double(), "pi"), v), 2 * v)
    state = advanced(s, tree_map(torch.zeros_like, moments_of()), damping=1.0)
    assert close(s.solve(s.factorize(state, torch.tensor(1.0).double(), "pi"), v), v)
