"""Roots of inverses: products and projections of every form, Newton's rate, and steps that nothing throws off."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_func.blocks import Blocks, Diagonal, densify
from kfac_func.linalg.roots import excess, largest, limited, mean_within, moved, multiple, product, projected
from tests.zoo import close, randn

FORMS: dict[str, Any] = {
    "dense": randn(5, 5),
    "groups": randn(2, 5, 5),
    "diagonal": Diagonal(randn(5)),
    "diagonal groups": Diagonal(randn(2, 5)),
    "blocks": Blocks(randn(3, 2, 2), randn(1, 1, seed=1)),
    "blocks groups": Blocks(randn(2, 3, 2, 2), randn(2, 1, 1, seed=1)),
    "even blocks": Blocks(randn(3, 2, 2), randn(0, 0)),
}
each = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def _other(form: Any) -> Any:
    leaves = [form] if isinstance(form, Tensor) else list(form)
    new = [randn(*x.shape, seed=7 + k) for k, x in enumerate(leaves)]
    return new[0] if isinstance(form, Tensor) else type(form)(*new)


def _full(x: Any) -> Tensor:
    return densify(x)


@each
def test_products_and_traces_are_those_of_dense_matrices(form):
    x, y = form, _other(form)
    assert close(_full(product(x, y)), _full(x) @ _full(y))
    inner = _full(x).mT @ _full(y) @ _full(x)
    assert close(mean_within(x, y), inner.diagonal(dim1=-2, dim2=-1).mean(-1))
    assert close(mean_within(x), (_full(x).mT @ _full(x)).diagonal(dim1=-2, dim2=-1).mean(-1))
    assert close(_full(multiple(x, 3.0)), (3 * torch.eye(_full(x).shape[-1]).double()).expand_as(_full(x)))
    assert close(_full(excess(x, y)), (inner + inner.mT) / 4 - torch.eye(inner.shape[-1]).double() / 2)


def test_a_multiple_of_the_identity_per_group():
    c = torch.tensor([2.0, 5.0]).double()
    for name in ("groups", "diagonal groups", "blocks groups"):
        assert close(_full(multiple(FORMS[name], c))[:, 1, 1], c)


def test_the_lower_projection_is_the_adjoint_of_symmetrisation():
    """⟨Π(m), x⟩ over lower triangular x is ⟨m, x + xᵀ⟩ off the diagonal and ⟨m, x⟩ on it."""
    m = randn(5, 5)
    m = m + m.T
    low: Any = projected(m, lower=True)
    assert close(low, torch.diag(m.diagonal()) + 2 * m.tril(-1))
    assert close((low + low.T) / 2, m)
    assert close(_full(projected(randn(5, 5))), (randn(5, 5) + randn(5, 5).T) / 2)


@pytest.mark.parametrize("name", ["random", "one", "clustered", "lower", "zero"])
def test_the_largest_singular_value_is_never_missed_by_far(name):
    x = {
        "random": randn(60, 60),
        "one": torch.outer(randn(60), randn(60, seed=1)),
        "clustered": torch.eye(60).double(),
        "lower": randn(60, 60).tril(),
        "zero": torch.zeros(60, 60).double(),
    }[name]
    true, found = torch.linalg.matrix_norm(x, 2), largest(x)
    assert found <= true * (1 + 1e-12) + 1e-100
    assert found >= true / 2
    assert close(largest(1e-30 * x) * 1e30, found)
    assert close(largest(torch.stack([x, 2 * x])), torch.stack([found, 2 * found]))


@each
def test_no_direction_is_longer_than_a_half(form):
    big = limited(multiple(form, 1e6))
    assert 0.49 < _full(big).amax() < 1.1
    small = multiple(form, -0.3)
    assert close(_full(limited(small)), _full(small))


@pytest.mark.parametrize("lower", [False, True], ids=["dense", "lower"])
def test_it_converges_quadratically(lower):
    m = randn(12, 30) @ randn(12, 30).T / 30 + 0.1 * torch.eye(12)
    root: Any = torch.eye(12).double() / m.trace().sqrt()
    errors = []
    for _ in range(30):
        direction = excess(root, m, lower)
        errors.append(float(torch.linalg.matrix_norm(_full(direction), 2)))
        root = moved(root, direction, 1.0)
    assert close(root @ root.T @ m, torch.eye(12).double(), 1e-12)
    late = [(x, y) for x, y in pairwise(errors) if 1e-6 < x < 0.1]
    assert late
    assert all(y < 3 * x * x for x, y in late)
    assert lower == bool(torch.count_nonzero(root.triu(1)) == 0)


@pytest.mark.parametrize("lower", [False, True], ids=["dense", "lower"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_stream_throws_it_off(lower, dtype):
    root: Any = torch.eye(20, dtype=dtype)
    jumps = [1.0, 1e6, 1e-6, 1e10, 1e-2]
    for k in range(500):
        x = randn(20, 1 + k % 9, seed=k)
        m = (jumps[k // 7 % 5] * x @ x.T).to(dtype) + 1e-3 * torch.eye(20, dtype=dtype)
        root = moved(root, excess(root, m, lower), 1.0)
        assert root.isfinite().all()
    x = randn(20, 8)
    m = (x @ x.T).to(dtype) + torch.eye(20, dtype=dtype)
    for _ in range(60):
        root = moved(root, excess(root, m, lower), 1.0)
    assert close(root @ root.T @ m, torch.eye(20, dtype=dtype), 1e-9 if dtype == torch.float64 else 1e-4)
