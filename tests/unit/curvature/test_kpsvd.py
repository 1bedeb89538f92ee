"""The nearest Kronecker product to the exact block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, StateError
from kfac_func._tree import leaves
from kfac_func.curvature.kpsvd import kpsvd
from kfac_func.linalg.sums import Terms
from tests import oracles
from tests.unit.curvature.exact_blocks import (
    BLOCKS,
    TIGHT,
    absorbed,
    best,
    block_of,
    exact,
    matrix,
    rescaled,
)
from tests.zoo import close, kronecker_block, randn

DAMPING = torch.tensor(0.03, dtype=torch.float64)
each = pytest.mark.parametrize("name", BLOCKS)


@each
def test_it_is_the_best_product_and_no_further_than_kfac(name):
    block = block_of(name)
    f = exact(block)
    k = kpsvd(**TIGHT)
    assert close(k.dense(absorbed(k, block)), best(f, 1), 1e-8)
    kfac = kronecker_block(block)
    for own in (kpsvd(), kpsvd(iterations=1)):
        assert (matrix(f) - own.dense(absorbed(own, block))).norm() < (matrix(f) - kfac).norm()


@each
def test_factors_are_positive_semi_definite(name):
    state = absorbed(kpsvd(), block_of(name))
    for x in state:
        values = torch.linalg.eigvalsh(x)
        assert (values[..., 0] > -1e-13 * values[..., -1]).all()
        assert (values[..., -1] > 0).all()
        assert torch.equal(x, x.mT)


def test_no_factor_of_positions_is_left_out_or_counted_twice():
    """T = 3 equal positions of one product: V_n = T g aᵀ for every one of the vectors."""
    block = block_of("positions")
    (use,) = block.uses
    assert use.grads is not None
    same = use._replace(inputs=torch.ones_like(use.inputs), grads=torch.ones_like(use.grads))
    k = kpsvd()
    found = k.dense(absorbed(k, block._replace(uses=(same,))))
    assert close(found, torch.full((30, 30), 9.0 * len(use.grads), dtype=torch.float64))


def _damped(state: Terms, split: str) -> Tensor:
    r, s = state.r[0], state.s[0]
    pairs = zip(r, s, strict=True) if r.ndim == 3 else ((r, s),)
    return torch.block_diag(*(oracles.damped(a, g, 1.0, float(DAMPING), split) for a, g in pairs))


@pytest.mark.parametrize("solver", ["cholesky", "eigh"])
@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@each
def test_solve_inverts_the_damped_product(name, split, solver):
    k = kpsvd(solver)
    state = absorbed(k, block_of(name))
    lead = state.r.shape[1:-2]
    u = randn(*lead, state.s.shape[-1], state.r.shape[-1])
    v = k.solve(k.factorize(state, DAMPING, split), u)
    assert close(_damped(state, split) @ v.flatten(), u.flatten(), 1e-9)


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("name", ["conv", "groups"])
def test_radius_keeps_the_solve_positive_definite(name, radius):
    k, u = kpsvd(radius=radius), None
    for damping in (DAMPING, 1e-8 * DAMPING):
        state = absorbed(k, block_of(name))
        u = randn(*state.r.shape[1:-2], state.s.shape[-1], state.r.shape[-1])
        v = k.solve(k.factorize(state, damping, "pi"), u)
        assert (u * v).sum() > 0
    assert (state.r.diagonal(dim1=-2, dim2=-1).sum(-1) > 0).all()


def test_radius_gives_the_best_product_of_the_masked_block():
    """From a map of 3 x 3 positions: a large radius is none, smaller ones are other matrices."""
    block, found = block_of("conv"), {}
    for radius in (0, 1, 2, 7, None):
        k = kpsvd(radius=radius, **TIGHT)
        found[radius] = k.dense(absorbed(k, block))
    assert torch.equal(found[2], found[None])
    assert torch.equal(found[7], found[None])
    assert not close(found[1], found[None], 1e-3)
    assert not close(found[0], found[1], 1e-3)


OPTIONS: dict[str, Any] = {"iterations": 1, "tolerance": 0.9, "radius": 0}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_counts(option):
    block = block_of("conv")
    plain, other = (absorbed(kpsvd(**o), block) for o in ({}, {option: OPTIONS[option]}))
    assert not all(map(torch.equal, plain, other))


def test_solver_counts():
    state = absorbed(kpsvd(), block_of("conv"))
    state = state._replace(r=state.r - 2 * torch.eye(state.r.shape[-1]).double())
    assert kpsvd("cholesky").factorize(state, DAMPING, "pi").a_inverse.isnan().all()
    assert all(leaf.isfinite().all() for leaf in leaves(kpsvd("eigh").factorize(state, DAMPING, "pi")))


@pytest.mark.parametrize("wrong", [{"solver": "lu"}, {"iterations": 0}, {"radius": -1}])
@pytest.mark.usefixtures("unchecked")
def test_values_without_meaning(wrong):
    with pytest.raises(HyperparameterError):
        kpsvd(**wrong)


def test_forward_only_has_no_exact_block():
    block = block_of("linear")
    blind = block._replace(uses=tuple(use._replace(grads=None) for use in block.uses))
    with pytest.raises(StateError, match="no output vectors"):
        kpsvd().prepare(blind)


@pytest.mark.parametrize("name", ["no bias", "conv", "groups", "tied"])
def test_scales_of_inputs_and_gradients_only_scale(name):
    """Every tolerance is relative."""
    k = kpsvd(**TIGHT) if name == "tied" else kpsvd()
    wanted = k.dense(absorbed(k, block_of(name)))
    assert close(1e8 * k.dense(absorbed(k, rescaled(block_of(name), g=1e-4))), wanted, 1e-9)
    if name == "no bias":
        assert close(1e-6 * k.dense(absorbed(k, rescaled(block_of(name), a=1e4, g=1e-1))), wanted, 1e-9)
