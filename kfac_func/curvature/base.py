"""The protocols of curvature: `Structure` for one block, `Curvature` for the whole tree. Both are values, not base
classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree


class Structure(NamedTuple):
    """An approximation of the curvature F of one block, as pure functions. V is the block's array [o, i], [q, o, i]
    or [p].

    measure(block) -> moments                    what a batch says: MEANS over examples, so they average over
                                                 micro-batches and ranks
    absorb(state, moments, fraction) -> state    moving average, state + fraction · (moments − state); cheap
    factorize(state, damping, split) -> factored what `solve` needs; dear. `damping` in units of F
    solve(factored, v) -> v                      (F̂ + λ)⁻¹ v: linear, symmetric positive definite; cheap
    dense(state) -> [p, p]                       F̂ without damping, on row-major vec(V): the oracle, never used in
                                                 training
    matrix                                       whether it needs a matrix block

    State and factored are NamedTuples of tensors.
    """

    name: str
    measure: Callable[[Any], Any]
    factorize: Callable[[Any, Tensor, str], Any]
    solve: Callable[[Any, Tensor], Tensor]
    dense: Callable[[Any], Tensor]
    matrix: bool = False
    absorb: Callable[[Any, Any, Tensor], Any] = lambda state, moments, fraction: average(state, moments, fraction)


class Curvature(NamedTuple):
    """The same functions for all blocks together, as dictionaries by block name.

    init(moments) -> state                       zeros in the form of the moments
    measure(blocks) -> moments
    absorb(state, moments, fraction) -> state
    factorize(state, damping, split) -> factored
    solve(factored, vs) -> vs
    dense(state) -> one dense matrix per block
    """

    name: str
    init: Callable[[Any], Any]
    measure: Callable[[Any], Any]
    absorb: Callable[[Any, Any, Tensor], Any]
    factorize: Callable[[Any, Tensor, str], Any]
    solve: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
    dense: Callable[[Any], dict[str, Tensor]]


def average(state: Any, moments: Any, fraction: Tensor) -> Any:
    """state + fraction · (moments − state), leaf by leaf, in the dtype of the state."""
    return _tree.tree_map(lambda x, m: torch.lerp(x, m.to(x.dtype), fraction.to(x.dtype)), state, moments)


def zeros(moments: Any) -> Any:
    """An empty state in the form of the moments."""
    return _tree.tree_map(torch.zeros_like, moments)
