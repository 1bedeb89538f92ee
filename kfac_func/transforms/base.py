r"""What a gradient transformation is, and what every transformation of this room shares.

A transformation is a pair of pure functions on pytrees of real tensors,

    state_0 = init(params),      (updates', state_{t+1}) = update(updates, state_t, params)

and the promise that `updates'` is fresh memory: it shares storage with nothing that was passed in, nor with the new
state. A None in the updates means "no update here": it stays None, and the state of that leaf stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from kfac_func._errors import HyperparameterError, TreeMismatchError, explain
from kfac_func._tracing import settled
from kfac_func._tree import leaves_with_paths, storable, tree_map
from kfac_func._typing import PyTree, Scalar, ScalarOrSchedule
from kfac_func.transforms.keywords import strict


class GradientTransformation(NamedTuple):
    """A pair of pure functions: `init(params) -> state` and `update(updates, state, params=None, ...)`.

    The signature is `update(updates, state, params=None, *, stats=None, inplace=False, **extra) -> (updates, state)`.
    `params` works by position and by keyword, `inplace` is accepted and ignored. `extra` are the keywords of others
    in a chain, which are ignored: what `update` takes it names, and what nobody names is refused (KeywordError).
    Source: the optax interface (DeepMind JAX ecosystem, 2020).

    >>> tx = identity()
    >>> state = tx.init({"w": torch.ones(2)})
    >>> updates, state = tx.update({"w": torch.ones(2)}, state)
    >>> updates["w"].tolist()
    [1.0, 1.0]
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]


class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


class CountState(NamedTuple):
    """The state of a transformation that only counts its steps."""

    step: Int[Tensor, ""]


storable(EmptyState, CountState)


def identity() -> GradientTransformation:
    """Pass the updates on as they are: u' = u, in fresh memory.

    >>> g = torch.ones(2)
    >>> updates, _ = identity().update(g, EmptyState())
    >>> updates.tolist(), updates is g
    ([1.0, 1.0], False)
    """
    return stateless(lambda updates, params: tree_map(torch.clone, updates))


def stateless(fn: Callable[[PyTree, PyTree], PyTree]) -> GradientTransformation:
    """Make a transformation of a pure function: u' = fn(u, params).

    `fn` must return fresh tensors and keep None leaves; `params` is None when the caller passed none.

    >>> double = stateless(lambda updates, params: tree_map(lambda u: 2 * u, updates))
    >>> double.update(torch.ones(2), double.init(torch.ones(2)))[0].tolist()
    [2.0, 2.0]
    """

    def init(params: PyTree) -> EmptyState:
        del params
        return EmptyState()

    def update(updates, state, params=None, *, stats=None, inplace=False, **extra):
        del stats, inplace, extra
        return fn(updates, params), state

    return GradientTransformation(init, strict(update))


