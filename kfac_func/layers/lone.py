"""Leaves that no kind can see."""

from __future__ import annotations

from torch import Tensor

from kfac_func.blocks import Kind


def _direct(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.reshape(*g.shape[:2], -1)


def _sum(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return g.sum(dim=0).flatten()


unstructured = Kind("unstructured", _sum, per_example=_direct)
"""A leaf used where no kind can see it: only the summed gradient of every output vector is known."""
