"""Inverse-free roots: their fixed points in every structure, their safety, and that nothing is ever inverted."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_func as kf
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import Diagonal, KroneckerState, densify, merged
from kfac_func.curvature.base import Structure
from kfac_func.curvature.inverse_free import inverse_free
from kfac_func.damping import pi_split
from tests import oracles
from tests.contracts.structures import ADVERSARIAL, BLOCKS, block_of, shape_of
from tests.zoo import CASES, absorbed, close, direction, randn, run

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


def _moments(o: int = 6, i: int = 9, t: float = 3.0, *, scale: float = 1.0, seed: int = 0, n: int = 40) -> Any:
    """Factors of n random rows."""
    a, g = randn(n, i, seed=2 * seed), scale * randn(n, o, seed=2 * seed + 1)
    number = torch.tensor(t, dtype=torch.float64)
    return KroneckerState(a.T @ a / n, g.T @ g / n, number, number)


def _advanced(s: Structure, moments: Any, state: Any = (), *, damping: Any = DAMPING, split: str = "pi", n: int = 1):
    state = s.absorb(state, lambda frame: moments, torch.tensor(1.0, dtype=torch.float64))
    for _ in range(n):
        state = s.refresh(state, torch.as_tensor(damping, dtype=torch.float64), split)
    return state


def _operator(state: Any) -> Tensor:
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
    full = _operator(states["dense"])
    assert close(_operator(states["lower"]), full, 1e-6)
    assert torch.count_nonzero(states["lower"].roots.k.triu(1)) == 0
    assert torch.count_nonzero(states["dense"].roots.k.triu(1)) > 0
    assert not close(_operator(states["blocks"]), full, 1e-2)
    assert not close(_operator(states["diagonal"]), full, 1e-2)
    assert isinstance(states["diagonal"].roots.k, Diagonal)


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_the_joint_fixed_point_of_the_adaptive_step(t):
    """At λ → 0 the inverse of T · G ⊗ A; at λ > 0 the stationary point of both sides."""
    s, moments = STRUCTURES["adaptive"], _moments(t=t)
    state = _advanced(s, moments, damping=1e-14, n=40, split="exact")
    assert close(_operator(state) @ (t * oracles.kron(moments.g, moments.a)), torch.eye(54).double(), 1e-6)
    state, lam = _advanced(s, moments, n=40), DAMPING / t
    k, c = state.roots
    h, e, eye = k.T @ moments.a @ k, c.T @ moments.g @ c, torch.eye
    assert close((e.trace() * h + lam * (c.T @ c).trace() * k.T @ k) / 6, eye(9).double(), 1e-9)
    assert close((h.trace() * e + lam * (k.T @ k).trace() * c.T @ c) / 9, eye(6).double(), 1e-9)


def test_small_steps_arrive_as_well():
    slow, moments = inverse_free(step=0.1), _moments()
    state = _advanced(slow, moments)
    fast = _operator(_advanced(STRUCTURES["dense"], moments))
    assert not close(_operator(state), fast, 1e-3)
    for _ in range(300):
        state = slow.refresh(state, DAMPING, "pi")
    assert close(_operator(state), fast, 1e-9)


def test_it_follows_slow_statistics_with_one_step_per_refresh():
    s = STRUCTURES["dense"]
    state = _advanced(s, _moments())
    stale = _operator(state)
    for seed in range(1, 60):
        state = s.absorb(state, lambda frame, k=seed: _moments(seed=k), torch.tensor(0.05).double())
        state = s.refresh(state, DAMPING, "pi")
    inverse = _inverse(state.factors)
    assert float((_operator(state) - inverse).norm() / inverse.norm()) < 0.02
    assert float((stale - inverse).norm() / inverse.norm()) > 0.2


def _inverse(factors: KroneckerState) -> Tensor:
    a, g, t = merged(factors)
    return torch.linalg.inv(oracles.damped(densify(a), densify(g), float(t), float(DAMPING), "pi"))


# ------------------------------------------------------------------ the operator


@pytest.mark.parametrize("block", MATRICES)
@every
def test_solve_is_its_own_dense_matrix(s, block):
    state, shape = absorbed(s, block_of(block)), shape_of(block_of(block))
    factored, matrix = s.factorize(state, DAMPING, "pi"), _operator(state)
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
    moments = _moments()
    assert close(s.dense(_advanced(s, moments)), 3 * oracles.kron(moments.g, moments.a))


@every
def test_vmap_is_a_loop(s):
    moments = [_moments(seed=k, scale=10.0**k) for k in range(3)]
    vs = torch.stack([randn(6, 9, seed=k) for k in range(3)])

    def solved(moments: Any, v: Tensor) -> Tensor:
        state = _advanced(s, moments, n=3)
        return s.solve(s.factorize(state, DAMPING, "pi"), v)

    found = torch.vmap(solved)(tree_map(lambda *x: torch.stack(x), *moments), vs)
    loop = torch.stack([solved(m, v) for m, v in zip(moments, vs, strict=True)])
    assert all(close(x, y, 1e-9) for x, y in zip(found, loop, strict=True))
    assert not close(found[0], found[1], 1e-3)


@every
def test_its_derivative_in_the_damping(s):
    moments, v = _moments(), randn(6, 9)

    def energy(damping: Tensor) -> Tensor:
        state = _advanced(s, moments, n=3, damping=damping)
        return (v * s.solve(s.factorize(state, damping, "pi"), v)).sum()

    lam, h = DAMPING, 1e-6
    wanted = (energy(lam + h) - energy(lam - h)) / (2 * h)
    assert wanted < 0
    assert close(torch.func.grad(energy)(lam), wanted, 1e-5)


def test_nothing_observed_is_the_identity_over_the_damping():
    s = STRUCTURES["dense"]
    empty = tree_map(torch.zeros_like, _advanced(s, _moments()))
    v = randn(6, 9)
    assert close(s.solve(s.factorize(empty, torch.tensor(0.5).double(), "pi"), v), 2 * v)
    state = _advanced(s, tree_map(torch.zeros_like, _moments()), damping=1.0)
    assert close(s.solve(s.factorize(state, torch.tensor(1.0).double(), "pi"), v), v)


# ------------------------------------------------------------------ safety


@pytest.mark.parametrize("block", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("damping", [0.0, 0.03])
@every
def test_adversarial_layers_leave_it_finite(s, block, damping):
    state = absorbed(s, block, damping=damping)
    for _ in range(10):
        state = s.refresh(state, torch.tensor(damping).double(), "pi")
    assert all(leaf.isfinite().all() for leaf in leaves(state))
    assert all(leaf.isfinite().all() for leaf in leaves(s.factorize(state, torch.tensor(0.03).double(), "pi"))[2:])


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"structure": "lower_triangular"}], ids=str)
@pytest.mark.parametrize("dead", ["g", "both", "neither"])
def test_singular_factors_without_damping_do_not_overflow(dead, options):
    """Roots grow by 3/2 a step in directions without curvature, up to what float32 can tell from zero."""
    moments = _moments(n=1)
    a, g = (0 * x if dead in (side, "both") else x for x, side in ((moments.a, "a"), (moments.g, "g")))
    moments = tree_map(lambda x: x.float(), moments._replace(a=a, g=g))
    state = _advanced(inverse_free(**options, warm_steps=300), moments, damping=torch.tensor(0.0))
    assert all(leaf.isfinite().all() for leaf in leaves(state))
    k, c = (densify(root).abs().max() for root in state.roots)
    assert k * c > 10


@pytest.mark.parametrize(
    ("steps", "options"), [(1000, {}), (300, {"adaptive": True}), (300, {"structure": "lower_triangular"})], ids=str
)
def test_a_thousand_steps_in_half_precision(steps, options):
    """Drifting statistics that jump by 1e4 either way: finite, positive definite, near the float32 run."""
    jumps, v, states = (
        [1.0, 1e2, 1.0, 1e-2],
        randn(6, 9).float(),
        cast(dict[torch.dtype, Any], {torch.bfloat16: (), torch.float32: ()}),
    )
    runs = {dtype: inverse_free(**options, dtype=dtype) for dtype in states}
    errors = []
    for k in range(steps):
        moments = tree_map(lambda x: x.float(), _moments(seed=k, scale=jumps[k // 50 % 4], n=12))
        for dtype, s in runs.items():
            state = s.absorb(states[dtype], lambda frame, m=moments: m, torch.tensor(0.05 if k else 1.0))
            states[dtype] = s.refresh(state, torch.tensor(1e-3), "pi")
        half, single = (s.solve(s.factorize(states[d], torch.tensor(1e-3), "pi"), v) for d, s in runs.items())
        assert half.isfinite().all()
        assert half.dtype == torch.float32
        assert (v * half).sum() > 0
        errors.append((half - single).norm() / single.norm())
    assert {leaf.dtype for leaf in leaves(states[torch.bfloat16].roots)} == {torch.bfloat16}
    assert torch.linalg.eigvalsh(_operator(states[torch.bfloat16])).min() > 0
    errors = torch.stack(errors).sort().values
    assert 1e-5 < errors[steps // 2] < 0.01
    assert errors[int(0.98 * steps)] < 0.03  # a few steps after a jump neither has arrived
    assert errors[-1] < 0.2


class Watched(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.__name__)
        return func(*args, **(kwargs or {}))


FORBIDDEN = ("linalg", "inv", "eigh", "cholesky", "triangular", "qr", "svd", "lu", "solve", "geqrf")


def _forbidden(seen: set[str]) -> set[str]:
    return {name for name in seen for word in FORBIDDEN if name.startswith((word, f"_{word}"))}


@every
def test_nothing_is_inverted(s):
    with Watched() as watched:
        state = _advanced(s, _moments(), n=3)
        s.solve(s.factorize(state, DAMPING, "pi"), randn(6, 9))
    assert watched.seen >= {"mm.default"} or "mul.Tensor" in watched.seen
    assert not _forbidden(watched.seen)
    k = kf.curvature.kronecker()
    with Watched() as watched:
        k.factorize(_moments(), DAMPING, "pi")
    assert _forbidden(watched.seen)


def test_the_memory_of_a_diagonal_is_linear():
    block = block_of("linear")
    o, i = shape_of(block)
    sizes = {}
    for name in ("dense", "diagonal", "blocks"):
        state = absorbed(STRUCTURES[name], block)
        sizes[name] = sum(leaf.numel() for leaf in leaves(state))
    assert sizes["diagonal"] == 2 * (o + i) + 2
    assert sizes["blocks"] <= 2 * 3 * (o + i) + 2
    assert sizes["dense"] == 2 * (o * o + i * i) + 2


# ------------------------------------------------------------------ options, and the whole library

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "structure": {"structure": "diagonal"},
    "triangular": {"structure": "lower_triangular"},
    "blocks": {"structure": "block_diagonal", "block_size": 3},
    "smaller blocks": {"structure": "block_diagonal", "block_size": 2},
    "adaptive": {"adaptive": True},
    "step": {"step": 0.3},
    "steps": {"steps": 2},
    "warm_steps": {"warm_steps": 3},
    "momentum": {"momentum": 0.5},
    "dtype": {"dtype": torch.bfloat16},
}


def test_every_option_changes_the_output_and_the_name():
    case = CASES["conv"]
    batches = [run(case._replace(inputs=c * case.inputs))[2] for c in (1.0, 0.7, 1.6)]
    grads, found = run(case)[1], {}
    for name, options in OPTIONS.items():
        tx = kf.kfac(inverse_free(**options), damping=0.01)
        updates, state = None, tx.init(case.params)
        for stats in batches:
            updates, state = tx.update(grads, state, stats=stats)
        found[name] = torch.cat([leaf.flatten() for leaf in leaves(updates)])
    names = list(found)
    for k, one in enumerate(names):
        assert not any(close(found[one], found[two], 1e-7) for two in names[k + 1 :]), one
    assert len({inverse_free(**options).name for options in OPTIONS.values()}) == len(OPTIONS)


@pytest.mark.parametrize("name", ["mlp", "conv", "grouped", "tokens", "tied", "recurrent"])
def test_one_step_of_the_library_is_that_of_kronecker(name):
    """The first refresh is warm: close to K-FAC itself at once."""
    one = direction(CASES[name], curvature=inverse_free(), damping=0.03)
    two = direction(CASES[name], curvature=kf.curvature.kronecker(), damping=0.03)
    assert all(close(one[path], two[path], 1e-6) for path in one)


def test_shifts_are_those_of_the_split():
    s, moments = STRUCTURES["dense"], _moments(scale=1e-3)
    shifts = pi_split(moments.a, moments.g, DAMPING / 3)
    k = _advanced(s, moments).roots.k
    assert close(k.T @ (moments.a + shifts[0] * torch.eye(9).double()) @ k, torch.eye(9).double(), 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "hierarchical"},
        {"structure": "block_diagonal"},
        {"block_size": 3},
        {"structure": "block_diagonal", "block_size": 0},
        {"step": 0.0},
        {"step": 1.5},
        {"steps": 0},
        {"warm_steps": 0},
        {"momentum": 1.0},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_values_without_meaning(options, unchecked):
    with pytest.raises(kf.errors.HyperparameterError, match=r"of inverse_free has no meaning"):
        inverse_free(**options)


def test_exact_damping_is_refused_with_the_way_out():
    with pytest.raises(kf.errors.HyperparameterError, match="adaptive=True"):
        _advanced(STRUCTURES["dense"], _moments(), split="exact")
    exact, factored = (_advanced(STRUCTURES["adaptive"], _moments(), split=split) for split in ("exact", "none"))
    assert close(_operator(exact), _operator(factored), 1e-6)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_one_graph_equal_to_eager():
    s, moments = STRUCTURES["lower"], _moments()
    state = _advanced(s, moments)
    compiled = torch.compile(lambda state: s.refresh(state, DAMPING, "pi"), fullgraph=True, backend="aot_eager")
    for one, two in zip(leaves(compiled(state)), leaves(s.refresh(state, DAMPING, "pi")), strict=True):
        torch.testing.assert_close(one, two)
