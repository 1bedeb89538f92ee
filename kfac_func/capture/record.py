"""Run a model on its plan: one forward pass, the layer inputs, and a pullback to every tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import PlanMismatchError, explain
from kfac_func._typing import Model, PyTree
from kfac_func.capture.examples import batch_size, check_examples
from kfac_func.capture.grouping import signature
from kfac_func.capture.plan import Plan, TapRule
from kfac_func.capture.tape import Watch, tap
from kfac_func.layers import Found


class Record(NamedTuple):
    """outputs [N, ...], the inputs of every tap, and `pullback(c) -> (gradients at the taps, gradients of unclaimed
    leaves)`.
    """

    outputs: Tensor
    inputs: tuple[Tensor, ...]
    pullback: Callable[[Tensor], tuple[tuple[Tensor, ...], dict[str, Tensor]]]
    examples: int
    rest: dict[str, Tensor]  # the unclaimed leaves


def record(fn: Model, plan: Plan, params: PyTree, inputs: Any) -> Record:
    """One forward pass of `fn` with taps at all uses of the plan.

    Raises PlanMismatchError when the model does something else than the plan says, BatchError for an empty batch or
    outputs that do not have the examples in the first dimension.
    """
    count = batch_size(inputs)
    leaves = dict(zip(plan.paths, _tree.leaves(params), strict=True))
    rest = {path: leaves[path] for path, _ in plan.unclaimed}
    watched = {path: leaf for path, leaf in leaves.items() if path not in rest}  # unused leaves too: they must stay so
    probes = tuple(_probe(rule, count) for rule in plan.taps)

    def taped(probes: tuple[Tensor, ...], rest: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        def at(index: int, found: Found) -> Tensor:
            if index >= len(probes) or found.output.shape != probes[index].shape:
                wanted = list(probes[index].shape) if index < len(probes) else f"{len(probes)} uses"
                raise _mismatch(f"use {index + 1}, {found.kind.name} giving {list(found.output.shape)}", wanted)
            return tap(found.output, probes[index], plan.taps[index].copied)

        watch = Watch(watched, at)
        with watch:
            outputs = fn(_tree.replace_leaves(params, rest) if rest else params, inputs)
        _check(plan, watch)
        return outputs, tuple(found.inputs for found in watch.found)

    outputs, pullback, *aux = torch.func.vjp(taped, probes, rest, has_aux=True)
    (recorded,) = aux
    check_examples(outputs, count)
    return Record(outputs, recorded, pullback, count, rest)


def _probe(rule: TapRule, count: int) -> Tensor:
    shape = list(rule.shape)
    if rule.where is not None:
        shape[rule.where.dim] = count * rule.where.fold
    return torch.zeros((), dtype=rule.dtype, device=rule.device).expand(shape)


def _check(plan: Plan, watch: Watch) -> None:
    """Every use, with its bias and options, must be the planned one, and there must be no other."""
    for found, rule in zip(watch.found, plan.taps, strict=False):
        if signature(found) != rule.use:
            raise _mismatch(signature(found), rule.use)
    if len(watch.found) != len(plan.taps):
        raise _mismatch(f"{len(watch.found)} uses", f"{len(plan.taps)} uses")
    if watch.strays:
        path, op = watch.strays[0]
        raise _mismatch(f"{path!r} used by {op}", "no such use")


def _mismatch(got: object, wanted: object) -> PlanMismatchError:
    return PlanMismatchError(
        explain(
            "the model does not follow its plan.",
            got=got,
            wanted=wanted,
            why="its control flow depends on values, or the plan was made for other inputs",
            options="make a new plan for these inputs, or a new value_grad_and_stats when none was passed",
        )
    )
