"""Convolutions in one, two and three dimensions: stride, padding (numbers and strings), dilation, groups.

A convolution is a dense layer on patches, rows in the order (C_in, k...), one row per output location:

    a[n, s] = patch of x at s         V_n = Σ_s g[n, s] a[n, s]ᵀ = mat(weight gradient)

Padding modes other than zeros reach the call as an already padded input. Source: Grosse & Martens 2016 (1602.01407),
§3.
"""

from __future__ import annotations

from functools import reduce
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func.blocks import Factor, Kind, second_moment
from kfac_func.layers.base import (
    Call,
    Found,
    Handler,
    bias_of,
    border,
    found_bias,
    grid,
    kernel_offsets,
    map_rows,
    maps,
    per_dimension,
    ref_of,
)


def _windows(x: Tensor, options: tuple) -> Tensor:
    """The patches as a view [B, C, *out, *kernel]; only the padding is copied."""
    stride, padding, dilation, _, kernel = options
    x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for d in range(len(kernel)):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])  # window dimensions come last
    return x[(..., *(slice(None, None, step) for step in dilation))]


def patches(x: Tensor, options: tuple) -> Tensor:
    """The patches of x [B, C, *size] as rows [B, S, (q), i], i = C/q · Π kernel in the order (C, k...)."""
    groups, kernel = options[3:]
    dims = len(kernel)
    rows = _windows(maps(x, dims), options).movedim(1, 1 + dims).flatten(1, dims)  # [B, S, C, *kernel]
    return rows.flatten(2) if groups == 1 else rows.unflatten(2, (groups, -1)).flatten(3)


def _output_rows(g: Tensor, options: tuple) -> Tensor:
    return map_rows(g, len(options[4]), groups=options[3])


def _weight_gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    """Σ_b Σ_s g[b, s] (patch of x at s)ᵀ as [q·o, C/q, *kernel]."""
    stride, padding, dilation, groups, kernel = options
    weight = g.new_zeros(()).expand(g.shape[1], x.shape[1] // groups, *kernel)  # only its shape is read
    none = [0] * len(kernel)
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, none, groups, [False, True, False]
    )[1]


def _gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    groups, kernel = options[3:]
    found = _weight_gradient(maps(x, len(kernel)), maps(g, len(kernel)), options)
    return found.flatten(1) if groups == 1 else found.unflatten(0, (groups, -1)).flatten(2)


# ------------------------------------------------------------------------- Σ a aᵀ: by unfolding or by correlating

CHUNK = 2**22  # numbers in the patches that are unfolded at a time
NUMBERS = 2**20  # numbers in all patches from which correlating pays
SUMMED = 2**14  # entries of images in one weight gradient: torch adds them one by one, and float32 would lose digits


def _moment(x: Tensor, options: tuple, bias: bool) -> Factor:
    groups, kernel = options[3:]
    x = maps(x, len(kernel))
    x = x.float() if x.itemsize < 4 else x
    moment = (_correlated if _pays(x, options) else _unfolded)(x, options)
    if bias:
        total = _windows(x.sum(dim=0, keepdim=True), options)  # of one image, the sum of all
        spatial = tuple(range(2, 2 + len(kernel)))
        first = total.sum(dim=spatial).reshape(groups, -1)
        moment = border(moment, first, x.shape[0] * prod([total.shape[d] for d in spatial]))
    return moment[0] if groups == 1 else moment


def _pays(x: Tensor, options: tuple) -> bool:
    """Whether correlating is faster, which takes overlapping windows and work enough to hide the many small calls.

    Measured on CPUs alone, with 3x3 and 5x5 kernels: 1.2 to 11 times as fast as unfolding from 2^20 numbers in the
    patches on, 0.8 to 1.6 times with half as many. With stride 2 the images of even and odd entries would have to be
    correlated with one another: 64 products of channels instead of 81 for 3x3, and no gain in time. On GPUs
    convolutions round float32 to 10 bits by default, products do not.
    """
    stride, padding, dilation, _, kernel = options
    sizes = zip(x.shape[2:], padding, dilation, kernel, strict=True)
    outputs = prod([size + 2 * p - h * (k - 1) for size, p, h, k in sizes])
    overlap = set(stride) == {1} and prod(kernel) > 1
    return x.device.type == "cpu" and overlap and x.shape[:2].numel() * outputs * prod(kernel) >= NUMBERS


