"""A block-diagonal curvature: every block by a structure of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import storable
from kfac_func.blocks import Block
from kfac_func.curvature.base import Curvature, Look, Structure
from kfac_func.curvature.diagonal import diagonal


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
    other = diagonal() if vector is None else vector

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
    table, other = dict(rules), diagonal() if vector is None else vector

    def choose(name: str, matrix: bool) -> Structure:
        for pattern, structure in table.items():
            if fnmatchcase(name, pattern):
                return structure if matrix or not structure.matrix else other
        raise HyperparameterError(
            explain(
                f"no rule of by_path matches block {name!r}.",
                got=", ".join(map(repr, table)),
                options="add a last rule '**'",
            )
        )

    def prepare(blocks: dict[str, Block]) -> Any:
        for pattern in table:
            if pattern.strip("*") and not any(fnmatchcase(name, pattern) for name in blocks):
                raise HyperparameterError(
                    explain(
                        f"the rule {pattern!r} of by_path matches no block.",
                        got=", ".join(map(repr, list(blocks)[:20])),
                        options="mend the pattern: blocks are named by the path of their weight",
                    )
                )
        return lifted.prepare(blocks)

    name = ", ".join(f"{pattern}: {structure.name}" for pattern, structure in table.items())
    lifted = _lifted(f"by_path({name})", choose, (*table.values(), other))
    return lifted._replace(prepare=prepare)


def _like(factored: Any, v: Tensor) -> Tensor:
    """V in the precision of the factors: gradients may have another."""
    leaves = _tree.leaves(factored)
    return v.to(leaves[0].dtype) if leaves else v


def _split(blocks: dict[str, Block]) -> Blockwise:
    matrix, vector = (
        {n: block for n, block in blocks.items() if block.layout.matrix is side} for side in (True, False)
    )
    return Blockwise(matrix, vector)


def _lifted(name: str, choose: Choice, structures: tuple[Structure, ...]) -> Curvature:
    def each(fn: Callable[..., Any], things: Blockwise) -> Blockwise:
        """fn(structure, name, thing) for every block."""
        one, two = (
            {block: fn(choose(block, matrix), block, thing) for block, thing in things[1 - matrix].items()}
            for matrix in (True, False)
        )
        return Blockwise(one, two)

    def prepare(blocks: dict[str, Block]) -> Blockwise:
        return each(lambda own, _, block: own.prepare(block), _split(blocks))

    def measure(prepared: Any, frame: Any = ()) -> Any:
        if not isinstance(prepared, Blockwise):
            prepared = prepare(prepared)
        if frame == ():
            return each(lambda own, _, item: own.measure(item, ()), prepared)
        ((block, inner),) = frame.items()
        matrix = block in prepared.matrix
        return choose(block, matrix).measure((prepared.matrix if matrix else prepared.vector)[block], inner)

    def absorb(state: Any, look: Look, fraction: Tensor) -> Blockwise:
        first = look(())

        def one(own: Structure, block: str, moments: Any) -> Any:
            before = () if state == () else (state.matrix | state.vector)[block]
            return own.absorb(before, lambda f: moments if _none(f) else look({block: f}), fraction)

        return each(one, first)

    def refresh(state: Blockwise, damping: Tensor, split: str) -> Blockwise:
        return each(lambda own, _, one: own.refresh(one, damping, split), state)

    def scale(state: Blockwise, look: Look, fraction: Tensor) -> Blockwise:
        def one(own: Structure, block: str, thing: Any) -> Any:
            return thing if own.scale is None else own.scale(thing, lambda f: look({block: f}), fraction)

        return each(one, state)

    def factorize(state: Blockwise, damping: Tensor, split: str, kept: Any = ()) -> Blockwise:
        def one(own: Structure, block: str, thing: Any) -> Any:
            if kept != () and own.scale is None:
                return (kept.matrix | kept.vector)[block]
            return own.factorize(thing, damping, split)

        return each(one, state)

    def solve(factored: Blockwise, vs: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = Blockwise(*({n: item for n, item in part.items() if n in vs} for part in factored))
        found = each(lambda own, block, item: own.solve(item, _like(item, vs[block])), wanted)
        return found.matrix | found.vector

    def dense(state: Blockwise) -> dict[str, Tensor]:
        found = each(lambda own, _, one: own.dense(one), state)
        return found.matrix | found.vector

    scales = any(structure.scale is not None for structure in structures)
    return Curvature(name, prepare, measure, absorb, refresh, scale, factorize, solve, dense, scales)


def _none(frame: Any) -> bool:
    return isinstance(frame, tuple) and len(frame) == 0
