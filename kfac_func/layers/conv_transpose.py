"""Transposed convolutions in one, two and three dimensions: stride, padding, output padding, dilation, groups.

A transposed convolution is a dense layer on patches, rows in the order (C_in, k...), one row per output location:

    a[n, j][c, u] = x[n, c, l]   where l · stride = j + padding − u · dilation, else 0
    y[n, j] = W a[n, j] + b        V_n = Σ_j g[n, j] a[n, j]ᵀ = mat(weight gradient)

The weight leaf [C_in, C_out/q, k...] is seen as [q, C_in/q, C_out/q, k...], which permutes to (q, o, i) order.
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
    bias_of,
    found_bias,
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
    stride, padding, extra, dilation, groups, kernel = options
    dims = len(kernel)
    x = maps(x, dims)
    index = [torch.arange(x.shape[1], device=x.device).reshape(-1, *[1] * dims)]
    for d in range(dims):
        size = x.shape[2 + d]
        out = (size - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel[d] - 1) + extra[d] + 1
        j, u = torch.arange(out, device=x.device), torch.arange(kernel[d], device=x.device)
        at = j.unsqueeze(1) + padding[d] - u * dilation[d]
        read = (at % stride[d] == 0) & (at >= 0) & (at < size * stride[d])
        at = torch.where(read, at // stride[d], size)  # one zero follows the last entry
        shape = [1] * (2 * dims + 1)
        shape[d], shape[dims + 1 + d] = out, kernel[d]
        index.append(at.reshape(shape))
    x = F.pad(x, [0, 1] * dims)
    rows = x[(slice(None), *index)].flatten(1, dims)  # [B, *out, C, *kernel] in one copy
    return rows.flatten(2) if groups == 1 else rows.unflatten(2, (groups, -1)).flatten(3)


def _output_rows(g: Tensor, options: tuple) -> Tensor:
    return map_rows(g, len(options[-1]), groups=options[-2])


def _gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    stride, padding, extra, dilation, groups, kernel = options
    x, g = maps(x, len(kernel)), maps(g, len(kernel))
    shape = (x.shape[1], g.shape[1] // groups, *kernel)
    weight = g.new_zeros(()).expand(shape)  # only its shape is read
    _, found, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, True, extra, groups, [False, True, False]
    )
    found = found.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    return found[0] if groups == 1 else found


def _moment(x: Tensor, options: tuple, bias: bool) -> Factor:
    return moment_of_rows(patches(x, options).flatten(0, 1), bias)


conv_transpose = Kind("conv_transpose", _gradient, patches, _output_rows, _moment, offsets=kernel_offsets, grid=grid)
"""`options` = (stride, padding, output padding, dilation, groups, kernel), each but groups a tuple of one number per
dimension.
"""

conv_transpose_bias = bias_of(conv_transpose)


def _conv_transpose(call: Call) -> Found | None:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    x, weight, bias, stride, padding, extra, groups, dilation = call.bind(*names, **defaults)
    ref, shift = ref_of(call, weight), ref_of(call, bias)
    if ref is None and (shift is None or call.ref(weight) is not None):
        return None
    out = call.run()
    kernel = weight.shape[2:]
    dims = len(kernel)
    unbatched = x.ndim == dims + 1
    if unbatched:
        x, out = x.unsqueeze(0), out.unsqueeze(0)
    restore = (lambda y: y.squeeze(0)) if unbatched else None
    if ref is None and shift is not None:
        found = found_bias(conv_transpose_bias, ((), (), (), (), 1, tuple(kernel)), shift, out, 1)
        return found._replace(restore=restore)
    assert ref is not None
    stride, padding, extra, dilation = (per_dimension(v, dims) for v in (stride, padding, extra, dilation))
    grouped = groups > 1
    return Found(
        kind=conv_transpose,
        options=(stride, padding, extra, dilation, groups, tuple(kernel)),
        weight=ref._replace(shape=(groups, ref.shape[0] // groups, *ref.shape[1:])) if grouped else ref,
        bias=shift,
        inputs=x,
        output=out,
        positions=out.shape[0] * out.shape[2:].numel(),
        order=(0, 2, 1, *range(3, dims + 3)) if grouped else (1, 0, *range(2, dims + 2)),
        groups=groups,
        outputs=out.shape[1] // groups,
        restore=restore,
    )


handlers: dict[object, Handler] = {
    F.conv_transpose1d: _conv_transpose,
    F.conv_transpose2d: _conv_transpose,
    F.conv_transpose3d: _conv_transpose,
}
