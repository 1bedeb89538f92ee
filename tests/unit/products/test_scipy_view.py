"""Products as SciPy's operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import nn

import kfac_func as kf
from tests import oracles
from tests.unit.products.test_curvature import flat
from tests.zoo import CASES, curvature_of, randn, run

NAME = "mean_square"


def dense() -> np.ndarray:
    return curvature_of(NAME).whole(sorted(oracles.flat(CASES[NAME].params))).numpy()


def operator() -> LinearOperator:
    case = CASES[NAME]
    return kf.products.as_scipy(kf.products.ggn_vp(case.fn, case.loss)(case.params, case.batch), case.params)


def test_it_is_the_matrix():
    got = operator().matmat(np.eye(len(dense())))
    assert operator().dtype == np.float64
    np.testing.assert_allclose(got, dense(), atol=1e-12)
    np.testing.assert_allclose(operator().rmatmat(np.eye(len(dense()))), dense().T, atol=1e-12)


def test_top_eigenvalues():
    values, vectors = eigsh(operator(), k=3, which="LA", v0=np.ones(len(dense())))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense())[-3:], rtol=1e-9)
    np.testing.assert_allclose(dense() @ vectors, vectors * values, atol=1e-9)


def test_conjugate_gradients_with_a_preconditioner():
    """(F + λ)x = g, and K-FAC as the preconditioner."""
    case, damping = CASES[NAME], 0.1
    _, grads, stats = run(case)
    state = kf.observe(kf.kfac(damping=damping).init(case.params), stats)
    product = kf.products.ggn_vp(case.fn, case.loss)(case.params, case.batch)
    damped = kf.products.as_scipy(lambda v: {k: x + damping * v[k] for k, x in product(v).items()}, case.params)
    solve = kf.products.as_scipy(lambda v: kf.precondition(state, v), case.params)
    wanted = np.linalg.solve(dense() + damping * np.eye(len(dense())), flat(grads).numpy())
    for m in (None, solve):
        x, failed = cg(damped, flat(grads).numpy(), rtol=1e-12, M=m)
        assert not failed
        np.testing.assert_allclose(x, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_come_in_float32(dtype):
    fn, params = kf.make_functional(nn.Linear(3, 2).to(dtype))
    batch = randn(4, 3).to(dtype), randn(4, 2).to(dtype)
    product = kf.products.ggn_vp(fn, kf.losses.mse())(params, batch)
    got = kf.products.as_scipy(product, params)
    assert got.dtype == np.float32
    moved = got @ np.ones(8)
    assert moved.dtype == np.float32
    wanted = product({k: torch.ones_like(x) for k, x in params.items()})
    np.testing.assert_array_equal(moved, flat(wanted).float().numpy())


def test_gradients_are_left_alone():
    params = {"w": torch.ones(3, requires_grad=True)}
    got = kf.products.as_scipy(lambda v: {"w": params["w"] * v["w"]}, params) @ np.arange(3.0)
    np.testing.assert_array_equal(got, [0, 1, 2])