def counted(fn: Callable[[PyTree, PyTree, Tensor], PyTree]) -> GradientTransformation:
    """Make a transformation of a pure function of the step: u'_t = fn(u, params, t), with t = 0 at the first update.

    t is a 0-dim int64 CPU tensor. `fn` must return fresh tensors and keep None leaves.

    >>> tx = counted(lambda updates, params, count: tree_map(lambda u: u * count, updates))
    >>> _, state = tx.update(torch.ones(2), tx.init(torch.ones(2)))
    >>> tx.update(torch.ones(2), state)[0].tolist()
    [1.0, 1.0]
    """

    def init(params: PyTree) -> CountState:
        del params
        return CountState(zero_count())

    def update(updates, state, params=None, *, stats=None, inplace=False, **extra):
        del stats, inplace, extra
        return fn(updates, params, state.step), CountState(state.step + 1)

    return GradientTransformation(init, strict(update))


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Move the parameters: p' = p + u, out of place, in the dtype of p.

    Where u is None the result holds the very parameter that was passed. A parameter of a module, which requires grad,
    gives one that does not: no step hangs on the one before.
    Raises TreeMismatchError when the trees differ in structure or in the shape of a leaf.

    >>> apply_updates([torch.ones(2), torch.ones(1)], [torch.full((2,), -0.5), None])
    [tensor([0.5000, 0.5000]), tensor([1.])]
    """
    return keep_missing(params, map_updates(lambda update, param: settled(param) + update, updates, params))


def map_updates(fn: Callable[..., Tensor], updates: PyTree, *rest: PyTree) -> PyTree:
    """Map `fn` over the updates that are not None and the leaves of `rest` that belong to them.

    Raises TreeMismatchError when a tree of `rest` has another structure, or a missing leaf or a leaf of another shape
    where there is an update: nothing is broadcast, nothing is dropped.

    >>> map_updates(torch.add, [torch.ones(2), None], [torch.ones(2), torch.ones(3)])
    [tensor([2., 2.]), None]
    """

    def matched(update: Tensor, *others: Tensor | None) -> Tensor:
        for other in others:
            if other is None or other.shape != update.shape:
                raise TreeMismatchError(_unlike(updates, update, other))
        return fn(update, *others)

    return tree_map(matched, updates, *rest)


def _unlike(updates: PyTree, update: Tensor, other: Tensor | None) -> str:
    path = next((leaf.path for leaf in leaves_with_paths(updates) if leaf.value is update), "")
    return explain(
        f"the update {path!r} does not fit the leaf that it is for.",
        got=f"an update of shape {list(update.shape)}",
        wanted="None, as there is no such leaf" if other is None else f"shape {list(other.shape)}",
        options="take updates from the parameters that `init` was given; nothing is broadcast",
    )


def keep_missing(old: PyTree, new: PyTree) -> PyTree:
    """The new leaves in the dtypes of the old ones, and the old leaf itself wherever the new one is None.

    >>> keep_missing([torch.zeros(2), torch.zeros(1)], [torch.ones(2, dtype=torch.float64), None])
    [tensor([1., 1.]), tensor([0.])]
    """
    return tree_map(lambda before, after: before if after is None else after.to(before.dtype), old, new)


def scale_tree(updates: PyTree, factor: Scalar) -> PyTree:
    """s · u for every leaf u, in its dtype; s is a number or a 0-dim tensor on any device.

    >>> scale_tree([torch.ones(2), None], torch.tensor(0.5, dtype=torch.float64))
    [tensor([0.5000, 0.5000]), None]
    """
    at = beside(factor)
    return tree_map(lambda update: (update * at(update)).to(update.dtype), updates)


def add_scaled(updates: PyTree, factor: Scalar, tree: PyTree) -> PyTree:
    """u + s · x for every update u and the leaf x that belongs to it.

    Raises TreeMismatchError when the trees do not fit each other.

    >>> add_scaled([torch.ones(2), None], 0.5, [torch.ones(2), torch.ones(2)])
    [tensor([1.5000, 1.5000]), None]
    """
    at = beside(factor)
    return map_updates(lambda update, leaf: update + (leaf * at(leaf)).to(leaf.dtype), updates, tree)


def beside(value: Scalar) -> Callable[[Tensor], Scalar]:
    """A function giving the scalar on the device of any leaf: one asynchronous copy per device, no synchronisation.

    Counts live on the CPU. A single one mixes with leaves of any device, a vmapped one (an ensemble) does not.

    >>> beside(0.5)(torch.ones(2))
    0.5
    """
    copies: dict[torch.device, Tensor] = {}

    def at(leaf: Tensor) -> Scalar:
        if not isinstance(value, Tensor):
            return value
        if leaf.device not in copies:
            copies[leaf.device] = value.to(leaf.device, non_blocking=True)
        return copies[leaf.device]

    return at


def safe_sqrt(x: Tensor) -> Tensor:
    """√x with the derivative 0 at x = 0, where that of torch.sqrt is infinite (times a zero: NaN).

    >>> torch.func.grad(safe_sqrt)(torch.tensor(0.0))
    tensor(0.)
    """
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def zero_count() -> Int[Tensor, ""]:
    """The step counter before the first step: a 0-dim int64 CPU tensor, so that reading it never waits for a GPU.

    >>> zero_count()
    tensor(0)
    """
    return torch.zeros((), dtype=torch.int64, device="cpu")


def resolve(value: ScalarOrSchedule, count: Int[Tensor, ""] | int) -> Scalar:
    """The value of an option at a step: itself, or what its schedule gives there.

    >>> resolve(0.5, 3), resolve(lambda count: 2 * count, 3)
    (0.5, 6)
    """
    return value(count) if callable(value) else value


Interval = Literal["(-inf, inf)", "[0, inf)", "(0, inf)", "(0, inf]", "[0, 1)", "[0, 1]"]

_WITHIN: dict[Interval, Callable[[float], bool]] = {
    "(-inf, inf)": lambda x: -float("inf") < x < float("inf"),
    "[0, inf)": lambda x: 0 <= x < float("inf"),
    "(0, inf)": lambda x: 0 < x < float("inf"),
    "(0, inf]": lambda x: x > 0,
    "[0, 1)": lambda x: 0 <= x < 1,
    "[0, 1]": lambda x: 0 <= x <= 1,
}


def check_scalar(name: str, value: Any, interval: Interval, *, schedule: bool = False) -> None:
    """Refuse an option that is no scalar, or a Python number outside `interval`; the value of a tensor is never read.

    Raises HyperparameterError. A schedule (any callable) passes where `schedule` is true.

    >>> check_scalar("decay", 0.9, "[0, 1)")
    """
    if isinstance(value, Tensor):
        fine = value.dim() == 0
        got = f"a tensor of shape {list(value.shape)}"
    elif isinstance(value, (int, float)):
        fine = _WITHIN[interval](value)
        got = repr(value)
    else:
        fine = schedule and callable(value)
        got = repr(value)
    if not fine:
        kinds = "a 0-dim tensor or a schedule" if schedule else "or a 0-dim tensor"
        raise HyperparameterError(
            explain(f"{name} has a value that has no meaning.", got=got, wanted=f"a number in {interval}, {kinds}")
        )
