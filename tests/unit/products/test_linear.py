"""J v and Jᵀ u against the Jacobian written out."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp, vmap

import kfac_func as kf
from tests.unit.products.test_curvature import flat, total, unflat
from tests.zoo import CASES, close, curvature_of, randn

names = pytest.mark.parametrize("name", CASES)


def jacobian(name: str) -> torch.Tensor:
    """[N D, P]"""
    j = curvature_of(name).jacobian
    return torch.cat([j[path].flatten(2) for path in sorted(j)], dim=-1).flatten(0, 1)


@names
def test_both_are_the_jacobian(name):
    case, j = CASES[name], jacobian(name)
    push = kf.products.jvp(case.fn)(case.params, case.inputs)
    columns = vmap(lambda e: push(unflat(case, e)).flatten())(torch.eye(total(case), dtype=torch.float64))
    assert close(columns.mT, j)
    pull, z = kf.products.vjp(case.fn)(case.params, case.inputs), case.fn(case.params, case.inputs)
    rows = vmap(lambda e: flat(pull(e.reshape(z.shape))))(torch.eye(len(j), dtype=torch.float64))
    assert close(rows, j)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_a_push_is_forward_mode(name):
    """Not for a padded embedding: torch has its padding row in the forward derivative, and not in the gradient."""
    case = CASES[name]
    v = unflat(case, randn(total(case), seed=5))
    wanted = jvp(lambda p: case.fn(p, case.inputs), (case.params,), (v,))[1]
    got = kf.products.jvp(case.fn)(case.params, case.inputs)(v)
    assert got.shape == wanted.shape
    assert close(got, wanted)


def test_vectors_may_be_differentiated():
    case = CASES["mlp"]
    push = kf.products.jvp(case.fn)(case.params, case.inputs)
    got = torch.func.grad(lambda v: push(v).square().sum() / 2)(case.params)
    j = jacobian("mlp")
    assert close(flat(got), j.T @ j @ flat(case.params))
