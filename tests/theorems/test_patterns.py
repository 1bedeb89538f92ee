"""Variants of the Kronecker factors, each against the full factors with the left-out entries set to zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func._tree import leaves
from kfac_func.blocks import Block, densify, input_rows, merged, output_rows
from tests import oracles
from tests.zoo import CASES, Case, absorbed, close, functional, measured, outer, randn

FULL = kf.curvature.kronecker()
DAMPING = torch.tensor(0.03, dtype=torch.float64)
SPLITS = ["pi", "none", "exact"]


def factors(structure: Any, block: Block) -> tuple[Tensor, Tensor, float]:
    a, g, t = merged(structure.measure(block))
    return densify(a), densify(g), float(t)


def solves_what_it_says(structure: Any, block: Block, split: str) -> bool:
    a, g, t = factors(structure, block)
    u = randn(*outer_shape(block))
    v = structure.solve(structure.factorize(structure.measure(block), DAMPING, split), u)
    return close(oracles.damped(a, g, t, 0.03, split) @ v.flatten(), u.flatten(), 1e-9)


def outer_shape(block: Block) -> tuple[int, ...]:
    return tuple(kf.curvature.diagonal().measure(block).squares.shape)


# ------------------------------------------------------------------ spatially uncorrelated activations


def _convolution(kind: Any = nn.Conv2d, **options: Any) -> Case:
    """One convolution on rectangular maps with an asymmetric kernel, then a mean over positions."""
    conv = kind(4, 6, (3, 2), **options)
    fn, params = functional(nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), 1.0)
    data = randn(7, 4, 6, 5, seed=9), torch.arange(7).remainder(3)
    return Case(fn, params, *data, kf.losses.cross_entropy(), F.cross_entropy, {}, {})


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "padding": {"padding": (1, 2)},
    "stride and dilation": {"stride": (2, 1), "dilation": (1, 2), "padding": 1},
    "groups": {"groups": 2, "padding": 1},
    "transposed": {"kind": nn.ConvTranspose2d, "stride": (2, 1), "padding": 1},
}


@pytest.fixture(params=CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def convolution(request) -> Block:
    return measured(_convolution(**request.param))["0.weight"]


def test_sua_sets_spatial_cross_moments_to_zero(convolution):
    """Entries (c, δ), (c', δ') with δ ≠ δ' vanish, and those of the homogeneous 1 with all others; nothing else."""
    a, g, t = factors(FULL, convolution)
    found, same, positions = factors(kf.curvature.kronecker(sua=True), convolution)
    offset = torch.arange(a.shape[-1]).remainder(6)
    if convolution.layout.bias is not None:
        offset[-1] = -1
    assert close(found, torch.where(offset[:, None] == offset, a, 0.0))
    assert close(same, g)
    assert t == positions == convolution.positions
    assert not close(found, a, 1e-2)


@pytest.mark.parametrize("split", SPLITS)
def test_sua_solves(convolution, split):
    assert solves_what_it_says(kf.curvature.kronecker(sua=True), convolution, split)


def test_sua_is_one_small_inverse_per_kernel_offset():
    """V_δ ← G⁻¹ V_δ A_δ⁻¹ with the C x C moment of what offset δ sees, and the bias on its own, once."""
    block = measured(_convolution(padding=1))["0.weight"]
    k = kf.curvature.kronecker(sua=True)
    u = randn(6, 25)
    v = k.solve(k.factorize(k.measure(block), DAMPING, "none"), u)
    (use,) = block.uses
    rows = input_rows(use, "expand").flatten(0, 1).unflatten(-1, (4, 6))
    t, shift = block.positions, (0.03 / block.positions) ** 0.5
    g = output_rows(use, "expand").flatten(0, 2)
    g = g.T @ g / (7 * t) + shift * torch.eye(6, dtype=g.dtype)
    for delta in range(6):
        x = rows[..., delta]
        a = x.T @ x / (7 * t) + shift * torch.eye(4, dtype=x.dtype)
        own = torch.arange(4) * 6 + delta
        assert close(t * g @ v[:, own] @ a, u[:, own], 1e-9)
    assert close(t * (1 + shift) * g @ v[:, -1], u[:, -1], 1e-9)


def test_sua_leaves_other_layers_alone():
    block = measured(CASES["mlp"])["first.w"]
    assert close(kf.curvature.kronecker(sua=True).measure(block).a, FULL.measure(block).a)


# ------------------------------------------------------------------ one side, large factors, centred


def test_one_side():
    block = measured(CASES["conv"])["first.weight"]
    a, g, _ = factors(FULL, block)
    for structure, wanted in (
        (kf.curvature.kronecker(sides="input"), (a, _round(g))),
        (kf.curvature.kronecker(sides="output"), (_round(a), g)),
    ):
        assert all(close(x, y) for x, y in zip(factors(structure, block)[:2], wanted, strict=True))


