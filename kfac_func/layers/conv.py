"""Convolutions in one, two and three dimensions: stride, padding (numbers and strings), dilation, groups.

A convolution is a dense layer on patches, rows in the order (C_in, k...), one row per output location:

    a[n, s] = patch of x at s         V_n = Σ_s g[n, s] a[n, s]ᵀ = mat(weight gradient)

Padding modes other than zeros reach the call as an already padded input. Source: Grosse & Martens 2016 (1602.01407),
§3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func.blocks import Factor, Kind
from kfac_func.layers.base import (
    Call,
    Found,
    Handler,
    grid,
    kernel_offsets,
    map_rows,
    maps,
    moment_of_rows,
    per_dimension,
    ref_of,
)


def patches(x: Tensor, options: tuple) -> Tensor:
    """The patches of x [B, C, *size] as rows [B, S, (q), i], i = C/q · Π kernel in the order (C, k...)."""
    stride, padding, dilation, groups, kernel = options
    dims = len(kernel)
    x = maps(x, dims)
    x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for d in range(dims):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])  # a view; window dimensions come last
    x = x[(..., *(slice(None, None, step) for step in dilation))]
    x = x.movedim(1, 1 + dims)  # [B, *out, C, *kernel]
    rows = x.flatten(1, dims)
    return rows.flatten(2) if groups == 1 else rows.unflatten(2, (groups, -1)).flatten(3)


def _output_rows(g: Tensor, options: tuple) -> Tensor:
    return map_rows(g, len(options[4]), groups=options[3])


def _gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    stride, padding, dilation, groups, kernel = options
    x, g = maps(x, len(kernel)), maps(g, len(kernel))
    shape = (g.shape[1], x.shape[1] // groups, *kernel)
    weight = g.new_zeros(()).expand(shape)  # only its shape is read
    none = [0] * len(kernel)
    _, found, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, none, groups, [False, True, False]
    )
    return found.flatten(1) if groups == 1 else found.unflatten(0, (groups, -1)).flatten(2)


def _moment(x: Tensor, options: tuple, bias: bool) -> Factor:
    return moment_of_rows(patches(x, options).flatten(0, 1), bias)


conv = Kind("conv", _gradient, patches, _output_rows, _moment, offsets=kernel_offsets, grid=grid)
"""`options` = (stride, padding, dilation, groups, kernel), each but groups a tuple of one number per dimension."""


def _symmetric(
    x: Tensor, padding: object, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    dims = len(kernel)
    if padding == "valid":
        return x, (0,) * dims
    if padding != "same":
        return x, per_dimension(padding, dims)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, tuple(t // 2 for t in total)
    return F.pad(x, [p for t in reversed(total) for p in (t // 2, t - t // 2)]), (0,) * dims


def _conv(call: Call) -> Found | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = call.bind(*names, stride=1, padding=0, dilation=1, groups=1)
    ref = ref_of(call, weight)
    if ref is None:
        return None
    out = call.run()
    kernel = ref.shape[2:]
    dims = len(kernel)
    unbatched = x.ndim == dims + 1
    if unbatched:
        x, out = x.unsqueeze(0), out.unsqueeze(0)
    stride, dilation = per_dimension(stride, dims), per_dimension(dilation, dims)
    x, padding = _symmetric(x, padding, kernel, dilation)
    return Found(
        kind=conv,
        options=(stride, padding, dilation, groups, tuple(kernel)),
        weight=ref,
        bias=ref_of(call, bias),
        inputs=x,
        output=out,
        positions=out.shape[0] * out.shape[2:].numel(),
        order=ref.order,
        groups=groups,
        outputs=out.shape[1] // groups,
        restore=(lambda y: y.squeeze(0)) if unbatched else None,
    )


handlers: dict[object, Handler] = {F.conv1d: _conv, F.conv2d: _conv, F.conv3d: _conv}
