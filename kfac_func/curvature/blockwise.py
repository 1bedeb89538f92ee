"""A block-diagonal curvature: every block by a structure of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func._patterns import first_match, useful
from kfac_func._tree import storable
from kfac_func.blocks import Block, Thin
from kfac_func.curvature.base import Batch, Curvature, Structure
from kfac_func.curvature.diagonal import diagonal
from kfac_func.linalg import Spectral, decomposed
from kfac_func.linalg.workers import side_by_side


class Blockwise(NamedTuple):
    """Something per block: matrix blocks (weights) and vector blocks (scale and shift, unclaimed leaves)."""

    matrix: dict[str, Any]
    vector: dict[str, Any]


storable(Blockwise)
Choice = Callable[[str, bool], Structure]
"""(the name of a block, whether it is a matrix) -> its structure."""


def blockwise(structure: Structure, vector: Structure | None = None) -> Curvature:
    """Lift structures from a block to the tree: `structure` for matrix blocks, `vector` (default `diagonal()`) for
    scale-and-shift and unclaimed leaves.

    >>> kf.curvature.blockwise(kf.curvature.kronecker()).name
    'blockwise(kronecker[cholesky], diagonal)'
    """
    other = diagonal(crossed=structure.name != "diagonal") if vector is None else vector

    def choose(name: str, matrix: bool) -> Structure:
        del name
        return structure if matrix else other

    return _lifted(f"blockwise({structure.name}, {other.name})", choose, (structure, other))


def by_path(rules: Mapping[str, Structure], vector: Structure | None = None) -> Curvature:
    """A structure per block, by the path of its weight; the first pattern that matches decides.

    rules     patterns as in `fnmatch` ("*" and "**" both match any part of a path) -> structure
    vector    for vector blocks (scale and shift, unclaimed leaves) whose pattern names a structure that needs a matrix;
              default `diagonal()`

    Raises HyperparameterError when there is no rule; when statistics come, for a block that no pattern matches and
    for a pattern that matches no block.

        >>> head, rest = kf.curvature.diagonal(), kf.curvature.kronecker()
        >>> kf.curvature.by_path({"2.*": head, "**": rest}).name
        'by_path(2.*: diagonal, **: kronecker[cholesky])'
    """
    if not rules:
        raise HyperparameterError(explain("by_path got no rules.", options="by_path({'**': kronecker()}, ...)"))
    table, other = dict(rules), diagonal(crossed=True) if vector is None else vector

    def choose(name: str, matrix: bool) -> Structure:
        structure = table[first_match(table, name, "by_path")]
        return structure if matrix or not structure.matrix else other

    def prepare(blocks: dict[str, Block]) -> Any:
        useful(table, blocks, "by_path")
        return lifted.prepare(blocks)

    name = ", ".join(f"{pattern}: {structure.name}" for pattern, structure in table.items())
    lifted = _lifted(f"by_path({name})", choose, (*table.values(), other))
    return lifted._replace(prepare=prepare)


def _like(factored: Any, v: Tensor | Thin) -> Tensor | Thin:
    """V in the precision of the factors: gradients may have another."""
    leaves = _tree.leaves(factored)
    return v.to(leaves[0].dtype) if leaves else v


def _split(blocks: dict[str, Block]) -> Blockwise:
    filled = {name: block for name, block in blocks.items() if not block.layout.empty}
    matrix, vector = ({n: b for n, b in filled.items() if b.layout.matrix is side} for side in (True, False))
    return Blockwise(matrix, vector)


def _each(choose: Choice, fn: Callable[..., Any], things: Blockwise) -> Blockwise:
    """fn(structure, name, thing) for every block."""
    one, two = (
        {block: fn(choose(block, matrix), block, thing) for block, thing in things[1 - matrix].items()}
        for matrix in (True, False)
    )
    return Blockwise(one, two)


def _apart(choose: Choice, fn: Callable[..., Any], things: Blockwise) -> Blockwise:
    """The same for what is dear and works on one core: the blocks side by side."""
    jobs = _each(choose, lambda *block: partial(fn, *block), things)
    done = side_by_side([*jobs.matrix.values(), *jobs.vector.values()], _tree.leaves(things))
    results = dict(zip((*jobs.matrix, *jobs.vector), done, strict=True))
    return Blockwise(*({block: results[block] for block in part} for part in jobs))


def _lifted(name: str, choose: Choice, structures: tuple[Structure, ...]) -> Curvature:
    each, apart = partial(_each, choose), partial(_apart, choose)

    def prepare(blocks: dict[str, Block]) -> Blockwise:
        return each(lambda own, _, block: own.prepare(block), _split(blocks))

    def measure(prepared: Any) -> Any:
        prepared = prepared if isinstance(prepared, Blockwise) else prepare(prepared)
        return each(lambda own, _, item: own.measure(item), prepared)

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> Blockwise:
        def one(own: Structure, block: str, _: Any) -> Any:
            before = () if state == () else _flat(state)[block]
            return own.absorb(before, batch.of(_block(block)), fraction)

        return each(one, batch.first)

    def refresh(state: Blockwise, damping: dict[str, Tensor], split: str, due: Any = None) -> Blockwise:
        def one(own: Structure, block: str, thing: Any) -> Any:
            return own.refresh(thing, damping[block], split) if due is None or block in due else thing

        return apart(one, state)

    def scale(state: Blockwise, batch: Batch, fraction: Tensor) -> Blockwise:
        def one(own: Structure, block: str, thing: Any) -> Any:
            return thing if own.scale is None else own.scale(thing, batch.of(_block(block)), fraction)

        return each(one, state)

    def factorize(state: Blockwise, damping: dict[str, Tensor], split: str, kept: Any = (), due: Any = ()) -> Blockwise:
        def one(own: Structure, block: str, thing: Any) -> Any:
            if kept != () and own.scale is None and block not in due:
                return _flat(kept)[block]
            return own.factorize(thing, damping[block], split)

        return apart(one, state)

    def solve(factored: Blockwise, vs: dict[str, Tensor | Thin]) -> dict[str, Tensor]:
        wanted = Blockwise(*({n: item for n, item in part.items() if n in vs} for part in factored))
        return _flat(each(lambda own, block, item: own.solve(item, _like(item, vs[block])), wanted))

    def dense(state: Blockwise) -> dict[str, Tensor]:
        return _flat(each(lambda own, _, one: own.dense(one), state))

    def thin(name: str) -> bool:
        return choose(name, True).thin

    def spectra(state: Blockwise, damping: dict[str, Tensor], split: str) -> dict[str, Spectral]:
        return _flat(apart(lambda own, block, thing: _spectrum(own, thing, damping[block], split), state))

    scales = any(structure.scale is not None for structure in structures)
    summable = all(structure.summable for structure in structures)
    every = prepare, measure, absorb, refresh, scale, factorize, solve, dense
    return Curvature(name, *every, scales, _costs, thin, spectra, summable)


def _spectrum(own: Structure, state: Any, damping: Tensor, split: str) -> Spectral:
    """F̂ with its damping, by the dense matrix where a structure has no eigenbasis."""
    if own.spectrum is not None:
        return own.spectrum(state, damping, split)
    found = decomposed(own.dense(state))
    return found._replace(values=found.values + damping.to(found.values.dtype))


def _costs(state: Blockwise) -> dict[str, int]:
    """d³ for every d x d matrix that the state of a block is made of, and the count of its other numbers."""
    return {name: sum(map(_cost, _tree.leaves(one))) for name, one in _flat(state).items()}


def _cost(x: Tensor) -> int:
    square = x.ndim > 1 and x.shape[-1] == x.shape[-2]
    return x.numel() * (x.shape[-1] if square else 1)


def _flat(things: Blockwise) -> dict[str, Any]:
    return things.matrix | things.vector


def _block(name: str) -> Callable[[Blockwise], Any]:
    return lambda things: _flat(things)[name]
