"""Blocks without a weight of their own: a bias that several weights share, and leaves that no kind can see."""

from __future__ import annotations

from torch import Tensor

from kfac_func.blocks import Kind
from kfac_func.layers.base import dense


def _no_rows(x: Tensor, options: tuple) -> Tensor:
    assert dense.rows is not None
    return dense.rows(x, options)[..., :0]


def _no_gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.new_zeros(())


bias = Kind("bias", _no_gradient, _no_rows, dense.output_rows)
"""A bias alone: a layer whose only input is the homogeneous 1."""


def _direct(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.flatten(2)


def _sum(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.sum(dim=0).flatten()


unstructured = Kind("unstructured", _sum, per_example=_direct)
"""A leaf used where no kind can see it: only the summed gradient of every output vector is known."""
