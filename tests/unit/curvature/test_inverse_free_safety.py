"""Inverse-free roots are safe, invert nothing and cost no more than their structure; every option has its effect."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_func as kf
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import densify
from kfac_func.curvature import Batch
from kfac_func.curvature.inverse_free import inverse_free
from kfac_func.damping import pi_split
from tests.contracts.structures import ADVERSARIAL, block_of, shape_of
from tests.unit.curvature.test_inverse_free import DAMPING, STRUCTURES, advanced, every, moments_of, operator
from tests.zoo import CASES, absorbed, close, direction, randn, run

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
    moments = moments_of(n=1)
    a, g = (0 * x if dead in (side, "both") else x for x, side in ((moments.a, "a"), (moments.g, "g")))
    moments = tree_map(lambda x: x.float(), moments._replace(a=a, g=g))
    state = advanced(inverse_free(**options, warm_steps=300), moments, damping=torch.tensor(0.0))
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
        moments = tree_map(lambda x: x.float(), moments_of(seed=k, scale=jumps[k // 50 % 4], n=12))
        for dtype, s in runs.items():
            state = s.absorb(states[dtype], Batch(moments, lambda question: None), torch.tensor(0.05 if k else 1.0))
            states[dtype] = s.refresh(state, torch.tensor(1e-3), "pi")
        half, single = (s.solve(s.factorize(states[d], torch.tensor(1e-3), "pi"), v) for d, s in runs.items())
        assert half.isfinite().all()
        assert half.dtype == torch.float32
        assert (v * half).sum() > 0
        errors.append((half - single).norm() / single.norm())
    assert {leaf.dtype for leaf in leaves(states[torch.bfloat16].roots)} == {torch.bfloat16}
    assert torch.linalg.eigvalsh(operator(states[torch.bfloat16])).min() > 0
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
        state = advanced(s, moments_of(), n=3)
        s.solve(s.factorize(state, DAMPING, "pi"), randn(6, 9))
    assert watched.seen >= {"mm.default"} or "mul.Tensor" in watched.seen
    assert not _forbidden(watched.seen)
    k = kf.curvature.kronecker()
    with Watched() as watched:
        k.factorize(moments_of(), DAMPING, "pi")
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
    s, moments = STRUCTURES["dense"], moments_of(scale=1e-3)
    shifts = pi_split(moments.a, moments.g, DAMPING / 3)
    k = advanced(s, moments).roots.k
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
        advanced(STRUCTURES["dense"], moments_of(), split="exact")
    exact, factored = (advanced(STRUCTURES["adaptive"], moments_of(), split=split) for split in ("exact", "none"))
    assert close(operator(exact), operator(factored), 1e-6)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_one_graph_equal_to_eager():
    s, moments = STRUCTURES["lower"], moments_of()
    state = advanced(s, moments)
    compiled = torch.compile(lambda state: s.refresh(state, DAMPING, "pi"), fullgraph=True, backend="aot_eager")
    for one, two in zip(leaves(compiled(state)), leaves(s.refresh(state, DAMPING, "pi")), strict=True):
        torch.testing.assert_close(one, two)
