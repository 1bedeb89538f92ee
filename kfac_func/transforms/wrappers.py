r"""Transformations around one other: skip steps that are not finite, and gather gradients over several calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kfac_func._errors import StateError, at_least, explain
from kfac_func._tracing import readable
from kfac_func._tree import leaves, storable, tree_map, unique_paths, with_leaves
from kfac_func._typing import PyTree
from kfac_func.transforms.base import GradientTransformation, keep_missing, map_updates, scale_tree, zero_count
from kfac_func.transforms.combine import linked
from kfac_func.transforms.keywords import lenient, strict


def with_extra_args_support(inner: Any) -> GradientTransformation:
    """A member of a chain by itself: it may be called with every keyword and is passed those that it accepts.

    The updates are fresh memory. Raises what `chain` raises.     Source: optax.with_extra_args_support.

    >>> plain = (lambda params: (), lambda updates, state: (2 * updates, state))
    >>> with_extra_args_support(plain).update(torch.ones(2), (), value=1.0)
    (tensor([2., 2.]), ())
    """
    alone = linked(inner)

    def init(params: PyTree) -> PyTree:
        return alone.init(params)[0]

    def update(updates, state, params=None, **extra):
        updates, (state,) = alone.update(updates, (state,), params, **extra)
        return updates, state

    return GradientTransformation(init, lenient(update, getattr(alone.update, "takes", None)))


class ApplyIfFiniteState(NamedTuple):
    """Errors in a row, whether the last call was finite, errors in all; and the state of the transformation inside."""

    notfinite_count: Int[Tensor, "*members"]
    last_finite: Bool[Tensor, "*members"]
    total_notfinite: Int[Tensor, "*members"]
    inner: PyTree


def apply_if_finite(inner: Any, max_consecutive_errors: int) -> GradientTransformation:
    r"""Take no step where gradients or updates are not finite:

        finite:       u' = f(u),  new state of f       not finite:  u' = 0,  the state of f as it was

    After n = `max_consecutive_errors` ≥ 0 such calls in a row the next ones go through, until one is finite again.
    NaN and infinities count, in the updates that come in and in those that `inner` makes of them.

    Nothing waits for a device: everything is selected by `torch.where`, so it vmaps member by member. Whether a step
    counts is known on the device of the updates, so the counts of `inner` move there; K-FAC inside reads its count for
    its period, so pass `refresh=` to update on a GPU. Leaves that appear with the very call that is refused (K-FAC at
    its first statistics) stay away where Python can look at the verdict, and are kept under vmap and torch.compile:
    their weight is still zero.
    Raises HyperparameterError for n < 0, StateError when a leaf changes its shape where Python cannot look.
    Source: optax.apply_if_finite.

    >>> tx = apply_if_finite(kf.identity(), 2)
    >>> updates, state = tx.update(torch.tensor([1.0, float("nan")]), tx.init(torch.ones(2)))
    >>> updates.tolist(), int(state.notfinite_count)
    ([0.0, 0.0], 1)
    """
    at_least(0, max_consecutive_errors=max_consecutive_errors)
    inner = with_extra_args_support(inner)

    def init(params: PyTree) -> ApplyIfFiniteState:
        device = next((leaf.device for leaf in leaves(params)), torch.device("cpu"))
        none, fine = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(True, device=device)
        return ApplyIfFiniteState(none, fine, none.clone(), inner.init(params))

    def update(updates, state, params=None, **extra):
        patient = state.notfinite_count < max_consecutive_errors
        received = _all_finite(updates)
        fed = tree_map(lambda u: _where(received | ~patient, u, 0), updates)  # so that no NaN reaches a derivative
        made, new = inner.update(fed, state.inner, params, **extra)
        finite = received & _all_finite(made)
        applied = finite | ~patient
        return tree_map(lambda u: _where(applied, u, 0), made), ApplyIfFiniteState(
            torch.where(finite, 0, state.notfinite_count + 1),
            finite,
            state.total_notfinite + ~finite,
            _either(applied, new, state.inner),
        )

    return GradientTransformation(init, strict(update, inner.update))


def _all_finite(tree: PyTree) -> Bool[Tensor, ""]:
    flags = [torch.isfinite(leaf).all() for leaf in leaves(tree)]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all() if flags else torch.tensor(True)


def _where(condition: Tensor, yes: Tensor, no: Any) -> Tensor:
    """Choose on the device of `yes`, or on that of the condition where `yes` is a count on the CPU."""
    if yes.device.type == "cpu":
        yes = yes.to(condition.device, non_blocking=True)
    no = no.to(yes.device, non_blocking=True) if isinstance(no, Tensor) else no
    return torch.where(condition.to(yes.device, non_blocking=True), yes, no)


def _either(condition: Tensor, new: PyTree, old: PyTree) -> PyTree:
    """The new state where the condition holds, else the old one."""
    before, after = unique_paths(old), unique_paths(new)
    shapes = [{path: leaf.shape for path, leaf in tree.items()} for tree in (before, after)]
    if shapes[0] != shapes[1] and readable(condition):
        return new if condition else old
    for path in shapes[0].keys() & shapes[1].keys():
        if shapes[0][path] != shapes[1][path]:
            raise StateError(
                explain(
                    f"the leaf {path!r} of a state changes its shape where Python cannot look whether it may.",
                    got=list(shapes[1][path]),
                    wanted=list(shapes[0][path]),
                    options="take this step outside of vmap and torch.compile; or keep the shapes of the state",
                )
            )
    chosen = [_where(condition, leaf, before[path]) if path in before else leaf for path, leaf in after.items()]
    return with_leaves(new, chosen)


class MultiStepsState(NamedTuple):
    """Calls since the last step, steps taken, the sum of the gradients and the statistics seen since; and the state of
    the transformation inside.
    """

    mini_step: Int[Tensor, "*members"]
    gradient_step: Int[Tensor, "*members"]
    acc_grads: PyTree
    stats: tuple[Any, ...]
    inner: PyTree


storable(ApplyIfFiniteState, MultiStepsState)


def multi_steps(inner: Any, every: int) -> GradientTransformation:
    r"""Take one step for several gradients:

        calls 1, ..., k-1:  u' = 0              call k:  u' = f( (u_1 + ... + u_k) / k ),  then from the start

    Symbols: k = `every` ≥ 1 calls; u_i the gradients, a None counting as zero (the sum of a leaf that is None at the
    k-th call waits for the next one). `inner` is called at the k-th call only, with the params and extras of that call
    and with `stats=` the tuple of all statistics that came since (None if none came): one batch cut into k parts of
    one size gives the step of the whole. The state holds copies of the statistics until then: as large as the
    activations, where a checkpoint right after a step has none.

    Whether a call is the k-th is read from a count on the CPU; where it cannot be (torch.compile, vmap), and for parts
    of uneven number, say `emit=True` or `emit=False` to update; the mean is over the calls that there were.
    Raises HyperparameterError for k < 1, StateError when the count cannot be read.     Source: optax.MultiSteps.

    >>> tx = multi_steps(kf.identity(), 2)
    >>> first, state = tx.update(torch.tensor(1.0), tx.init(torch.tensor(0.0)))
    >>> second, state = tx.update(torch.tensor(3.0), state)
    >>> first, second
    (tensor(0.), tensor(2.))
    """
    at_least(1, every=every)
    inner = with_extra_args_support(inner)

    def init(params: PyTree) -> MultiStepsState:
        return MultiStepsState(zero_count(), zero_count(), tree_map(torch.zeros_like, params), (), inner.init(params))

    def update(updates, state, params=None, *, stats=None, emit=None, trail=None, **extra):
        del trail  # what entered the chain around is one part of the gradient of the step
        calls = state.mini_step + 1
        total = map_updates(torch.add, updates, state.acc_grads)
        zeros = tree_map(torch.zeros_like, updates)
        if not _emits(calls, every, emit):
            seen = () if stats is None else (tree_map(torch.clone, stats),)
            kept = keep_missing(state.acc_grads, total)
            return zeros, state._replace(mini_step=calls, acc_grads=kept, stats=state.stats + seen)
        seen = state.stats if stats is None else (*state.stats, stats)
        mean = scale_tree(total, 1 / calls.to(torch.float64))
        updates, moved = inner.update(mean, state.inner, params, stats=seen or None, **extra)
        left = keep_missing(state.acc_grads, zeros)
        return updates, MultiStepsState(zero_count(), state.gradient_step + 1, left, (), moved)

    return GradientTransformation(init, strict(update, inner.update))


def _emits(calls: Tensor, every: int, asked: bool | None) -> bool:
    if asked is not None:
        return asked
    if every == 1:
        return True
    if not readable(calls):
        raise StateError(
            explain(
                "whether multi_steps has gathered enough cannot be read from the count under vmap or torch.compile.",
                options="pass emit=True or emit=False to update",
            )
        )
    return int(calls) >= every
