"""The protocols of curvature: `Structure` for one block, `Curvature` for the whole tree. Both are values, not base
classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func.blocks import Blocks, Diagonal, KroneckerState, Offsets, Pairs
from kfac_func.linalg import Spectral

_tree.storable(KroneckerState, Diagonal, Blocks, Offsets, Pairs)  # what states are made of


Question = Callable[[Any], Any]
"""prepared -> answer: tensors that are MEANS over the examples, or rows (`Pairs`)."""


class Batch(NamedTuple):
    """What a curvature may know of a batch, in however many micro-batches or on however many ranks it lies.

    first    the moments, as `measure` gives them; () for a batch that is only asked (by `scale`)
    ask      question -> answer: question(prepared) wherever examples lie, and the mean of those over all examples; rows
             stand side by side

    The rows of a batch pass through here or not at all, so that who pools micro-batches or ranks replaces `ask` alone.
    """

    first: Any
    ask: Callable[[Question], Any]

    def about(self, part: Callable[[Any], Any]) -> Callable[[Question], Any]:
        """`ask` for questions about a part of what was prepared."""
        return lambda question: self.ask(lambda prepared: question(part(prepared)))

    def of(self, part: Callable[[Any], Any]) -> Batch:
        """A part, of the moments and of what was prepared alike: that of one block, say."""
        asked_only = isinstance(self.first, tuple) and not self.first
        return Batch(() if asked_only else part(self.first), self.about(part))


class Structure(NamedTuple):
    """An approximation of the curvature F of one block, as pure functions. V is the block's array [o, i], [q, o, i]
    or [p].

    Every batch with statistics:

    prepare(block) -> prepared                   what `measure` needs of the batch, made once per batch
    measure(prepared) -> moments                 what the batch says at first: MEANS over examples
    absorb(state, batch, fraction) -> state      moving average: state + fraction · (batch.first − state). `state` is ()
                                                 at first; fraction 0 changes nothing. Structures that see the batch
                                                 through their state (a basis, factors) ask it more

    When due (every `refresh_every`; the scalings every `scale_every`):

    refresh(state, damping, split) -> state      the dear part of the state: a basis, roots. Without it: nothing
    scale(state, batch, fraction) -> state       moving average of what the refreshed state asks; None: nothing
    factorize(state, damping, split) -> factored what `solve` needs; `damping` in units of F. Also after every `scale`

    Every step:

    solve(factored, v) -> v                      (F̂ + λ)⁻¹ v: linear, symmetric positive definite; cheap. Where
                                                 `thin`, v may come as its rows (see `Thin`)
    dense(state) -> [p, p]                       F̂ without damping, on row-major vec(V): the oracle, never used in
                                                 training
    spectrum(state, damping, split) -> Spectral  F̂ with its damping, in an eigenbasis: what `solve` inverts. None where
                                                 there is none that is cheaper than that of `dense`
    matrix                                       whether it needs a matrix block
    summable                                     whether output vectors may come a few at a time: moments and answers
                                                 add over them (or do not depend on them, like A), `absorb` asks
                                                 nothing, and no question of `scale` depends on another answer

    State, moments and factored are NamedTuples of tensors.
    """

    name: str
    measure: Callable[..., Any]
    factorize: Callable[[Any, Tensor, str], Any]
    solve: Callable[[Any, Any], Tensor]
    dense: Callable[[Any], Tensor]
    matrix: bool = False
    prepare: Callable[[Any], Any] = lambda block: block
    absorb: Callable[[Any, Batch, Tensor], Any] = lambda state, batch, fraction: average(state, batch.first, fraction)
    refresh: Callable[[Any, Tensor, str], Any] = lambda state, damping, split: state
    scale: Callable[[Any, Batch, Tensor], Any] | None = None
    thin: bool = False
    spectrum: Callable[[Any, Tensor, str], Spectral] | None = None
    summable: bool = False


class Curvature(NamedTuple):
    """The same functions for all blocks together, as dictionaries by block name; `damping` is one of them, λ_l.

    prepare(blocks) -> prepared
    measure(prepared) -> moments
    absorb(state, batch, fraction) -> state
    refresh(state, damping, split) -> state
    scale(state, batch, fraction) -> state
    factorize(state, damping, split, kept) -> factored
                                                 `kept`: an older one, to be kept where `scale` cannot have changed
                                                 it; () to make all anew
    solve(factored, vs) -> vs                    for blocks by name, any of them
    dense(state) -> one dense matrix per block
    scales                                       whether `scale` does anything
    thin(name) -> bool                           whether `solve` takes the V of a matrix block as its rows too
    spectra(state, damping, split) -> Spectral by block name
                                                 F̂ with its damping; None for curvature between blocks
    costs(state) -> numbers by block name        what a factorisation of each block costs, up to a factor. A curvature
                                                 that has it can do some blocks at a time: `refresh` and `factorize`
                                                 take one more argument then, the names of the blocks that are `due`
    summable                                     as for `Structure`
    """

    name: str
    prepare: Callable[[Any], Any]
    measure: Callable[..., Any]
    absorb: Callable[[Any, Batch, Tensor], Any]
    refresh: Callable[..., Any]
    scale: Callable[[Any, Batch, Tensor], Any]
    factorize: Callable[..., Any]
    solve: Callable[[Any, dict[str, Any]], dict[str, Tensor]]
    dense: Callable[[Any], dict[str, Tensor]]
    scales: bool = False
    costs: Callable[[Any], dict[str, int]] | None = None
    thin: Callable[[str], bool] = lambda name: False
    spectra: Callable[..., dict[str, Spectral]] | None = None
    summable: bool = False


def average(state: Any, moments: Any, fraction: Tensor) -> Any:
    """state + fraction · (moments − state), leaf by leaf, in the dtype of the state; () is a state of zeros."""
    if isinstance(state, tuple) and state == ():
        return _tree.tree_map(lambda m: m * fraction.to(m.dtype), moments)
    return _tree.tree_map(lambda x, m: torch.lerp(x, m.to(x.dtype), fraction.to(x.dtype)), state, moments)
