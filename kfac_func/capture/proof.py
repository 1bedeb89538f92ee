"""A plan proves itself: on a few examples, its numbers against those of autograd.

Gradient       for one cotangent c, the gradient that the uses give (and autograd, for leaves without a kind) against
               that of `torch.func.vjp` of the plain function, leaf by leaf. A leaf that differs is used somewhere that
               the tape does not see.
Independence   for the cotangent s∘c, with a power of two s_n for every example, the gradient at a tap is s_n times that
               of c in the rows of example n, to the last bit or nearly, if nothing else reaches them. If not, the model
               mixes examples or puts them in another order.

Random numbers are the same in all runs; the comparisons read values, so nothing of this happens in a step.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import PlanMismatchError
from kfac_func._tracing import plain
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import Use, gradients
from kfac_func.blocks.rows import examples_first
from kfac_func.capture.discovery import followed, plainly
from kfac_func.capture.draws import Again
from kfac_func.capture.locating import same_numbers
from kfac_func.capture.plan import Plan
from kfac_func.capture.record import Pulled, Record, record


class Proof(NamedTuple):
    """`hidden`: leaves that are used where the tape cannot see, with what is known of it. `crossed`: where the gradient
    of one example's output reaches the rows of another, "" if nowhere. `mapped`: whether vectors go back in one vmap.
    """

    hidden: dict[str, list[str]]
    crossed: str
    mapped: bool


def proven(fn: Model, plan: Plan, params: PyTree, few: tuple[Any, ...], again: Again) -> Proof:
    """Compare the plan with autograd on batches of a few examples: the gradient on the last, independence on all."""
    crossed, mapped, hidden = "", True, {}
    for inputs in few:
        try:
            run: Record = again(lambda x=inputs: followed(lambda: record(fn, plan, params, x), fn, params, x))
        except PlanMismatchError as error:
            return Proof(_everywhere(plan, str(error).splitlines()[0]), "", True)
        c, scales = _cotangent(run.outputs), 2.0 ** (torch.arange(run.examples, device=run.outputs.device) % 3)
        both = torch.stack([c, c * scales.to(c.dtype).reshape(-1, *[1] * (c.ndim - 1))])
        (taps, rest), mapped = _pulled(run, both)
        crossed = crossed or _crossed(plan, scales, taps)
        if inputs is few[-1]:
            own = tuple(g[0] for g in taps), {path: g[0] for path, g in rest.items()}
            hidden = _hidden(plan, params, run, *own, c, again(lambda x=inputs: plainly(fn, params, x))[1](c)[0])
    return Proof(hidden, crossed, mapped)


def _pulled(run: Record, vectors: Tensor) -> tuple[Pulled, bool]:
    """The gradients for both vectors, and whether a vmap can give them: in torch.cdist, say, it gives others, without
    a word, from the second one on.
    """
    one_by_one = run._replace(mapped=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where its vmap is a loop
            taps, rest = run.pulled(vectors)
    except (RuntimeError, UserWarning):
        return one_by_one.pulled(vectors), False
    second = one_by_one.pulled(vectors[1:])
    both = zip((*taps, *rest.values()), (*second[0], *second[1].values()), strict=True)
    if all(same_numbers(plain(one[1:]), plain(two), 2**10) for one, two in both):
        return (taps, rest), True
    return one_by_one.pulled(vectors), False


def _everywhere(plan: Plan, why: str) -> dict[str, list[str]]:
    return {path: [why] for path in plan.paths if path in plan.claimed}


def _cotangent(z: Tensor) -> Tensor:
    numbers = torch.arange(z.numel(), device=z.device, dtype=torch.float64)
    return (1.5 + torch.sin(7 * numbers + 1)).reshape(z.shape).to(z.dtype)


def _hidden(
    plan: Plan,
    params: PyTree,
    run: Record,
    taps: tuple[Tensor, ...],
    rest: dict[str, Tensor],
    c: Tensor,
    truth: list[Tensor],
) -> dict[str, list[str]]:
    """The leaves whose gradient on the tape is not the true one, up to rounding."""
    leaves = dict(zip(plan.paths, _tree.leaves(params), strict=True))
    wanted = dict(zip(plan.paths, truth, strict=True))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    got, size = dict(rest), {path: g.abs() for path, g in rest.items()}
    for layout, uses in plan.blocks:
        mine = [Use(run.inputs[k], taps[k].unsqueeze(0), rule) for k, rule in uses]
        got |= gradients(layout, mine, shapes)
        bound = [Use(_size(run.inputs[k]), _size(taps[k].unsqueeze(0)), rule) for k, rule in uses]
        size |= gradients(layout, bound, shapes)
    eps = max((torch.finfo(x.dtype).eps for x in (*leaves.values(), *taps)), default=0.0)
    sizes = {path: _norm(size[path]) + _norm(wanted[path]) for path in plan.paths}
    largest, floor = max(sizes.values(), default=0.0), min(2**12 * eps, 2**-7) * _norm(c)
    noise = min(2**6 * eps, 2**-5) * largest if largest > floor else floor  # below it, all of them are rounding
    found = {}
    for path in plan.paths:
        off = _norm(got[path].to(wanted[path].dtype) - wanted[path])
        missed = path in plan.unused and _norm(wanted[path]) > 0
        if missed or off > min(2**14 * eps, 0.1) * sizes[path] + noise:
            found[path] = ["something that the tape cannot see"]
    return found


def _size(x: Tensor) -> Tensor:
    return x.abs() if x.is_floating_point() else x


def _norm(x: Tensor) -> float:
    """Of what is finite: numbers that are not cannot be compared."""
    return float(plain(x).double().nan_to_num(0, 0, 0).norm())


def _crossed(plan: Plan, scales: Tensor, taps: tuple[Tensor, ...]) -> str:
    largest = max((_norm(g[1]) for g in taps), default=0.0)
    for rule, both in zip(plan.taps, taps, strict=True):
        if rule.where is None:
            continue
        rows, moved = (examples_first(x, rule.where).double() for x in both)
        own = scales.double().repeat_interleave(rule.where.fold).reshape(-1, *[1] * (rows.ndim - 1))
        eps = torch.finfo(both.dtype).eps
        if _norm(moved - own * rows) > min(2**10 * eps, 2**-7) * _norm(moved) + eps * largest:
            return f"the gradient of one example's output reaches the rows of another at {rule.owner!r}"
    return ""
