"""Run a model on its plan: one forward pass, the layer inputs, and a pullback to every tap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import PlanMismatchError, explain
from kfac_func._typing import Model, PyTree
from kfac_func.capture.batched import tensor_of
from kfac_func.capture.discovery import eagerly
from kfac_func.capture.examples import check_examples, not_empty
from kfac_func.capture.grouping import signature
from kfac_func.capture.plan import Plan, TapRule
from kfac_func.capture.tape import Watch, tap
from kfac_func.layers import Found

Pulled: TypeAlias = tuple[tuple[Tensor, ...], dict[str, Tensor]]
"""The gradients at the taps, and those of other leaves."""


class Record(NamedTuple):
    """outputs [N, ...], the inputs of every tap, and `pullback(c) -> (gradients at the taps, gradients of the other
    leaves)`; `rest` are those leaves, whose gradient autograd gives: unclaimed and unused ones.
    """

    outputs: Tensor
    inputs: tuple[Tensor, ...]
    pullback: Callable[[Tensor], Pulled]
    examples: int
    rest: dict[str, Tensor]
    mapped: bool

    def pulled(self, c: Tensor) -> Pulled:
        """The gradients [V, ...] for output vectors c [V, N, ...]."""
        if self.mapped and len(c) > 1:
            return torch.func.vmap(self.pullback)(c)
        taps, rest = zip(*(self.pullback(one) for one in c), strict=True)
        return tuple(map(_stacked, zip(*taps, strict=True))), {p: _stacked([one[p] for one in rest]) for p in self.rest}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))


def record(fn: Model, plan: Plan, params: PyTree, inputs: Any) -> Record:
    """One forward pass of `fn` with taps at all uses of the plan.

    Raises PlanMismatchError when the model does something else than the plan says, BatchError for an empty batch or
    outputs that do not have the examples in the first dimension.
    """
    count = None if plan.cut.whole else examples_of(plan, inputs)
    leaves = dict(zip(plan.paths, _tree.leaves(params), strict=True))
    unclaimed = {path for path, _ in plan.unclaimed}
    rest = {path: leaves[path] for path in plan.paths if path in unclaimed or path in plan.unused}
    probes = tuple(_probe(rule, count) for rule in plan.taps)

    def taped(probes: tuple[Tensor, ...], rest: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        def at(index: int, found: Found) -> Tensor:
            if index >= len(probes) or found.output.shape != probes[index].shape:
                wanted = list(probes[index].shape) if index < len(probes) else f"{len(probes)} uses"
                owner = plan.taps[index].owner if index < len(probes) else None
                raise _mismatch(f"use {index + 1}, {found.kind.name} giving {list(found.output.shape)}", wanted, owner)
            return tap(found.output, probes[index], plan.taps[index].copied)

        here = leaves | rest
        watch = Watch({path: leaf for path, leaf in here.items() if path not in unclaimed}, at)
        with watch, eagerly():
            outputs = tensor_of(fn(_tree.with_leaves(params, list(here.values())) if rest else params, inputs))
        _check(plan, watch)
        return outputs, tuple(found.inputs for found in watch.found)

    outputs, pullback, *aux = torch.func.vjp(taped, probes, rest, has_aux=True)
    (recorded,) = aux
    check_examples(outputs, outputs.shape[0] if count is None and outputs.ndim else count or 0)
    return Record(outputs, recorded, pullback, outputs.shape[0], rest, plan.mapped)


def examples_of(plan: Plan, inputs: Any) -> int:
    """N, where the inputs say it. Raises BatchError for an empty batch, PlanMismatchError for other inputs."""
    not_empty(inputs)
    if len(_tree.leaves(inputs)) != len(plan.cut.dims):
        raise _mismatch(f"{len(_tree.leaves(inputs))} inputs", f"{len(plan.cut.dims)} inputs")
    return plan.cut.count(inputs)


def _probe(rule: TapRule, count: int | None) -> Tensor:
    shape = list(rule.shape)
    if rule.where is not None and count is not None:
        shape[rule.where.dim] = count * rule.where.fold
    return torch.zeros((), dtype=rule.dtype, device=rule.device).expand(shape)


def _check(plan: Plan, watch: Watch) -> None:
    """Every use, with its bias and options, must be the planned one, and there must be no other."""
    for found, rule in zip(watch.found, plan.taps, strict=False):
        if signature(found) != rule.use:
            raise _mismatch(signature(found), rule.use, rule.owner)
    if len(watch.found) != len(plan.taps):
        raise _mismatch(f"{len(watch.found)} uses", f"{len(plan.taps)} uses")
    if watch.strays:
        path, op = watch.strays[0]
        raise _mismatch(f"{path!r} used by {op}", "no such use", path)


def _mismatch(got: object, wanted: object, owner: str | None = None) -> PlanMismatchError:
    path = f"{owner!r}" if owner is not None else '"…"'
    return PlanMismatchError(
        explain(
            "the model does not follow its plan.",
            got=got,
            wanted=wanted,
            why="what it does, or which rows a layer sees, depends on values; or the plan was made for other inputs",
            options="make a new plan for these inputs, or a new value_grad_and_stats when none was passed; or "
            f"unclaimed={{{path}: 'diagonal'}} where values decide",
        )
    )
