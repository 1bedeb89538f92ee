"""EKFAC: the best diagonal in the basis of K-FAC, whatever the layer; and what its averages converge to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import Block, densify, mapped, per_example, squares
from tests import oracles
from tests.zoo import CASES, absorbed, batch_of, close, kronecker_block, measured, outer, randn
from tests.zoo.cases import labels, weights

EIGEN = kf.curvature.eigen()
BLOCKS = [(name, block) for name, case in CASES.items() for block, s in case.blocks.items() if s.form != "vector"]
each = pytest.mark.parametrize(("name", "block"), BLOCKS)


def basis(state: Any) -> Tensor:
    """U_G ⊗ U_A, columns are basis vectors of vec(V)."""
    return oracles.kron(*(densify(u).contiguous() for u in (state.bases.g, state.bases.a)))


@each
def test_scalings_are_the_diagonal_of_the_block_in_the_basis(name, block):
    b = measured(CASES[name])[block]
    state = absorbed(EIGEN, b)
    u = basis(state)
    assert close(u.T @ u, torch.eye(len(u), dtype=u.dtype))
    assert close(state.scalings.flatten(), (u.T @ outer(b) @ u).diagonal())


@each
def test_pythagoras_order_and_trace(name, block):
    """‖F − KFAC‖² = ‖F − EKFAC‖² + ‖EKFAC − KFAC‖², hence EKFAC ≤ KFAC; and EKFAC keeps the trace."""
    b = measured(CASES[name])[block]
    f, k, e = outer(b), kronecker_block(b), EIGEN.dense(absorbed(EIGEN, b))
    parts = (f - e).square().sum() + (e - k).square().sum()
    assert ((f - k).square().sum() - parts).abs() <= 1e-10 * f.square().sum()
    assert (f - e).norm() <= (f - k).norm() + 1e-10 * f.norm()
    assert close(e.trace(), f.trace(), 1e-9)


@pytest.mark.parametrize(("name", "block"), [("conv", "first.weight"), ("conv", "second.weight")])
def test_the_wrong_orientation_of_the_bases_is_worse_than_kfac(name, block):
    """The mutation that a published code made: U_G V U_Aᵀ in place of U_Gᵀ V U_A in the scalings."""
    b = measured(CASES[name])[block]
    state = absorbed(EIGEN, b)
    turned = squares(b, *(mapped(lambda u: u.mT, u) for u in state.bases))
    wrong = EIGEN.dense(state._replace(scalings=turned))
    assert (outer(b) - wrong).norm() > (outer(b) - kronecker_block(b)).norm()


def wide(seed: int) -> Block:
    """The block of a layer whose A is too wide for a warm refresh to decompose it anew."""
    mlp, decaying = CASES["mlp"], torch.arange(1, 81) ** -0.7
    params = weights({"first.w": (80, 6), "first.b": (6,), "second.w": (6, 3), "second.b": (3,)})
    inputs = decaying * randn(200, 80, seed=seed)
    return measured(mlp._replace(params=params, inputs=inputs, targets=labels(3, 200)))["first.w"]


@pytest.mark.parametrize("scalings", ["per_example", "intra_batch"])
@pytest.mark.parametrize("kind", ["eigh", "iteration"])
def test_frozen_data_keep_the_exact_scalings_through_refreshes(kind, scalings):
    """S → S* of the basis at hand, not the Kronecker eigenvalues, however often the basis is refreshed."""
    e = kf.curvature.eigen(scalings, basis=kind)
    state, b = absorbed(e, wide(21)), wide(9)
    for _ in range(80):
        state = absorbed(e, b, state, 0.3)
    u = basis(state)
    assert close(state.scalings.flatten(), (u.T @ outer(b) @ u).diagonal(), 1e-6)
    if kind == "eigh":
        assert close(e.dense(state), EIGEN.dense(absorbed(EIGEN, b)), 1e-6)


def test_sweeps_and_share_bring_the_basis_of_a_wide_layer_nearer_to_the_eigenbasis():
    """A factor too wide to be decomposed anew follows the stream; S is the exact diagonal in whatever basis that is."""
    one, two = wide(9), wide(21)
    off = []
    for sweeps, share in ((1, 0.2), (4, 0.2), (1, 0.5), (1, 1.0)):
        e = kf.curvature.eigen("intra_batch", basis="iteration", sweeps=sweeps, share=share)
        state = absorbed(e, two, absorbed(e, one), 0.5)
        u = basis(state)
        assert close(u.T @ u, torch.eye(len(u), dtype=u.dtype))
        assert close(state.scalings.flatten(), (u.T @ outer(two) @ u).diagonal())
        seen = densify(state.bases.a).mT @ densify(state.factors.a) @ densify(state.bases.a)
        off.append((seen - torch.diag(seen.diagonal())).norm() / seen.norm())
    once, swept, half, whole = off
    assert max(swept, half) < once
    assert whole < 1e-12 < half


def test_old_scalings_are_reexpressed_when_the_basis_moves():
    """Without new scalings a refresh keeps the diagonal, in the new basis, of what was known in the old one."""
    one, two = (measured(CASES["mlp"]._replace(inputs=randn(8, 4, seed=s)))["first.w"] for s in (9, 21))
    state = absorbed(EIGEN, one)
    before = EIGEN.dense(state)
    damping = torch.tensor(0.1, dtype=torch.float64)
    moved = EIGEN.refresh(EIGEN.absorb(state, batch_of(EIGEN, two), damping * 5), damping, "pi")
    u = basis(moved)
    assert close(moved.scalings.flatten(), (u.T @ before @ u).diagonal())
    assert not close(u.abs(), basis(state).abs(), 1e-2)


def test_averages_are_linear_in_a_fixed_basis():
    """Running average of per-example squares, in the basis of the last refresh; intra-batch is the last batch alone."""
    one, two = (measured(CASES["mlp"]._replace(inputs=randn(8, 4, seed=s)))["first.w"] for s in (9, 21))
    for e, wanted in ((EIGEN, (0.75, 0.25)), (kf.curvature.eigen("intra_batch"), (0.0, 1.0))):
        first = absorbed(e, one)
        state = absorbed(e, two, first, 0.25, refresh=False)
        old, new = (squares(b, *first.bases) for b in (one, two))
        assert close(state.scalings, wanted[0] * old + wanted[1] * new)
        assert not close(old, new, 1e-2)


def test_mean_gradient_scalings():
    """N times the squared projection of the mean gradient of every output vector."""
    e = kf.curvature.eigen("mean_gradient")
    b = measured(CASES["conv"])["first.weight"]
    state = absorbed(e, b)
    mean = per_example(b).mean(dim=1).flatten(1)
    assert close(state.scalings.flatten(), b.examples * (mean @ basis(state)).square().sum(0))


def test_the_gradient_that_is_preconditioned_is_the_one_given():
    for scalings in ("per_example", "intra_batch", "mean_gradient"):
        e = kf.curvature.eigen(scalings)
        b = measured(CASES["conv"])["first.weight"]
        factored = e.factorize(absorbed(e, b), torch.tensor(0.1, dtype=torch.float64), "pi")
        u, w = randn(3, 13), randn(3, 13, seed=1)
        assert torch.count_nonzero(e.solve(factored, 0 * u)) == 0
        assert close(e.solve(factored, 2 * u + w), 2 * e.solve(factored, u) + e.solve(factored, w))


@pytest.mark.parametrize("name", ["deep_linear"])
def test_where_kfac_is_exact_so_is_ekfac(name):
    for block in CASES[name].blocks:
        b = measured(CASES[name])[block]
        assert close(EIGEN.dense(absorbed(EIGEN, b)), outer(b), 1e-9)
        assert close(kronecker_block(b), outer(b), 1e-9)
