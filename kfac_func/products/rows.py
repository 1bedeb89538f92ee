r"""What every example says, as rows: one provider for all per-example quantities, whatever the route to them.

    V_{v,n} = J_nᵀ c_{v,n} = Σ_s left[v,n,s] right[v,n,s]ᵀ         J_n = ∂z_n/∂w,  c_v [N, *out] any output vectors

All later algorithms see `Pairs` and do not know which route they came from (`products.routes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import CaptureError, HyperparameterError, KFacError, at_least, explain
from kfac_func._tracing import readable
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import Layout, Pairs
from kfac_func.capture import (
    Cut,
    Generators,
    Plan,
    check_examples,
    not_empty,
    repeatable,
    rules_of,
    same_numbers,
    tensor_of,
)
from kfac_func.products.routes import Route, Way, way_of
from kfac_func.products.runs import apart
from kfac_func.products.sources import Sources, Vectors, once


class ExampleRows(NamedTuple):
    """What every example of a batch says, by block.

    outputs    z [N, *out]
    pairs      by block name: left [V, N, S, (q), o] and right [V or 1, N, S, (q), i], without any 1/√N, so that
               Σ_s left rightᵀ = V_{v,n} = J_nᵀ c_{v,n} as the block's array. A vector block has o = p, i = 1, S = 1
    layouts    how parameter leaves form the array of each block (`blocks.pack`, `blocks.unpack`)
    by_leaf    whether every leaf is a vector block of its own: all routes but the tape

    Parameters that the model never reads have no block on the tape, and rows of zeros on the other routes.
    """

    outputs: Tensor
    pairs: dict[str, Pairs]
    layouts: dict[str, Layout]
    by_leaf: bool


Pass: TypeAlias = Callable[[], Iterator[ExampleRows]]
"""Some examples: their rows for one chunk of output vectors after the other."""

Reader: TypeAlias = Callable[[PyTree, Any, Sources], list[Pass]]
"""(params, inputs, sources) -> the passes over a batch."""


def reader(
    fn: Model,
    *,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    plan: Plan | None = None,
) -> Reader:
    """What `example_rows` does, not yet done: `chunk_size` examples in every pass, for what reduces rows at once. Plans
    are made once for every kind of batch.
    """
    at_least(1, chunk_size=chunk_size)
    way_for = way_of(fn, route, only, plan)

    def read(params: PyTree, inputs: Any, sources: Sources) -> list[Pass]:
        _tree.know(inputs)
        if not rules_of(fn).whole:
            not_empty(inputs)
        way = way_for(params, inputs)
        if chunk_size is None:
            return [_pass(way, params, inputs, sources)]
        cut = _cuttable(way.cut)
        count = cut.count(inputs)
        parts = [(k, cut.part(inputs, k, k + chunk_size)) for k in range(0, count, chunk_size)]
        if len(parts) == 1:
            return [_pass(way, params, inputs, sources)]
        return _passes(fn, way, params, inputs, parts, sources)

    return read


def example_rows(
    fn: Model,
    params: PyTree,
    inputs: Any,
    vectors: Vectors,
    *,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    plan: Plan | None = None,
) -> ExampleRows:
    r"""The rows of V_{v,n} = J_nᵀ c_{v,n} of a batch, for all output vectors c_v and all blocks.

    fn           pure function (params, inputs) -> z [N, *out]. Examples must not see each other (no batch statistics)
    inputs       tensor, or a tree; `kf.batched` says where the examples are when the model cannot be asked
    vectors      z -> c [V, N, *out], always asked about the whole batch, so that a loss that normalises over the batch
                 keeps its meaning in chunks
    route        how the rows are had, see `products.routes`; equal numbers
    chunk_size   examples at a time (None: all): bounds memory, at the price of two more forward passes
    only         patterns of parameter paths (`fnmatch`): the others are constants
    plan         an explicit `make_plan(fn, params, inputs)` for the tape, of the leaves that `only` keeps

    Raises CaptureError for what a route cannot give per example, and for models whose examples see each other;
    BatchError for an empty batch and where a NaN shows, HyperparameterError for an unknown route, a chunk_size below 1
    and patterns without a parameter.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> loss, y = kf.losses.mse(), torch.zeros(5, 2)
        >>> rows = example_rows(fn, params, torch.ones(5, 3), lambda z: loss.score(z, y)[None])
        >>> rows.pairs["weight"].left.shape, rows.pairs["weight"].right.shape
        (torch.Size([1, 5, 1, 2]), torch.Size([1, 5, 1, 4]))
    """
    read = reader(fn, route=route, chunk_size=chunk_size, only=only, plan=plan)
    return joined([whole(part) for part in read(params, inputs, once(vectors))])


def joined(found: list[ExampleRows]) -> ExampleRows:
    """The rows of several passes with the same vectors, as those of one."""
    if len(found) == 1:
        return found[0]
    pairs = {
        name: Pairs(*(torch.cat(sides, dim=1) for sides in zip(*(part.pairs[name] for part in found), strict=True)))
        for name in found[0].pairs
    }
    return found[0]._replace(outputs=torch.cat([part.outputs for part in found]), pairs=pairs)


def whole(part: Pass) -> ExampleRows:
    """The rows of a pass whose vectors come in one chunk."""
    (rows,) = part()
    return rows


def _pass(way: Way, params: PyTree, inputs: Any, sources: Sources) -> Pass:
    again, made = repeatable(_tree.leaves(params)), []

    def rows() -> Iterator[ExampleRows]:
        run = again(lambda: way.run(params, inputs))
        made[:] = made or [sources(run.outputs)]
        for c in made[0]():
            found, layouts = run.rows(c)
            yield ExampleRows(run.outputs, found, layouts, way.by_leaf)

    return rows


def _passes(
    fn: Model, way: Way, params: PyTree, inputs: Any, parts: list[tuple[int, Any]], sources: Sources
) -> list[Pass]:
    """The vectors are those of all outputs, and a part draws again what it drew for them (dropout)."""
    draws = [repeatable(_tree.leaves(params)) for _ in parts]
    before = Generators.of(_tree.leaves(params))
    z = [again(lambda part=part: _outputs(fn, params, part)) for again, (_, part) in zip(draws, parts, strict=True)]
    for outputs, (_, part) in zip(z, parts, strict=True):
        check_examples(outputs, way.cut.count(part))
    if readable(z[0]) and before.equal(Generators.of(_tree.leaves(params))):
        _in_other_company(fn, way.cut, params, inputs, torch.cat(z), len(z[0]))
    remade = sources(torch.cat(z))

    def one(k: int) -> Pass:
        (start, part), stop = parts[k], parts[k][0] + len(z[k])

        def rows() -> Iterator[ExampleRows]:
            run = draws[k](lambda: way.run(params, part))
            for c in remade():
                found, layouts = run.rows(c[:, start:stop])
                yield ExampleRows(run.outputs, found, layouts, way.by_leaf)

        return rows

    return [one(k) for k in range(len(parts))]


def _in_other_company(fn: Model, cut: Cut, params: PyTree, inputs: Any, z: Tensor, size: int) -> None:
    """Raise CaptureError when the outputs of an example are others in a chunk with other examples."""
    groups = math.ceil(len(z) / max(size, 2))
    for first in range(groups):
        order = list(range(first, len(z), groups))
        with torch.no_grad():
            other = _outputs(fn, params, cut.take(inputs, order))
        if not same_numbers(z[order].detach(), other, 2**12):
            apart("its outputs are others in a chunk with other examples of this batch")


def _outputs(fn: Model, params: PyTree, part: Any) -> Tensor:
    try:
        return tensor_of(fn(params, part))
    except KFacError:
        raise
    except Exception as error:
        raise CaptureError(
            explain(
                "the model does not run on a chunk of the batch.",
                got=f"{type(error).__name__}: {str(error).strip()}".splitlines()[0],
                options="another chunk_size, or none; a last chunk may be as short as one example",
            )
        ) from error


def _cuttable(cut: Cut) -> Cut:
    if cut.whole:
        raise HyperparameterError(
            explain(
                "the batch cannot be cut into chunks.",
                why="the model takes it as a whole",
                options="leave chunk_size out; route='loop' holds the gradient of one example at a time",
            )
        )
    return cut
