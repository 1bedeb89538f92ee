"""The rearranged block against dense matrices and loops over positions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import Block, chunks, pairs
from kfac_func.blocks.rearranged import (
    Rearranged,
    _matrices_are_cheaper,
    output_moment,
    rearranged,
    to_inputs,
    to_outputs,
)
from tests.unit.curvature.exact_blocks import BLOCKS, block_of, exact
from tests.zoo import CASES, close, measured, randn, subset

FORMS = {"positions": False, "matrices": True}


def probes(z: Rearranged) -> tuple[Tensor, Tensor]:
    """V̂ and Û, not symmetric."""
    left, right = z.rows
    lead = left.shape[3:-1]
    return randn(*lead, left.shape[-1], left.shape[-1]), randn(*lead, right.shape[-1], right.shape[-1], seed=1)


def check(z: Rearranged, f: Tensor, tolerance: float = 1e-10) -> bool:
    """Whether Z V̂ and Zᵀ Û are those of F [q, o, i, o, i]."""
    v, u = probes(z)
    forward = torch.einsum("qoipj,qop->qij", f, v.reshape(-1, *v.shape[-2:]))
    adjoint = torch.einsum("qoipj,qij->qop", f, u.reshape(-1, *u.shape[-2:]))
    found = to_inputs(z, v), to_outputs(z, u)
    return close(found[0], forward.reshape_as(u), tolerance) and close(found[1], adjoint.reshape_as(v), tolerance)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("budget", [1, 2**24])
@pytest.mark.parametrize("name", BLOCKS)
def test_products_are_those_of_the_dense_block(name, budget, form, monkeypatch):
    monkeypatch.setattr(
        "kfac_func.blocks.rearranged._matrices_are_cheaper", lambda z, _: form and z.rows.left.shape[2] > 1
    )
    monkeypatch.setitem(chunks.__globals__, "BUDGET", budget)
    block = block_of(name)
    assert check(rearranged(block), exact(block))
    assert not check(rearranged(block), 1.001 * exact(block))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_first_look_is_positive_semi_definite(name):
    z = rearranged(block_of(name))
    g = output_moment(z)
    assert g.shape == probes(z)[0].shape
    values = torch.linalg.eigvalsh(g)
    assert values.min() > -1e-12 * values.max()
    assert values.max() > 0


@pytest.mark.parametrize("name", CASES)
def test_products_are_means_over_examples(name):
    case = CASES[name]
    n = len(case.targets)
    parts = [measured(subset(case, k, k + 1)) for k in range(n)]
    for path, block in measured(case).items():
        if not block.layout.matrix:
            continue
        z = rearranged(block)
        v, u = probes(z)
        for question in (output_moment, lambda z, v=v: to_inputs(z, v), lambda z, u=u: to_outputs(z, u)):
            every = [question(rearranged(part[path])) for part in parts]
            assert close(torch.stack(every).mean(0), question(z))


def test_the_cheaper_form_is_chosen():
    """Many positions of a small layer want V_m; few positions of a wide one do not."""

    def z(s: int, o: int, i: int) -> Rearranged:
        return Rearranged(pairs(block_of("conv"))._replace(left=torch.ones(1, 2, s, o), right=torch.ones(1, 2, s, i)))

    assert _matrices_are_cheaper(z(100, 4, 5), True)
    assert not _matrices_are_cheaper(z(2, 40, 50), True)
    assert not _matrices_are_cheaper(z(1, 4, 5), True)
    assert not _matrices_are_cheaper(z(100, 4, 5)._replace(near=torch.ones(100, 100)), True)


# ------------------------------------------------------------------------------------------- radius

PARAMS = {"w": 0.5 * randn(3, 2, 2, 2), "b": randn(3, seed=5)}
IMAGES = randn(4, 2, 2, 3, 6, seed=3)  # rectangular maps of 2 x 5 positions
HEAD = randn(2, 30, 4, seed=4)


def _one(p: dict, x: Tensor) -> Tensor:
    return torch.tanh(F.conv2d(x, p["w"], p["b"])).flatten(1)


def _folded(p: dict, x: Tensor) -> Tensor:
    return _one(p, x.flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1) @ HEAD.flatten(0, 1)


def _twice(p: dict, x: Tensor) -> Tensor:
    return (_one(p, x[:, 0]) @ HEAD[0]).sin() + _one(p, x[:, 1]) @ HEAD[1]


def _shared(p: dict, x: Tensor) -> Tensor:
    return _one(p, x) * _one(p, IMAGES[:3, 1]).sum(0) @ HEAD[0]


MODELS: dict[str, tuple[Callable, Tensor]] = {
    "one image": (lambda p, x: _one(p, x) @ HEAD[0], IMAGES[:, 0]),
    "images": (_folded, IMAGES),
    "uses": (_twice, IMAGES),
    "shared": (_shared, IMAGES[:, 0]),
}


def conv_block(name: str, **options: Any) -> Block:
    fn, x = MODELS[name]
    step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact(), **options)
    generator = torch.Generator().manual_seed(0)
    stats = step(PARAMS, (x, torch.zeros_like(fn(PARAMS, x))), generator=generator)[2]
    assert stats is not None
    return stats.blocks()["w"]


Place = tuple[int, int]


def within(radius: int) -> Callable[[Place, Place], bool]:
    return lambda p, q: max(abs(p[0] - q[0]), abs(p[1] - q[1])) <= radius


def flattened(radius: int) -> Callable[[Place, Place], bool]:
    """The trap: distances of indices, whose rows wrap."""
    return lambda p, q: abs(5 * (p[0] - q[0]) + p[1] - q[1]) <= radius


def brute(block: Block, near: Callable[[Place, Place], bool]) -> Tensor:
    """F [1, o, i, o, i] by a double loop over the positions of every image, from the raw inputs and gradients."""
    f = torch.zeros(1, 3, 9, 3, 9, dtype=torch.float64)
    for use in block.uses:
        assert use.grads is not None
        a = F.pad(F.unfold(use.inputs, 2).unflatten(-1, (2, 5)), (0, 0, 0, 0, 0, 1), value=1.0)
        for image in range(len(use.inputs)):
            places = list(product(range(2), range(5)))
            for p, q in product(places, places):
                if near(p, q):
                    rows = [torch.einsum("vo,i->voi", use.grads[:, image, :, *r], a[image, :, *r]) for r in (p, q)]
                    f += torch.einsum("voi,vpj->oipj", *rows)
    return f / block.examples


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_radius_is_a_distance_on_the_map_of_one_image(name, radius):
    block = conv_block(name)
    z = rearranged(block, radius)
    assert check(z, brute(block, within(radius)))
    assert check(z, brute(block, flattened(radius)), 1e-3) == (radius == 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_large_radius_keeps_all_pairs_of_an_image(name):
    block = conv_block(name)
    z = rearranged(block, 4)
    assert check(z, brute(block, within(10**6)))
    assert check(rearranged(block), brute(block, within(4))) == (name == "one image")
    assert (z.near == ()) == (name == "one image")


def test_radius_means_nothing_without_a_map():
    for block in (block_of("several uses"), block_of("positions")):
        v, _ = probes(rearranged(block))
        found = [to_inputs(rearranged(block, radius), v) for radius in (0, 1, None)]
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[2])


def test_the_sharing_is_not_in_the_exact_block():
    one, two = (rearranged(conv_block("uses", sharing=sharing), 1) for sharing in ("reduce", "expand"))
    v, _ = probes(one)
    assert torch.equal(to_inputs(one, v), to_inputs(two, v))


def test_groups_have_a_radius_too():
    block = block_of("groups")  # 3 x 3 positions
    v, _ = probes(rearranged(block))
    left, right = pairs(block)
    place = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    near = (place[:, None] - place).abs().amax(-1) <= 1
    met = torch.einsum("vbsqo,qop,vbtqp->vbqst", left, v, left) * near
    wanted = torch.einsum("vbqst,vbsqi,vbtqj->qij", met, right.expand(len(left), *right.shape[1:]), right)
    assert close(to_inputs(rearranged(block, 1), v), wanted)
