"""Eigenbases of blocks, and per-example gradients seen in them, against matrices written out."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_func.blocks import Blocks, Diagonal, Pairs, matrices, pairs, per_example
from kfac_func.linalg.spectral import Spectral, decomposed, elementwise, inner, seen_in, squared
from tests.zoo import CASES, measured


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, *lead: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(*lead, size, size, seed=seed))[0]


OUT, IN, GROUPS = 3, 4, 2
OPERATORS: dict[str, tuple[Spectral, tuple[int, ...]]] = {
    "product": (Spectral(orthogonal(IN), orthogonal(OUT, seed=1), randn(OUT, IN, seed=2).square()), (OUT, IN)),
    "groups": (
        Spectral(orthogonal(IN, GROUPS), orthogonal(OUT, GROUPS, seed=1), randn(GROUPS, OUT, IN, seed=2).square()),
        (GROUPS, OUT, IN),
    ),
    "diagonal side": (Spectral(Diagonal(torch.ones(IN).double()), orthogonal(OUT), randn(OUT, IN).square()), (OUT, IN)),
    "block side": (
        Spectral(Blocks(orthogonal(2, 1), orthogonal(2, seed=3)), orthogonal(OUT), randn(OUT, IN).square()),
        (OUT, IN),
    ),
    "elementwise": (elementwise(randn(OUT, IN).square()), (OUT, IN)),
    "vector": (elementwise(randn(5).square()), (5,)),
    "dense": (decomposed(randn(OUT * IN, 20) @ randn(OUT * IN, 20).mT / 50), (OUT, IN)),
}
operators = pytest.mark.parametrize("name", OPERATORS)


@operators
def test_functions(name: str):
    spectral, shape = OPERATORS[name]
    v, matrix = randn(*shape, seed=7), spectral.dense()
    values, basis = torch.linalg.eigh(matrix)
    assert torch.allclose(values, spectral.values.flatten().sort().values)
    for fn in (torch.sqrt, torch.exp, lambda s: s):
        wanted = (basis * fn(values)) @ (basis.mT @ v.flatten())
        torch.testing.assert_close(spectral.applied(fn, v).flatten(), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(spectral.restored(spectral.coordinates(v)).reshape(shape), v)


def rows(shape: tuple[int, ...], vectors: int, positions: int, shared: bool) -> Pairs:
    """Rows of 6 examples for an array V of this shape."""
    *lead, i = (*shape, 1) if len(shape) == 1 else shape
    width = 1 if shared else vectors
    return Pairs(randn(vectors, 6, positions, *lead), randn(width, 6, positions, *lead[:-1], i, seed=1))


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
@operators
def test_per_example_gradients_in_the_basis(name: str, vectors: int, positions: int, shared: bool):
    spectral, shape = OPERATORS[name]
    found = rows(shape, vectors, positions, shared)
    v = matrices(found).flatten(2)  # [V, B, p]
    power = (spectral.dense() @ v.mT).mT  # M v
    wanted = torch.einsum("vbp,wbp->bvw", v, power)
    seen = seen_in(spectral, found)
    torch.testing.assert_close(inner(seen, spectral.values), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(squared(seen, spectral.values), torch.einsum("bvv->vb", wanted), rtol=0, atol=1e-10)


@pytest.mark.parametrize("net", ["mlp", "conv", "grouped", "tokens", "tied", "recurrent"])
def test_the_rows_of_real_blocks(net: str):
    """Weights of 1 give the squared lengths of the per-example gradients, from rows of every kind."""
    for block in measured(CASES[net]).values():
        found = pairs(block)
        v = per_example(block).flatten(2) * block.examples**-0.5
        ones: Any = torch.ones_like(matrices(found)[0, 0])
        torch.testing.assert_close(squared(found, ones), v.square().sum(-1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(inner(found, ones), torch.einsum("vbp,wbp->bvw", v, v), rtol=1e-9, atol=1e-12)


def test_many_positions_come_in_chunks(monkeypatch: pytest.MonkeyPatch):
    spectral, shape = OPERATORS["product"]
    found = rows(shape, 2, 3, False)
    seen = seen_in(spectral, found)
    whole = inner(seen, spectral.values), squared(seen, spectral.values)
    monkeypatch.setattr(sys.modules["kfac_func.blocks.pairs"], "BUDGET", 2 * OUT * IN)
    torch.testing.assert_close(inner(seen, spectral.values), whole[0])
    torch.testing.assert_close(squared(seen, spectral.values), whole[1])


def test_negative_eigenvalues_are_cut():
    assert decomposed(torch.diag(torch.tensor([-1.0, 2.0]))).values.flatten().tolist() == [0.0, 2.0]
