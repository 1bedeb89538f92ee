"""Blocks without a weight of their own: a bias that several weights share, and leaves that no kind can see."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from kfac_func.blocks import Kind
from kfac_func.layers.base import Found, Ref, dense


def _no_rows(x: Tensor, options: tuple) -> Tensor:
    assert dense.rows is not None
    return dense.rows(x, options)[..., :0]


def _no_gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.new_zeros(())


bias = Kind("bias", _no_gradient, _no_rows, dense.output_rows)
"""A bias alone: a layer whose only input is the homogeneous 1."""


@cache
def alone(kind: Kind) -> Kind:
    """The bias of a layer of this kind whose weight is no parameter: its recorded input is its output without
    channels.
    """
    assert kind.output_rows is not None
    output_rows = kind.output_rows
    return Kind("bias", _no_gradient, lambda x, options: output_rows(x.unsqueeze(0), options)[0], output_rows)


def _direct(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.reshape(*g.shape[:2], -1)


def _sum(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.sum(dim=0).flatten()


unstructured = Kind("unstructured", _sum, per_example=_direct)
"""A leaf used where no kind can see it: only the summed gradient of every output vector is known."""


def found_alone(kind: Kind, options: tuple, bias: Ref | None, output: Tensor, channels: int) -> Found | None:
    """The use of a bias whose weight is no parameter; `options` those of an ungrouped layer, with its outputs along the
    dimension `channels`. None when the bias is no parameter either.
    """
    if bias is None:
        return None
    width = output.shape[channels]
    return Found(
        kind=alone(kind),
        options=options,
        weight=None,
        bias=bias,
        inputs=output.narrow(channels, 0, 0),
        output=output,
        positions=output.numel() // max(width, 1),
        outputs=width,
    )
