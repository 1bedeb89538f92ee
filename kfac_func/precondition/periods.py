"""When something is due. The host decides, by the CPU count of updates and nothing else, so that no device is asked.

update t is due   ⇔   t mod n = 0,   n = k, or min(k, 1 + ⌊t/k⌋) while it grows
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_func._errors import StateError, explain
from kfac_func.precondition.rules import curvature_of
from kfac_func.state import KFacState

Due = bool | frozenset[str]
"""Whether, or which blocks."""


def interval(step: int, every: int, growing: bool) -> int:
    """n: `every`, or what it has grown to at this update.

    >>> [interval(step, 3, True) for step in (0, 2, 3, 5, 6, 99)]
    [1, 1, 2, 2, 3, 3]
    """
    return min(every, 1 + step // every) if growing else every


def refresh_due(state: KFacState, asked: bool | None) -> Due:
    """What to refresh at this update: as asked, all blocks by the period, or those whose turn it is.

    Staggered, the blocks are dealt into n groups of about equal cost, and update t does group t mod n.
    """
    options = state.rules.value.options
    every, costs = options.refresh_every, curvature_of(state).costs
    if asked is not None or every == 1:
        return asked is not False
    step = _read(state.step, "refresh")
    n = interval(step, every, options.growing)
    if n == 1 or not options.stagger or costs is None:
        return step % n == 0
    return frozenset(dealt(costs(state.curvature), n)[step % n])


def scale_due(state: KFacState, asked: bool | None) -> bool:
    """Whether to measure scalings in the statistics at hand: as asked, or if an update was due since the last time.

    So an update that was due and had no statistics is made up for by the next one that has some, and no two periods
    can keep missing each other.
    """
    options = state.rules.value.options
    every = options.scale_every
    if asked is not None or every == 1:
        return asked is not False
    step, last = _read(state.step, "scale"), _read(state.scaled_at, "scale")
    return any(t % interval(t, every, options.growing) == 0 for t in range(last + 1, step + 1))


def dealt(costs: dict[str, int], groups: int) -> list[list[str]]:
    """Names in groups of about equal total cost: the dearest first, each to the cheapest group so far.

    >>> dealt({"a": 5, "b": 3, "c": 2, "d": 1}, 2)
    [['a', 'd'], ['b', 'c']]
    """
    found: list[list[str]] = [[] for _ in range(groups)]
    loads = [0] * groups
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        k = loads.index(min(loads))
        found[k].append(name)
        loads[k] += costs[name]
    return found


def _read(count: Tensor, name: str) -> int:
    try:
        found = None if torch.compiler.is_compiling() else int(count)
    except RuntimeError:  # a batched count under vmap has no single value
        found = None
    if found is None:
        raise StateError(
            explain(
                f"whether to {name} cannot be read from the count under vmap or torch.compile.",
                options=f"pass {name}=True or {name}=False to update; or use {name}_every=1",
            )
        )
    return found
