"""A transposed convolution is a dense layer on its patches: rows · Wᵀ + b is torch's own output for all options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func.blocks import Block, input_rows, pack, unpack

MODULES: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES: dict[int, tuple[int, ...]] = {1: (5,), 2: (3, 5), 3: (2, 3, 4)}
KERNELS: dict[int, list[tuple[int, ...]]] = {1: [(1,), (4,)], 2: [(3, 2)], 3: [(2, 1, 3)]}
STRIDES, PADDINGS, EXTRAS, DILATIONS, GROUPS = (1, 2, 3), (0, 1, 3), (0, 1, 2), (1, 2), (1, 2)


def modules(dims: int) -> list[nn.Module]:
    """All combinations that torch accepts: output padding below stride or dilation, and outputs that are not empty."""
    found = []
    for kernel, s, p, e, d, q in itertools.product(KERNELS[dims], STRIDES, PADDINGS, EXTRAS, DILATIONS, GROUPS):
        out = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k in zip(SIZES[dims], kernel, strict=True)]
        if e < max(s, d) and min(out) > 0:
            options = {"stride": s, "padding": p, "output_padding": e, "dilation": d, "groups": q}
            found.append(MODULES[dims](4, 6, kernel, **options, dtype=torch.float64))
    return found


def planned(module: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Block]:
    fn, params = kf.make_functional(module)
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.empirical())
    batch = x, torch.zeros_like(fn(params, x))
    _, grads, stats = step(params, batch)
    torch.testing.assert_close(grads, step(params, batch, stats=False)[1], rtol=1e-10, atol=1e-12)
    return params, stats.blocks()["weight"]


@pytest.mark.parametrize("dims", MODULES)
def test_rows_times_the_matrix_are_the_output(dims):
    x = torch.randn(2, 4, *SIZES[dims], dtype=torch.float64)
    every = modules(dims)
    assert len(every) > 40
    for module in every:
        params, block = planned(module, x)
        v = pack(block.layout, params)
        rows = input_rows(block.uses[0], "expand")
        out = torch.einsum("ns...i,...oi->ns...o", rows, v[..., :-1]) + v[..., -1]
        wanted = module(x)
        got = out.flatten(2).mT.reshape(wanted.shape)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, msg=str(module))
        back = unpack(block.layout, v, {path: leaf.shape for path, leaf in params.items()})
        assert all(torch.equal(back[path], leaf) for path, leaf in params.items()), module


def test_the_rows_of_one_group_are_its_channels():
    """Group k reads the k-th part of the channels, and its part of the leaf's first dimension is its matrix."""
    module = nn.ConvTranspose1d(6, 4, 3, groups=2, dtype=torch.float64)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    params, block = planned(module, x)
    v = pack(block.layout, params)
    assert v.shape == (2, 2, 3 * 3 + 1)
    for k, part in enumerate(params["weight"].chunk(2)):
        assert torch.equal(v[k, :, :-1], part.transpose(0, 1).flatten(1))
        alone = nn.ConvTranspose1d(3, 2, 3, dtype=torch.float64)
        assert torch.equal(
            input_rows(planned(alone, x.chunk(2, 1)[k])[1].uses[0], "expand"),
            input_rows(block.uses[0], "expand")[:, :, k],
        )


def test_images_that_are_not_batched_are_one_example_and_shared_ones_have_no_example():
    module = nn.ConvTranspose1d(2, 3, 2, stride=2, dtype=torch.float64)
    fn, params = kf.make_functional(module)
    image = torch.arange(8.0, dtype=torch.float64).reshape(2, 4).sin()
    x = torch.randn(5, 3, dtype=torch.float64)

    def alone(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return x * fn(p, image).mean(-1)

    def together(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return x * fn(p, torch.stack([image, image.cos()])).mean((0, 2))

    for model, positions in ((alone, 8), (together, 16)):
        step: Any = kf.value_grad_and_stats(model, kf.losses.mse(), estimator=kf.estimators.exact())
        _, grads, stats = step(params, (x, x), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(grads, step(params, (x, x), stats=False)[1])
        assert stats.blocks()["weight"].positions == positions
