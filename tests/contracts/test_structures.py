"""The contract of every structure: a row per structure, checked on blocks of the zoo; and a mutant per contract."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import Block, Diagonal, merged
from kfac_func.curvature import KroneckerState, Structure
from tests import oracles
from tests.zoo import CASES, close, measured, randn, subset

DAMPING = 0.03
BLOCKS = {
    "linear": ("mlp", "first.w"),
    "no bias": ("recurrent", "input"),
    "several uses": ("recurrent", "hidden"),
    "conv": ("conv", "first.weight"),
    "groups": ("grouped", "conv.weight"),
    "embedding": ("tokens", "embedding.weight"),
    "tied": ("tied", "embedding"),
    "norm": ("tokens", "norm.weight"),
}


def _full(factor: Any) -> Tensor:
    return torch.diag_embed(factor.values) if isinstance(factor, Diagonal) else factor


def _kronecker(state: KroneckerState, damping: float, split: str) -> Tensor:
    a, g, t = merged(state)
    return oracles.damped(_full(a), _full(g), float(t), damping, split)


def _diagonal(state: Any, damping: float, split: str) -> Tensor:
    del split
    d = state.squares.flatten()
    return torch.diag(d + damping)


def _identity(state: Any, damping: float, split: str) -> Tensor:
    del damping, split
    return torch.eye(int(state.size), dtype=torch.float64)


class Row(NamedTuple):
    """A structure, the dense damped matrix that it inverts, and where it can be used."""

    structure: Structure
    matrix: Callable[[Any, float, str], Tensor]
    splits: tuple[str, ...] = ("exact",)
    damps: bool = True


ROWS = {
    "identity": Row(kf.curvature.identity(), _identity, damps=False),
    "diagonal": Row(kf.curvature.diagonal(), _diagonal),
    "cholesky": Row(kf.curvature.kronecker(), _kronecker, ("pi", "none", "exact")),
    "eigh": Row(kf.curvature.kronecker("eigh"), _kronecker, ("pi", "none", "exact")),
}


@cache
def _block(name: str) -> Block:
    case, block = BLOCKS[name]
    return measured(CASES[case])[block]


class Subject(NamedTuple):
    """What a contract looks at. `matrix` is what the structure claims to invert, made from the true state."""

    structure: Structure
    state: Any
    split: str
    shape: torch.Size
    matrix: Callable[[float], Tensor]

    def solve(self, v: Tensor, damping: float = DAMPING) -> Tensor:
        s = self.structure
        return s.solve(s.factorize(self.state, torch.tensor(damping, dtype=torch.float64), self.split), v)


def _subject(row: Row, block: str, split: str) -> Subject:
    b = _block(block)
    state = row.structure.measure(b)
    shape = kf.curvature.diagonal().measure(b).squares.shape
    return Subject(row.structure, state, split, shape, lambda damping: row.matrix(state, damping, split))


def _every() -> list:
    return [
        pytest.param(row, block, split, id=f"{name}-{split}-{block}")
        for name, row in ROWS.items()
        for block, (case, path) in BLOCKS.items()
        for split in row.splits
        if not row.structure.matrix or CASES[case].blocks[path].form != "vector"
    ]


def inverts(subject: Subject) -> None:
    """(F̂ + λ) v = u."""
    u = randn(*subject.shape)
    assert close(subject.matrix(DAMPING) @ subject.solve(u).flatten(), u.flatten(), 1e-9)


def linear(subject: Subject) -> None:
    u, w = randn(*subject.shape), randn(*subject.shape, seed=1)
    assert close(subject.solve(2 * u - 3 * w), 2 * subject.solve(u) - 3 * subject.solve(w), 1e-9)


def zero(subject: Subject) -> None:
    assert torch.count_nonzero(subject.solve(torch.zeros(subject.shape, dtype=torch.float64))) == 0


def symmetric(subject: Subject) -> None:
    for seed in range(3):
        u, w = randn(*subject.shape, seed=seed), randn(*subject.shape, seed=seed + 3)
        assert close((u * subject.solve(w)).sum(), (w * subject.solve(u)).sum(), 1e-9)


def positive(subject: Subject) -> None:
    for seed in range(3):
        u = randn(*subject.shape, seed=seed)
        assert (u * subject.solve(u)).sum() > 0


def far(subject: Subject) -> None:
    """λ v → u as λ → ∞, at the rate of F/λ (√(F/λ) when factored)."""
    u = randn(*subject.shape)
    assert close(1e14 * subject.solve(u, 1e14), u, 1e-4)


def near(subject: Subject) -> None:
    """λ → 0: the inverse of F̂ itself, whatever the split. On a state without small eigenvalues."""
    a, g = (_regular(f) for f in (subject.state.a, subject.state.g))
    sure = subject._replace(state=subject.state._replace(a=a, g=g))
    u = randn(*subject.shape)
    t = subject.state.positions**2 / subject.state.kept
    wanted = torch.linalg.solve(t * oracles.kron(_full(g), _full(a)), u.flatten())
    assert close(sure.solve(u, 1e-18).flatten(), wanted, 1e-6)


def _regular(factor: Any) -> Any:
    if isinstance(factor, Diagonal):
        return Diagonal(factor.values + factor.values.mean())
    scale = factor.diagonal(dim1=-2, dim2=-1).mean()
    return factor + scale * torch.eye(factor.shape[-1], dtype=factor.dtype)


def single(subject: Subject) -> None:
    """float32 against its own float64 run."""
    u = randn(*subject.shape)
    state = tree_map(lambda x: x.float() if x.is_floating_point() else x, subject.state)
    found = subject._replace(state=state).solve(u.float())
    assert found.dtype == torch.float32
    assert close(found.double(), subject.solve(u), 1e-4)


CONTRACTS = {f.__name__: f for f in (inverts, linear, zero, symmetric, positive, far, near, single)}


def _contracts() -> list:
    """Every contract on every subject: only damped structures have limits, and `near` wants one Kronecker product."""
    return [
        pytest.param(*p.values, contract, id=f"{p.id}-{name}")
        for p in _every()
        for name, contract in CONTRACTS.items()
        if (contract is not far or p.values[0].damps)
        and (contract is not near or (p.values[0].structure.matrix and p.values[1] != "tied"))
    ]


@pytest.mark.parametrize(("row", "block", "split", "contract"), _contracts())
def test_contract(row, block, split, contract):
    contract(_subject(row, block, split))


@pytest.mark.parametrize(("row", "block", "split"), _every())
def test_vmap_is_a_loop(row, block, split):
    subject, s = _subject(row, block, split), row.structure
    states = [tree_map(lambda x, c=c: c * x, subject.state) if row.damps else subject.state for c in (1.0, 2.5, 0.3)]
    vs = torch.stack([randn(*subject.shape, seed=k) for k in range(3)])
    damping = torch.tensor(DAMPING, dtype=torch.float64)

    def run(state: Any, v: Tensor) -> Tensor:
        return s.solve(s.factorize(state, damping, split), v)

    stacked = tree_map(lambda *x: torch.stack(x), *states)
    found = torch.func.vmap(run)(stacked, vs)
    loop = torch.stack([run(state, v) for state, v in zip(states, vs, strict=True)])
    assert close(found, loop, 1e-9)
    assert not close(loop[0], run(states[0], vs[1]), 1e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_moments_are_means_over_examples(row, name):
    """What crosses ranks and micro-batches: the mean of the moments of equal parts is the moments of the whole."""
    case, structure = CASES[name], row.structure
    n = len(case.targets)
    parts = [measured(subset(case, k, k + 1)) for k in range(n)]
    for block, whole in measured(case).items():
        if structure.matrix and not whole.layout.matrix:
            continue
        every = [leaves(structure.measure(part[block])) for part in parts]
        for wanted, *found in zip(leaves(structure.measure(whole)), *every, strict=True):
            total = cast(Tensor, sum(found))
            assert close(total / n, wanted)
            if wanted.ndim > 0:
                assert not close(total, wanted, 1e-3)


# ------------------------------------------------------------------ mutants: every contract can turn red

CHOLESKY = ROWS["cholesky"].structure


def _other_order(factored: Any, v: Tensor) -> Tensor:
    """A ⊗ G in place of G ⊗ A."""
    o, i = v.shape
    return CHOLESKY.solve(factored, v.reshape(i, o).mT).mT.reshape(o, i)


def _without_bias(state: KroneckerState) -> KroneckerState:
    assert isinstance(state.a, Tensor)
    a = state.a.clone()
    a[-1], a[:, -1] = 0, 0
    return state._replace(a=a)


def _scaled_solve(change: Callable[[Tensor], Tensor]) -> Structure:
    return CHOLESKY._replace(solve=lambda factored, v: change(CHOLESKY.solve(factored, v)))


UNDAMPED = CHOLESKY._replace(
    factorize=lambda state, damping, split: CHOLESKY.factorize(state, 0 * damping + 0.1, split)
)
MUTANTS: dict[str, tuple] = {
    "swap A and G": (inverts, CHOLESKY._replace(solve=_other_order), None),
    "drop the bias column": (inverts, CHOLESKY, _without_bias),
    "forget 1/N": (inverts, CHOLESKY, lambda state: state._replace(g=8 * state.g)),
    "forget T": (
        inverts,
        CHOLESKY,
        lambda state: state._replace(positions=0 * state.kept + 1, kept=0 * state.kept + 1),
    ),
    "damping times T": (
        inverts,
        CHOLESKY._replace(
            factorize=lambda state, damping, split: CHOLESKY.factorize(state, damping * state.kept, split)
        ),
        None,
    ),
    "not linear": (linear, _scaled_solve(lambda v: v + 1e-6 * v.abs()), None),
    "not zero": (zero, _scaled_solve(lambda v: v + 1e-12), None),
    "not symmetric": (symmetric, _scaled_solve(lambda v: v.cumsum(0)), None),
    "negative": (positive, _scaled_solve(lambda v: -v), None),
    "damping ignored": (far, UNDAMPED, None),
    "damping stays": (near, UNDAMPED, None),
    "half precision": (
        single,
        _scaled_solve(lambda v: v.to(torch.bfloat16).to(v.dtype) if v.itemsize == 4 else v),
        None,
    ),
}


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize(("contract", "structure", "change"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_turn_their_contract_red(contract, structure, change, split):
    subject = _subject(ROWS["cholesky"], "conv", split)
    contract(subject)
    mutant = subject._replace(structure=structure)
    mutant = mutant if change is None else mutant._replace(state=change(subject.state))
    with pytest.raises(AssertionError):
        contract(mutant)


def test_every_contract_has_a_mutant():
    assert {f for f, _, _ in MUTANTS.values()} == set(CONTRACTS.values())
    assert {name for name, row in ROWS.items() if row.structure.matrix} == {"cholesky", "eigh"}
