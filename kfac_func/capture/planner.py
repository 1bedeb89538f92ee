"""Plans, made once for every kind of batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from kfac_func import _tree
from kfac_func._typing import Model, PyTree
from kfac_func.capture.coverage import Unclaimed
from kfac_func.capture.examples import batch_size
from kfac_func.capture.plan import Plan, make_plan

Planner: TypeAlias = Callable[[PyTree, Any], Plan]
"""(params, inputs) -> the plan of the model for them."""


def planner(fn: Model, *, strict: bool = True, unclaimed: Unclaimed | None = None) -> Planner:
    """`make_plan`, once per signature of parameters and inputs: everything but the batch size.

    >>> plan_of = planner(lambda p, x: x @ p["w"])
    >>> params = {"w": torch.ones(3, 2)}
    >>> plan_of(params, torch.ones(4, 3)) is plan_of(params, torch.ones(7, 3))
    True
    """
    plans: dict[Any, Plan] = {}

    def planned(params: PyTree, inputs: Any) -> Plan:
        key = _key(params, inputs)
        if key not in plans:
            plans[key] = make_plan(fn, params, inputs, strict=strict, unclaimed=unclaimed)
        return plans[key]

    return planned


def _key(params: PyTree, inputs: Any) -> Any:
    count = batch_size(inputs)

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        batched = leaf.ndim > 0 and leaf.shape[0] == count
        return tuple(leaf.shape[1:] if batched else leaf.shape), batched, leaf.dtype, leaf.device

    own = tuple((path, tuple(leaf.shape), leaf.dtype, leaf.device) for path, leaf in _tree.unique_paths(params).items())
    return own, tuple(of(leaf) for leaf in _tree.leaves(inputs))
