"""What a layer kind hands to the tape, and the rules that several kinds share."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func._errors import CaptureError, explain
from kfac_func.blocks import Factor, Kind, Part, second_moment


class Ref(NamedTuple):
    """A parameter leaf seen through a view: the tensor at hand is `leaf.permute(order)`, or a part of it."""

    path: str
    shape: tuple[int, ...]  # of the leaf, or one that it is reshaped to
    order: tuple[int, ...]
    part: tuple[tuple[int, int], ...] = ()  # start and length in every dimension of the shape; () for all of it

    @property
    def size(self) -> tuple[int, ...]:
        """What the tensor at hand has of every dimension of the shape."""
        return tuple(length for _, length in self.part) if self.part else self.shape

    def place(self, dim: int) -> tuple[int, int] | None:
        """Where the tensor at hand is in a dimension of the shape; None when it has all of it."""
        return (self.part[dim][0], self.shape[dim]) if self.part and self.size[dim] != self.shape[dim] else None


class Call(NamedTuple):
    """One torch call inside the model. `ref` says which parameter a value is, if it is one."""

    func: Callable[..., Any]
    args: tuple
    kwargs: dict
    ref: Callable[[Any], Ref | None]

    def run(self) -> Any:
        """The call itself."""
        return self.func(*self.args, **self.kwargs)

    def bind(self, *names: str, **defaults: Any) -> list[Any]:
        """The arguments in the order of `names`; missing ones from `defaults`."""
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        return [given.get(name, defaults.get(name)) for name in names]


class Found(NamedTuple):
    """A recognised use. `inputs` and `output` are in the kind's own form; `restore` gives back what the call
    returns.
    """

    kind: Kind
    options: tuple
    weight: Ref | None
    bias: Ref | None
    inputs: Tensor
    output: Tensor
    positions: int  # rows of this call: examples x shared positions
    order: tuple[int, ...] = ()
    groups: int = 1
    outputs: int = 0
    restore: Callable[[Tensor], Tensor] | None = None
    bias_shape: tuple[int, ...] | None = None  # the shape of a bias that may be added to the result right after
    part: Part = Part()  # of the weight that this use sees


Handler = Callable[[Call], Found | None]


def refuse(path: str, op: str, got: str, why: str, options: str) -> CaptureError:
    """The error for a use that a kind recognises but cannot represent exactly."""
    return CaptureError(
        explain(
            f"parameter {path!r} is used by {op} in a way that cannot be captured exactly.",
            got=got,
            why=why,
            options=options,
        )
    )


def ref_of(call: Call, value: Any) -> Ref | None:
    """The parameter that `value` is, if it is a whole, unpermuted leaf."""
    ref = call.ref(value)
    return ref if ref is not None and not ref.part and ref.order == tuple(range(len(ref.shape))) else None


def vector_of(call: Call, value: Any) -> Ref | None:
    """The parameter that `value` is, if it is a vector or a part of one."""
    ref = call.ref(value)
    return ref if ref is not None and len(ref.shape) == 1 else None


def border(moment: Tensor, first: Tensor, count: int | Tensor) -> Tensor:
    """The moment of [a; 1] from Σ a aᵀ, Σ a and the number of rows; group dimensions in front."""
    bordered = F.pad(moment, (0, 1, 0, 1))
    bordered[..., -1, -1] = count
    bordered[..., -1, :-1] = first
    bordered[..., :-1, -1] = first
    return bordered


def moment_of_rows(rows: Tensor, bias: bool, kept: Tensor | None = None) -> Tensor:
    """Σ ā āᵀ of rows [K, i] or [K, q, i], or of those that are kept [K], without ever appending the ones."""
    rows = rows.float() if rows.itemsize < 4 else rows
    if kept is not None:
        rows = rows * kept.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
    moment = second_moment(rows)
    return border(moment, rows.sum(dim=0), len(rows) if kept is None else kept.sum()) if bias else moment


def kernel_offsets(options: tuple) -> int:
    """K, the number of kernel offsets, of kinds whose last option is the kernel."""
    return prod(options[-1])


def grid(g: Tensor) -> tuple[int, ...]:
    """The map of output gradients [V, B, C, *size]."""
    return tuple(g.shape[3:])


# ------------------------------------------------------- dense: inputs [B, ..., (q), i], outputs [B, ..., (q), o]


def _dense_rows(x: Tensor, options: tuple) -> Tensor:
    (grouped,) = options
    tail = 2 if grouped else 1
    return x.unsqueeze(1) if x.ndim == tail + 1 else x.flatten(1, -tail - 1)


def _dense_output_rows(g: Tensor, options: tuple) -> Tensor:
    (grouped,) = options
    tail = 2 if grouped else 1
    return g.unsqueeze(2) if g.ndim == tail + 2 else g.flatten(2, -tail - 1)


def _dense_gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    (grouped,) = options
    if grouped:
        return torch.einsum("kqo,kqi->qoi", g.flatten(0, -3), x.flatten(0, -3))
    return g.flatten(0, -2).mT @ x.flatten(0, -2)


def _dense_moment(x: Tensor, options: tuple, bias: bool, kept: Tensor | None = None) -> Factor:
    (grouped,) = options
    return moment_of_rows(x.flatten(0, -3 if grouped else -2), bias, kept)


dense = Kind("dense", _dense_gradient, _dense_rows, _dense_output_rows, _dense_moment)
"""A contraction of the last dimension; `options` = (grouped,)."""


# ------------------------------------------------- biases alone: a layer whose only input is the homogeneous 1


def _no_rows(x: Tensor, options: tuple) -> Tensor:
    return _dense_rows(x, options)[..., :0]


def _no_gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.new_zeros(())


bias = Kind("bias", _no_gradient, _no_rows, _dense_output_rows)
"""A bias that several weights share, or whose weight has several; the recorded input is that of the layer."""


def bias_of(kind: Kind) -> Kind:
    """The bias of a layer whose weight is no parameter; the recorded input is the output without its channels."""
    output_rows = kind.output_rows
    assert output_rows is not None
    return Kind("bias", _no_gradient, lambda x, options: output_rows(x.unsqueeze(0), options)[0], output_rows)


dense_bias = bias_of(dense)


def found_bias(kind: Kind, options: tuple, own: Ref, output: Tensor, channels: int) -> Found:
    """The use of a bias alone, of a kind made by `bias_of`; `options` are those of an ungrouped layer, with its outputs
    along the dimension `channels`.
    """
    width = output.shape[channels]
    return Found(
        kind=kind,
        options=options,
        weight=None,
        bias=own,
        inputs=output.narrow(channels, 0, 0),
        output=output,
        positions=output.numel() // max(width, 1),
        outputs=width,
    )


# ------------------------------------------------- maps: inputs [B, C, *size], outputs [B, q·o, *size] or the like


def per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    """One number per dimension, from a number, one number in a sequence, or the sequence."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return given * dims if len(given) == 1 else given


def maps(x: Tensor, dims: int, lead: int = 0) -> Tensor:
    """[1, b, C, *size] -> [b, C, *size]: the images of an input that all examples share."""
    return x.flatten(lead, lead + 1) if x.ndim == lead + dims + 3 else x


def map_rows(g: Tensor, dims: int, groups: int) -> Tensor:
    """Output gradients [V, B, q·o, *size] as rows [V, B, S, (q), o]."""
    rows = maps(g, dims, lead=1).flatten(3).mT
    return rows if groups == 1 else rows.unflatten(-1, (groups, -1))