def _unfolded(x: Tensor, options: tuple) -> Tensor:
    """Σ a aᵀ [q, i, i] from the patches of a few examples at a time, rows (k..., C) at first: a copy of whole runs."""
    groups, kernel = options[3:]
    dims, offsets = len(kernel), prod(kernel)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # the channels are contiguous

    def moment(part: Tensor) -> Tensor:
        rows = _windows(part, options).movedim(1, -1).flatten(0, dims).flatten(1, dims)  # [B·S, K, C]
        rows = rows.unflatten(-1, (groups, -1)).transpose(1, 2).flatten(2)
        return second_moment(rows if groups > 1 else rows.squeeze(1))

    parts = x.split(max(1, CHUNK // _windows(x[:1], options).numel()))
    blocks = reduce(torch.add, map(moment, parts)).reshape(groups, offsets, -1, offsets, x.shape[1] // groups)
    return blocks.transpose(1, 2).transpose(3, 4).flatten(3).flatten(1, 2)


class _Axis(NamedTuple):
    """One dimension: the windows t ∈ [first, first + out) read the entries t + step·i, i < kernel."""

    kernel: int
    step: int
    first: int
    out: int

    @property
    def reach(self) -> int:
        return self.step * (self.kernel - 1)

    def outside(self, size: int) -> tuple[tuple[range, int, int], ...]:
        """The windows before and after the box that read some of the entries, all in [low, high), of `size`."""
        end = self.first + self.out
        before = range(-self.reach, self.first), 0, min(size, self.first + self.reach)
        after = range(end, size), max(0, end), size
        return tuple(side for side in (before, after) if side[1] < side[2])

    def read(self, t: int, low: int, high: int) -> tuple[slice, slice]:
        """The offsets with which window t reads entries in [low, high), and these entries, counted from `low`."""
        start, stop = (min(max(-((t - end) // self.step), 0), self.kernel) for end in (low, high))
        return slice(start, stop), slice(t + self.step * start - low, t + self.step * stop - low, self.step)


def _correlated(x: Tensor, options: tuple) -> Tensor:
    r"""Σ a aᵀ [q, i, i] without unfolding, for stride 1; x [B, C, *size].

    The entry for the channels c, c' and the kernel offsets i, j is a sum over the windows t of the output,

        A[c,i; c',j] = Σ_b Σ_{t ∈ box} x[b, c, t + h·i] x[b, c', t + h·j]        h dilation, x zero outside

    Over ALL windows t it depends on j − i alone and is a correlation, one weight gradient of a convolution:

        R[c, c', e] = Σ_b Σ_p x[b, c, p] x[b, c', p + h·e] = R[c', c, −e]        A = R[c, c', j − i] − Σ_{t ∉ box}

    In several dimensions Σ_all = Σ_box + Σ_n (box in the dimensions before n, outside in n, all in those after n). A
    window that is outside in dimension n reads only the first or the last few entries in n. They become channels of
    images with one dimension less, and what is to be subtracted is the same sum for those.

    Multiplications per entry and pair of channels: half of Π (2k − 1), instead of the Π k² of unfolding.
    """
    _, padding, dilation, groups, kernel = options
    sizes = zip(x.shape[2:], padding, dilation, kernel, strict=True)
    axes = tuple(_Axis(k, h, -p, size + 2 * p - h * (k - 1)) for size, p, h, k in sizes)
    blocks = _boxed(x, axes, groups, len(axes)).reshape(prod(kernel), prod(kernel), groups, -1, x.shape[1] // groups)
    return blocks.permute(2, 3, 0, 4, 1).flatten(3).flatten(1, 2)


def _boxed(x: Tensor, axes: tuple[_Axis, ...], groups: int, boxed: int) -> Tensor:
    """A [i..., j..., q, C, C] over the windows of the box in the first `boxed` dimensions, over all in the others."""
    if not axes:
        rows = x.unflatten(1, (groups, -1))
        return torch.einsum("bqc,bqd->qcd", rows, rows)
    dims, every = len(axes), slice(None)
    found = _over_all(x, axes, groups)
    pairs = found.flatten(0, 2 * dims - 1)  # a view
    place = torch.arange(len(pairs), device=x.device).reshape(found.shape[: 2 * dims])
    for n, axis in enumerate(axes[:boxed]):
        for windows, low, high in axis.outside(x.shape[2 + n]):
            strip = x.narrow(2 + n, low, high - low).unflatten(1, (groups, -1)).movedim(3 + n, 2).flatten(1, 3)
            part = _boxed(strip, axes[:n] + axes[n + 1 :], groups, n)
            part = part.unflatten(-1, (high - low, -1)).unflatten(-3, (high - low, -1))
            part = part.movedim((-4, -2), (n, dims + n))  # the entries of dimension n where its offsets i, j will be
            for t in windows:
                offsets, entries = axis.read(t, low, high)
                here, there = ((*[every] * n, at, *[every] * (dims - 1), at) for at in (offsets, entries))
                pairs.index_add_(0, place[here].flatten(), part[there].flatten(0, 2 * dims - 1), alpha=-1)
    return found


def _over_all(x: Tensor, axes: tuple[_Axis, ...], groups: int) -> Tensor:
    """R[c, c', j − i] as [i..., j..., q, C, C]."""
    dims, (ahead, *reach) = len(axes), [axis.reach for axis in axes]
    lags = [axes[0].kernel, *(2 * axis.kernel - 1 for axis in axes[1:])]  # the first dimension: e ≥ 0
    images = F.pad(x, [0] * (2 * dims - 1) + [ahead])
    options = [1] * dims, [0, *reach], [axis.step for axis in axes], groups, lags
    count = max(1, SUMMED // x.shape[2:].numel())
    parts = zip(images.split(count), x.split(count), strict=True)
    half = reduce(torch.add, [_weight_gradient(wide, part, options) for wide, part in parts])
    half = half.movedim((0, 1), (-2, -1)).unflatten(-2, (groups, -1)).contiguous()
    mirror = half.flip(tuple(range(dims))).mT
    found = torch.cat([mirror[:-1], (mirror[-1:] + half[:1]) / 2, half[1:]])  # exactly symmetric
    index = torch.zeros((), dtype=torch.long, device=x.device)
    for n, axis in enumerate(axes):
        at = torch.arange(axis.kernel, device=x.device)
        lag = at - at.unsqueeze(1) + axis.kernel - 1
        shape = [axis.kernel if d in (n, dims + n) else 1 for d in range(2 * dims)]
        index = index * (2 * axis.kernel - 1) + lag.reshape(shape)
    return found.flatten(0, dims - 1)[index]


conv = Kind("conv", _gradient, patches, _output_rows, _moment, offsets=kernel_offsets, grid=grid)
"""`options` = (stride, padding, dilation, groups, kernel), each but groups a tuple of one number per dimension."""

conv_bias = bias_of(conv)


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
        found = found_bias(conv_bias, ((), (), (), 1, tuple(kernel)), shift, out, 1)
        return found._replace(restore=restore)
    assert ref is not None
    stride, dilation = per_dimension(stride, dims), per_dimension(dilation, dims)
    x, padding = _symmetric(x, padding, kernel, dilation)
    return Found(
        kind=conv,
        options=(stride, padding, dilation, groups, tuple(kernel)),
        weight=ref,
        bias=shift,
        inputs=x,
        output=out,
        positions=out.shape[0] * out.shape[2:].numel(),
        order=ref.order,
        groups=groups,
        outputs=out.shape[1] // groups,
        restore=restore,
    )


handlers: dict[object, Handler] = {F.conv1d: _conv, F.conv2d: _conv, F.conv3d: _conv}