def _round(factor: Tensor) -> Tensor:
    return torch.eye(len(factor), dtype=factor.dtype) * factor.trace() / len(factor)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("oversize", ["blocks", "diagonal"])
@pytest.mark.parametrize("block", ["first.weight", "second.weight", "head.weight"])
def test_max_dim(block, oversize, split):
    """A factor larger than max_dim keeps blocks of at most that size along its diagonal, or the diagonal alone."""
    b = measured(CASES["conv"])[block]
    k = kf.curvature.kronecker(max_dim=4, oversize=oversize)
    for full, found in zip(factors(FULL, b)[:2], factors(k, b)[:2], strict=True):
        d = len(full)
        size = 1 if oversize == "diagonal" else -(-d // -(-d // 4))
        part = torch.arange(d) // (size if d > 4 else d)
        assert close(found, torch.where(part[:, None] == part, full, 0.0))
    assert solves_what_it_says(k, b, split)


def test_a_head_of_fifty_thousand_rows_is_affordable():
    """Neither the 50 000² moment nor anything of that order is formed."""
    size = 50_000
    params = {"w": 0.1 * randn(size, 3).float()}
    data = randn(4, 3, seed=9).float(), torch.tensor([1, size - 1, 3, 77])
    step = kf.value_grad_and_stats(lambda p, x: F.linear(x, p["w"]), kf.losses.cross_entropy())
    _, grads, stats = step(params, data, generator=torch.Generator().manual_seed(0))
    for curvature in (kf.curvature.kronecker(max_dim=128), kf.curvature.eigen(max_dim=128)):
        tx = kf.kfac(curvature)
        updates, state = tx.update(grads, tx.init(params), stats=stats)
        assert updates["w"].isfinite().all()
        assert sum(leaf.numel() for leaf in leaves(state)) < 500 * size


@pytest.mark.parametrize(("name", "block"), [("conv", "first.weight"), ("mlp", "first.w"), ("tokens", "head.weight")])
def test_centred_statistics_are_covariances(name, block):
    """The mean row is taken off a, and off g for every output vector; the homogeneous 1 stays, uncorrelated."""
    b = measured(CASES[name])[block]
    (use,) = b.uses
    a, g = input_rows(use, "expand").flatten(0, 1), output_rows(use, "expand").flatten(1, 2)
    a = torch.cat([a - a.mean(0), torch.ones_like(a[:, :1])], dim=1)
    count = b.examples * b.positions
    g = (g - g.mean(1, keepdim=True)).flatten(0, 1)
    got = factors(kf.curvature.kronecker(centred=True), b)
    assert close(got[0], a.T @ a / count)
    assert close(got[1], g.T @ g / count)
    assert not close(got[0], factors(FULL, b)[0], 1e-3)


def test_centred_averages_are_covariances_of_the_average():
    """E[aaᵀ] − E[a]E[a]ᵀ of two batches together, not the mean of their covariances."""
    one, two = (measured(CASES["mlp"]._replace(inputs=randn(8, 4, seed=s) + s))["first.w"] for s in (1, 2))
    k = kf.curvature.kronecker(centred=True)
    state = absorbed(k, two, absorbed(k, one), 0.5)
    rows = torch.cat([b.uses[0].inputs for b in (one, two)])
    assert close(densify(merged(state)[0])[:-1, :-1], torch.cov(rows.T, correction=0))


# ------------------------------------------------------------------ EKFAC on the same patterns


PATTERNS: dict[str, dict[str, Any]] = {
    "sua": {"sua": True},
    "blocks": {"max_dim": 4},
    "diagonal": {"max_dim": 4, "oversize": "diagonal"},
    "centred": {"centred": True},
}


@pytest.mark.parametrize("basis", ["eigh", "iteration"])
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_ekfac_has_the_exact_diagonal_in_the_basis_of_the_pattern(convolution, options, basis):
    e = kf.curvature.eigen(basis=basis, **options)
    state = absorbed(e, convolution, absorbed(e, convolution))
    u = oracles.kron(*(densify(x).contiguous() for x in (state.bases.g, state.bases.a)))
    f = outer(convolution)
    assert close(u.T @ u, torch.eye(len(u), dtype=u.dtype))
    assert close(state.scalings.flatten(), (u.T @ f @ u).diagonal())
    a, g, t = factors(kf.curvature.kronecker(**options), convolution)
    assert (f - e.dense(state)).norm() <= (f - t * oracles.kron(g, a)).norm() * (1 + 1e-9)
