"""Plans, made once for every kind of batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._tracing import autocasting, plain
from kfac_func._typing import Model, PyTree
from kfac_func.capture.coverage import Unclaimed
from kfac_func.capture.draws import same_draws
from kfac_func.capture.examples import Cut
from kfac_func.capture.locating import located
from kfac_func.capture.plan import Plan
from kfac_func.capture.planning import APART, make_plan
from kfac_func.capture.restricting import chosen_leaves, restricted

T = TypeVar("T", bound=Any)

Planner: TypeAlias = Callable[[PyTree, Any], Plan]
"""(params, inputs) -> the plan of the model for them."""


def planner(
    fn: Model, *, strict: bool = True, unclaimed: Unclaimed | None = None, only: Sequence[str] | None = None
) -> Planner:
    """`make_plan`, once per signature of parameters and inputs (and of autocast): everything but the batch size; with
    `only`, that of the model as a function of these leaves (`restricted`).

    >>> plan_of = planner(lambda p, x: x @ p["w"])
    >>> params = {"w": torch.ones(3, 2)}
    >>> plan_of(params, torch.ones(4, 3)) is plan_of(params, torch.ones(7, 3))
    True
    """

    def make(params: PyTree, inputs: Any) -> Plan:
        model, own = (fn, params) if only is None else restricted(fn, params, chosen_leaves(params, only))
        return make_plan(model, own, inputs, strict=strict, unclaimed=unclaimed)

    return _once(make)


class Finding(NamedTuple):
    """Where the examples of a model's inputs are, and whether they see each other, in words."""

    cut: Cut
    mixing: str


def finder(fn: Model) -> Callable[[PyTree, Any], Finding]:
    """(params, inputs) -> where the examples are, for who needs no plan; found once per signature.

    >>> finder(lambda p, x: x @ p["w"])({"w": torch.ones(3, 2)}, torch.ones(4, 3))
    Finding(cut=Cut(dims=(0,)), mixing='')
    """

    def find(params: PyTree, inputs: Any) -> Finding:
        with same_draws(_tree.leaves(params)) as again:
            found = located(fn, params, inputs, again)
        return Finding(found.cut, "" if found.apart else APART)

    return _once(find)


def _once(make: Callable[[PyTree, Any], T]) -> Callable[[PyTree, Any], T]:
    known: dict[Any, list[tuple[Any, T]]] = {}

    def found(params: PyTree, inputs: Any) -> T:
        _tree.know(inputs)
        own = _parameters(params)
        for key, one in known.get(own, ()):
            if key == _kept(one.cut, inputs):
                return one
        made = make(params, inputs)
        plans = known.setdefault(own, [])
        plans.append((_kept(made.cut, inputs), made))
        del plans[:-KEPT]
        return made

    return found


def _parameters(params: PyTree) -> Any:
    leaves = _tree.unique_paths(params)
    return autocasting(), tuple((path, tuple(x.shape), x.dtype, x.device) for path, x in leaves.items())


KEPT = 32  # signatures of one set of parameters whose plans are kept


class _Numbers:
    """The numbers of a tensor as a key: of edges, which say how the examples of a whole batch see each other."""

    def __init__(self, x: Tensor):
        self.numbers = plain(x).clone()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Numbers) and torch.equal(self.numbers, other.numbers)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _kept(cut: Cut, inputs: Any) -> Any:
    """What does not depend on the number of examples; None for inputs that cannot be cut like this. Of a whole batch
    also the integers.
    """
    leaves = _tree.leaves(inputs)
    if len(leaves) != len(cut.dims):
        return None
    counts: set[int] = set()

    def of(leaf: Any, dim: int | None) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        if dim is not None:
            counts.add(shape.pop(dim) if dim < leaf.ndim else -1)
        routes = cut.whole and not leaf.is_floating_point() and not leaf.is_complex()
        return tuple(shape), leaf.dtype, leaf.device, _Numbers(leaf) if routes else None

    key = tuple(of(*each) for each in zip(leaves, cut.dims, strict=True))
    return key if len(counts) <= 1 else None
