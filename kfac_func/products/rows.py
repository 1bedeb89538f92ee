r"""What every example says, as rows: one provider for all per-example quantities, and two routes to it.

    V_{v,n} = J_nᵀ c_{v,n} = Σ_s left[v,n,s] right[v,n,s]ᵀ         J_n = ∂z_n/∂w,  c_v [N, *out] any output vectors

"tape"    one forward pass with taps, one backward pass for every v: V_{v,n} stays in two thin factors
"vmap"    a vmap over single examples of fn and its pullback, for models with uses that the tape cannot see: V_{v,n} is
          there entry by entry, every leaf a vector block of its own

All later algorithms see `Pairs` and do not know which route they came from. Source of the thin factors: Goodfellow 2015
(1510.01799), §5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, CaptureError, HyperparameterError, at_least, explain
from kfac_func._patterns import chosen
from kfac_func._tracing import readable
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import Block, Layout, Pairs, Use, pairs
from kfac_func.capture import Plan, Planner, batch_size, check_examples, planner, record
from kfac_func.products.sources import Sources, Vectors, once

Route: TypeAlias = Literal["tape", "vmap"]
"""From the taps of the layers, or a vmap over examples."""


class ExampleRows(NamedTuple):
    """What every example of a batch says, by block.

    outputs    z [N, *out]
    pairs      by block name: left [V, N, S, (q), o] and right [V or 1, N, S, (q), i], without any 1/√N, so that
               Σ_s left rightᵀ = V_{v,n} = J_nᵀ c_{v,n} as the block's array. A vector block has o = p, i = 1, S = 1
    layouts    how parameter leaves form the array of each block (`blocks.pack`, `blocks.unpack`)

    Parameters that the model never reads have no block on the tape, and rows of zeros on the route "vmap".
    """

    outputs: Tensor
    pairs: dict[str, Pairs]
    layouts: dict[str, Layout]


def example_rows(
    fn: Model,
    params: PyTree,
    inputs: Any,
    vectors: Vectors,
    *,
    route: Route = "tape",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    plan: Plan | Planner | None = None,
) -> ExampleRows:
    r"""The rows of V_{v,n} = J_nᵀ c_{v,n} of a batch, for all output vectors c_v and all blocks.

    fn           pure function (params, inputs) -> z [N, *out]. Examples must not see each other (no batch statistics)
    inputs       tensor, or a tree: its leaves whose first dimension is N are the examples, the others go along
    vectors      z -> c [V, N, *out], always asked about the whole batch, so that a loss that normalises over the batch
                 keeps its meaning in chunks
    route        "tape" or "vmap" (see the module); equal numbers. "vmap" for what the tape refuses
    chunk_size   examples at a time (None: all): bounds the memory of the passes, at the price of a further forward pass
    only         patterns of block names to keep (`fnmatch`): weights on the tape, leaves on the route "vmap"
    plan         an explicit `make_plan(fn, params, inputs)` for the tape, or what makes one (`plans`)

    Raises CaptureError for what the tape cannot give per example (parameters used where no kind sees them, uses that
    all examples share), BatchError for an empty batch and where a NaN shows, HyperparameterError for an unknown route,
    a chunk_size below 1 and patterns without a block.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> loss, y = kf.losses.mse(), torch.zeros(5, 2)
        >>> rows = example_rows(fn, params, torch.ones(5, 3), lambda z: loss.score(z, y)[None])
        >>> rows.pairs["weight"].left.shape, rows.pairs["weight"].right.shape
        (torch.Size([1, 5, 1, 2]), torch.Size([1, 5, 1, 4]))
    """
    parts = passes(fn, params, inputs, once(vectors), route=route, chunk_size=chunk_size, only=only, plan=plan)
    found = [whole(part) for part in parts]
    if len(found) == 1:
        return found[0]
    joined = {
        name: Pairs(*(torch.cat(sides, dim=1) for sides in zip(*(part.pairs[name] for part in found), strict=True)))
        for name in found[0].pairs
    }
    return ExampleRows(torch.cat([part.outputs for part in found]), joined, found[0].layouts)


Pass: TypeAlias = Callable[[], Iterator[ExampleRows]]
"""Some examples: their rows for one chunk of output vectors after the other."""


def whole(part: Pass) -> ExampleRows:
    """The rows of a pass whose vectors come in one chunk."""
    (rows,) = part()
    return rows


def passes(
    fn: Model,
    params: PyTree,
    inputs: Any,
    sources: Sources,
    *,
    route: Route = "tape",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    plan: Plan | Planner | None = None,
) -> list[Pass]:
    """What `example_rows` does, not yet done: `chunk_size` examples in every pass, for what reduces rows at once."""
    if route not in get_args(Route):
        raise HyperparameterError(
            explain("unknown route.", got=repr(route), wanted=" or ".join(map(repr, get_args(Route))))
        )
    at_least(1, chunk_size=chunk_size)
    count = batch_size(inputs)
    size = count if chunk_size is None else min(chunk_size, count)
    rows = _vmapped(fn, params, inputs, only) if route == "vmap" else _taped(fn, params, inputs, only, plan)
    if size == count:
        return [lambda: rows(inputs, sources)]
    starts = range(0, count, size)
    parts = [_slice(inputs, count, start, start + size) for start in starts]
    remade = sources(torch.cat([_forward(fn, params, part) for part in parts]))

    def one(part: Any, start: int) -> Pass:
        return lambda: rows(part, lambda _: lambda: (c[:, start : start + size] for c in remade()))

    return [one(part, start) for part, start in zip(parts, starts, strict=True)]


Rows: TypeAlias = Callable[[Any, Sources], Iterator[ExampleRows]]


def _slice(inputs: Any, count: int, start: int, stop: int) -> Any:
    return _tree.tree_map(lambda leaf: leaf[start:stop] if _batched(leaf, count) else leaf, inputs)


def _batched(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count


def _forward(fn: Model, params: PyTree, inputs: Any) -> Tensor:
    z = fn(params, inputs)
    check_examples(z, batch_size(inputs))
    return z


# ------------------------------------------------------------------ the tape


def _taped(fn: Model, params: PyTree, inputs: Any, only: Sequence[str] | None, plan: Plan | Planner | None) -> Rows:
    given = plans(fn) if plan is None else plan
    plan = given if isinstance(given, Plan) else given(params, inputs)
    strays = [path for path, _ in plan.unclaimed]
    kept = chosen(only, [block.layout.name for block in plan.blocks] + strays + list(plan.unused), "only")
    blocks = {layout.name: (layout, uses) for layout, uses in plan.blocks if layout.name in kept}
    for name in kept:
        shared = name in blocks and any(rule.where is None for _, rule in blocks[name][1])
        if name in strays or shared:
            raise CaptureError(_off_tape(name, shared))

    def rows(inputs: Any, sources: Sources) -> Iterator[ExampleRows]:
        run = record(fn, plan, params, inputs)
        for c in sources(run.outputs)():
            taps = _each(lambda one: run.pullback(one)[0], _known(c, run.outputs))
            found = {}
            for name, (layout, uses) in blocks.items():
                mine = tuple(Use(run.inputs[k], taps[k], rule) for k, rule in uses)
                found[name] = _clean(name, pairs(Block(layout, mine, 1, 1)))  # one example: no 1/√N
            yield ExampleRows(run.outputs, found, {name: layout for name, (layout, _) in blocks.items()})

    return rows


def plans(fn: Model) -> Planner:
    """The plans of a model for the tape, made once for every kind of batch."""
    planned = planner(fn, strict=False)

    def offering(params: PyTree, inputs: Any) -> Plan:
        try:
            return planned(params, inputs)
        except CaptureError as error:
            raise type(error)(f"{error}\n  or       route='vmap', if examples do not see each other") from error

    return offering


def _off_tape(name: str, shared: bool) -> str:
    return explain(
        f"the tape has no gradient of its own for every example for {name!r}.",
        why="all examples share a use of it" if shared else "it is used where no layer kind can see it",
        wanted="uses as weight of linear, conv, embedding, norm, matmul or einsum that have the batch dimension",
        options="route='vmap', which goes through the model one example after the other; or only=, without it",
    )


# ------------------------------------------------------------------ a vmap over examples


def _vmapped(fn: Model, params: PyTree, inputs: Any, only: Sequence[str] | None) -> Rows:
    leaves = _tree.unique_paths(params)
    kept, count = chosen(only, leaves, "only"), batch_size(inputs)
    places = [k for k, leaf in enumerate(_tree.leaves(inputs)) if _batched(leaf, count)]

    def rows(inputs: Any, sources: Sources) -> Iterator[ExampleRows]:
        values = _tree.leaves(inputs)

        def one(own: list[Tensor], c: Tensor) -> list[Tensor]:
            """J_nᵀ c_{v,n} of one example, [V, *shape] of every leaf."""
            mine = dict(zip(places, own, strict=True))
            x = _tree.with_leaves(inputs, [mine[k][None] if k in mine else leaf for k, leaf in enumerate(values)])

            def output(own: list[Tensor]) -> Tensor:
                moved = leaves | dict(zip(kept, own, strict=True))
                return fn(_tree.with_leaves(params, list(moved.values())), x)[0]

            pullback = torch.func.vjp(output, [leaves[path] for path in kept])[1]
            return list(_each(lambda one: pullback(one)[0], c))

        z = _forward(fn, params, inputs)
        for c in sources(z)():
            grads = torch.func.vmap(one, in_dims=(0, 1))([values[k] for k in places], _known(c, z))
            flat = {path: g.flatten(2).transpose(0, 1).unsqueeze(2) for path, g in zip(kept, grads, strict=True)}
            found = {path: _clean(path, Pairs(g, g.new_ones(1, g.shape[1], 1, 1))) for path, g in flat.items()}
            yield ExampleRows(z, found, {path: _vector(path, leaves[path]) for path in kept})

    return rows


def _vector(path: str, leaf: Tensor) -> Layout:
    return Layout(path, "unstructured", path, None, tuple(leaf.shape), outputs=leaf.numel(), matrix=False)


# ------------------------------------------------------------------ what both routes ask


def _each(pullback: Callable[[Tensor], Sequence[Tensor]], c: Tensor) -> Sequence[Tensor]:
    """The pullback of every c_v; a single one needs no vmap."""
    return [g.unsqueeze(0) for g in pullback(c[0])] if len(c) == 1 else torch.func.vmap(pullback)(c)


def _known(c: Tensor, z: Tensor) -> Tensor:
    """The output vectors in the type of the outputs, neither with a NaN."""
    _without_nan("the outputs of the model hold NaN.", z[None], "look for it in the parameters and the inputs")
    _without_nan("the gradients of the loss in the outputs hold NaN.", c, "look for it in the targets")
    return c.to(z.dtype)


def _clean(name: str, rows: Pairs) -> Pairs:
    _without_nan(f"the gradients of {name!r} hold NaN.", rows.left, "look for 0/0 in the derivatives of the model")
    return rows


def _without_nan(what: str, values: Tensor, options: str) -> None:
    """Of values [V, N, ...] that Python may read."""
    if readable(values) and bool(values.amax().isnan()):  # keeps a NaN, without a copy of flags
        bad = values.isnan().movedim(1, 0).flatten(1).any(1)
        raise BatchError(explain(what, got=f"NaN for {int(bad.sum())} of {len(bad)} examples", options=options))
