"""The contract of every structure of the table, on blocks of the zoo; and a mutant per contract."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kfac_func._tree import tree_map
from kfac_func.blocks import Block, Diagonal, densify
from kfac_func.curvature import KroneckerState, Structure
from tests import oracles
from tests.contracts.structures import BLOCKS, DAMPING, ROWS, Row, block_of, fits, shape_of
from tests.zoo import absorbed, close, randn


class Subject(NamedTuple):
    """What a contract looks at. `matrix` is what the structure claims to invert, made from the true state."""

    structure: Structure
    block: Block
    state: Any
    split: str
    matrix: Callable[[float], Tensor]

    @property
    def shape(self) -> torch.Size:
        return shape_of(self.block)

    def solve(self, v: Tensor, damping: float = DAMPING) -> Tensor:
        s = self.structure
        return s.solve(s.factorize(self.state, torch.tensor(damping, dtype=torch.float64), self.split), v)


@cache
def _subject(row: Row, name: str, split: str) -> Subject:
    block = block_of(name)
    state = absorbed(row.structure, block, damping=DAMPING, split=split)
    return Subject(row.structure, block, state, split, lambda damping: row.matrix(state, damping, split))


def _every() -> list:
    return [
        pytest.param(row, block, split, id=f"{name}-{split}-{block}")
        for name, row in ROWS.items()
        for block in BLOCKS
        for split in row.splits
        if fits(row, block_of(block))
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
    state = absorbed(subject.structure, subject.block, damping=1e14, split=subject.split)
    assert close(1e14 * subject._replace(state=state).solve(u, 1e14), u, 1e-4)


def near(subject: Subject) -> None:
    """λ → 0: the inverse of F̂ itself, whatever the split. On a state without small eigenvalues."""
    a, g = (_regular(f) for f in (subject.state.a, subject.state.g))
    sure = subject._replace(state=subject.state._replace(a=a, g=g))
    u = randn(*subject.shape)
    t = subject.state.positions**2 / subject.state.kept
    wanted = torch.linalg.solve(t * oracles.kron(densify(g), densify(a)), u.flatten())
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
    """Every contract on every subject: only damped structures have limits, and `near` wants one dense product."""
    plain = [ROWS["kronecker"], ROWS["kronecker eigh"]]
    return [
        pytest.param(*p.values, contract, id=f"{p.id}-{name}")
        for p in _every()
        for name, contract in CONTRACTS.items()
        if (contract is not far or p.values[0].damps)
        and (contract is not near or (p.values[0] in plain and p.values[1] != "tied"))
    ]


@pytest.mark.parametrize(("row", "block", "split", "contract"), _contracts())
def test_contract(row, block, split, contract):
    contract(_subject(row, block, split))


# ------------------------------------------------------------------ mutants: every contract can turn red

CHOLESKY = ROWS["kronecker"].structure


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
    subject = _subject(ROWS["kronecker"], "conv", split)
    contract(subject)
    mutant = subject._replace(structure=structure)
    mutant = mutant if change is None else mutant._replace(state=change(subject.state))
    with pytest.raises(AssertionError):
        contract(mutant)


def test_every_contract_has_a_mutant():
    assert {f for f, _, _ in MUTANTS.values()} == set(CONTRACTS.values())
