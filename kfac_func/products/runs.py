"""One run of the model on every route: outputs, and the rows of output vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, CaptureError, PlanMismatchError, explain
from kfac_func._tracing import level, readable
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import Block, Layout, Pairs, Use, pairs
from kfac_func.blocks.rows import precise
from kfac_func.capture import (
    Cut,
    Plan,
    check_examples,
    chosen_leaves,
    plainly,
    record,
    restricted,
    tensor_of,
)
from kfac_func.products.linear import differentiable

Rows: TypeAlias = tuple[dict[str, Pairs], dict[str, Layout]]
"""By block name."""


class Run(NamedTuple):
    """One forward pass: z [N, *out], and the rows of any output vectors c [V, N, *out]."""

    outputs: Tensor
    rows: Callable[[Tensor], Rows]


class Way(NamedTuple):
    """A route that can take a batch: where its examples are, a run of the model, and whether every leaf is a block."""

    cut: Cut
    run: Callable[[PyTree, Any], Run]
    by_leaf: bool


def apart(mixing: str) -> None:
    """Raise CaptureError for a model whose examples see each other."""
    if mixing:
        raise CaptureError(
            explain(
                "the examples of the batch see each other, so none has a gradient of its own.",
                why=mixing,
                options="the model in eval mode, or without what mixes them; what asks about the batch as a whole "
                "(kf.products.hvp, ggn_vp; K-FAC with monte_carlo()); kf.batched(fn, whole=True) with route='loop' for "
                "the gradients of its outputs",
            )
        )


def _restricted(fn: Model, params: PyTree, only: Sequence[str] | None) -> tuple[Model, PyTree]:
    return (fn, params) if only is None else restricted(fn, params, chosen_leaves(params, only))


# ------------------------------------------------------------------ the tape


def taped(fn: Model, only: Sequence[str] | None, plan: Plan) -> Way:
    """The way of a plan. Raises CaptureError when the plan has no rows of its own for every example."""
    apart(plan.mixing)
    for name, uses in [(path, ()) for path, _ in plan.unclaimed] + [(b.layout.name, b.uses) for b in plan.blocks]:
        if not uses or any(rule.where is None for _, rule in uses):
            raise CaptureError(_off_tape(name, shared=bool(uses)))

    def run(params: PyTree, inputs: Any) -> Run:
        model, own = _restricted(fn, params, only)
        try:
            done = record(model, plan, own, inputs)
        except PlanMismatchError as error:
            raise PlanMismatchError(f"{error}\n  or       route='loop'") from error

        def rows(c: Tensor) -> Rows:
            c = _known(c, done.outputs)
            if not plan.blocks:  # no output depends on a parameter
                return _by_leaf(own, [leaf.new_zeros(*c.shape[:2], *leaf.shape) for leaf in _tree.leaves(own)])
            taps, _ = done.pulled(c)
            found, layouts = {}, {}
            for layout, uses in plan.blocks:
                mine = tuple(Use(done.inputs[k], taps[k], rule) for k, rule in uses)
                found[layout.name] = _clean(layout.name, pairs(Block(layout, mine, 1, 1)))  # one example: no 1/√N
                layouts[layout.name] = layout
            return found, layouts

        return Run(done.outputs, rows)

    return Way(plan.cut, run, not plan.blocks)


def _off_tape(name: str, shared: bool) -> str:
    return explain(
        f"the tape has no gradient of its own for every example for {name!r}.",
        why="all examples share a use of it" if shared else "it is used where no layer kind can see it",
        wanted="uses as weight of linear, conv, embedding, norm, matmul or einsum that have the batch dimension",
        options="only=, without it",
    )


# ------------------------------------------------------------------ a vmap over examples


def mapped(fn: Model, only: Sequence[str] | None, cut: Cut) -> Way:
    """The model on one example at a time, all of them in a vmap."""

    def run(params: PyTree, inputs: Any) -> Run:
        model, own = _restricted(fn, params, only)
        z = tensor_of(fn(params, inputs))
        check_examples(z, cut.count(inputs))
        values = _tree.leaves(inputs)
        places = [k for k, dim in enumerate(cut.dims) if dim is not None]

        def one(mine: list[Tensor], c: Tensor) -> list[Tensor]:
            """J_nᵀ c_{v,n} of one example, [V, *shape] of every leaf."""
            here = dict(zip(places, mine, strict=True))
            x = [here[k].unsqueeze(cut.dims[k] or 0) if k in here else leaf for k, leaf in enumerate(values)]
            outputs, pullback = plainly(model, own, _tree.with_leaves(inputs, x))
            _single(outputs, z)
            return list(_each(lambda one: pullback(one.unsqueeze(0))[0], c))

        def rows(c: Tensor) -> Rows:
            dims = [cut.dims[k] for k in places]
            grads = torch.func.vmap(one, in_dims=(dims, 1))([values[k] for k in places], _known(c, z))
            return _by_leaf(own, [g.transpose(0, 1) for g in grads])

        return Run(z, rows)

    return Way(cut, run, True)


def _single(outputs: Tensor, z: Tensor) -> None:
    if outputs.shape != (1, *z.shape[1:]):
        raise CaptureError(
            explain(
                "the model gives outputs of another form for a single example.",
                got=list(outputs.shape),
                wanted=[1, *z.shape[1:]],
                options="route='loop', which runs it on the whole batch; or x.squeeze(-1) in place of x.squeeze()",
            )
        )


def _each(pullback: Callable[[Tensor], Sequence[Tensor]], c: Tensor) -> Sequence[Tensor]:
    """The pullback of every c_v; a single one needs no vmap."""
    return [g.unsqueeze(0) for g in pullback(c[0])] if len(c) == 1 else torch.func.vmap(pullback)(c)


# ------------------------------------------------------------------ a loop over examples


def looped(fn: Model, only: Sequence[str] | None, cut: Cut) -> Way:
    """The model on the batch, and a backward pass for every example."""

    def run(params: PyTree, inputs: Any) -> Run:
        model, own = _restricted(fn, params, only)
        z, pullback = _pullback(model, own, inputs)
        check_examples(z, len(z) if cut.whole and z.ndim else cut.count(inputs))
        places = torch.arange(len(z), device=z.device).reshape(-1, *[1] * (z.ndim - 1))

        def rows(c: Tensor) -> Rows:
            c = _known(c, z)
            with differentiable():
                grads = [[pullback(torch.where(places == n, one, 0.0)) for n in range(len(z))] for one in c]
            every = [[torch.stack(leaf) for leaf in zip(*one, strict=True)] for one in grads]
            return _by_leaf(own, [torch.stack(leaf) for leaf in zip(*every, strict=True)])

        return Run(z, rows)

    return Way(cut, run, True)


def _pullback(fn: Model, params: PyTree, inputs: Any) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """The outputs and what goes back from them to the leaves: by torch.func, or by autograd itself where that cannot
    follow the model (functions of autograd as they were written before it).
    """
    try:
        z, pullback = plainly(fn, params, inputs)
        return z, lambda c: pullback(c)[0]
    except RuntimeError:
        if level() or torch.compiler.is_compiling():
            raise
    leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in _tree.leaves(params)]
    again = any(x.requires_grad for x in _tree.leaves(params))
    with torch.enable_grad():
        z = tensor_of(fn(_tree.with_leaves(params, leaves), inputs))

    def pulled(c: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(
            z, leaves, c, retain_graph=True, create_graph=again, allow_unused=True, materialize_grads=True
        )

    return z if again else z.detach(), pulled


# ------------------------------------------------------------------ what all routes ask


def _by_leaf(params: PyTree, grads: list[Tensor]) -> Rows:
    """Every leaf as a vector block, from gradients [V, N, *shape]."""
    found, layouts = {}, {}
    for (path, leaf), g in zip(_tree.unique_paths(params).items(), grads, strict=True):
        flat = precise(g).reshape(*g.shape[:2], 1, -1)
        found[path] = _clean(path, Pairs(flat, flat.new_ones(1, g.shape[1], 1, 1)))
        layouts[path] = Layout(path, "unstructured", path, None, tuple(leaf.shape), outputs=leaf.numel(), matrix=False)
    return found, layouts


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
    if values.numel() and readable(values) and bool(values.amax().isnan()):  # keeps a NaN, without a copy of flags
        bad = values.isnan().movedim(1, 0).flatten(1).any(1)
        raise BatchError(explain(what, got=f"NaN for {int(bad.sum())} of {len(bad)} examples", options=options))
