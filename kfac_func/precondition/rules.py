"""What the rules of a K-FAC state say: its curvature, and the damping of every block."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from kfac_func._errors import StateError, explain
from kfac_func._patterns import first_match, useful
from kfac_func._tree import Static
from kfac_func.blocks import Layout
from kfac_func.curvature import Curvature
from kfac_func.estimators.stats import StatsRules
from kfac_func.state import KFacState, Rules


def curvature_of(state: KFacState) -> Curvature:
    """The curvature of a state. Raises StateError when it came from a file and has not met its transformation yet, and
    for the stacked state of an ensemble outside of vmap.
    """
    if state.step.dim():
        raise StateError(
            explain(
                "this is the state of an ensemble, and it is used as that of one member.",
                got=f"{list(state.step.shape)} members",
                wanted="the state of one member, as vmap passes it",
                options="torch.func.vmap over parameters, state and batch",
            )
        )
    found = state.rules.value.curvature
    if found is None:
        raise StateError(
            explain(
                "the state was loaded from a file and has not met its transformation yet.",
                options="call tx.update(...) first; functions are not saved",
            )
        )
    return found


def attached(state: KFacState, curvature: Curvature) -> KFacState:
    """A state with its curvature: the one it has, or after loading from a file the one given.

    Raises StateError when it was made by another: options of a structure may change, the structure may not.
    """
    rules: Rules = state.rules.value
    if rules.curvature is not curvature and rules.name and _kinds(rules.name) != _kinds(curvature.name):
        raise StateError(
            explain(
                "the state was made by another curvature.",
                got=rules.name,
                wanted=curvature.name,
                why="averages of one mean nothing to another",
                options="the transformation that made the state; or a new state, tx.init(params)",
            )
        )
    return state if rules.curvature is not None else state._replace(rules=Static(rules._replace(curvature=curvature)))


def _kinds(name: str) -> str:
    """The structures in a name, without their options."""
    return re.sub(r"\[[^][]*\]", "", name)


def filled(layouts: tuple[Layout, ...]) -> tuple[Layout, ...]:
    """The blocks that have something to solve for."""
    return tuple(layout for layout in layouts if not layout.empty)


def met(rules: Rules, stats: StatsRules) -> Rules:
    """The rules after statistics: what the blocks are, and which pattern of a damping by path is whose.

    Raises HyperparameterError for a block without a pattern and a pattern without a block.
    """
    if rules.layouts:
        return rules._replace(paths=stats.plan.paths, unclaimed=stats.plan.unclaimed)
    layouts = filled(stats.layouts)
    names, patterns = [layout.name for layout in layouts], rules.options.patterns
    useful(patterns, names, "damping")
    own = tuple(first_match(patterns, name, "damping") for name in names) if patterns else ()
    return rules._replace(layouts=layouts, paths=stats.plan.paths, unclaimed=stats.plan.unclaimed, patterns=own)


def block_damping(state: KFacState) -> dict[str, Tensor]:
    """λ_l by block name, 0-dim float64: the λ of the state, or of the pattern of the block; plus the coefficient γ of
    the l2 term where that term covers the weight of the block. 1 while nothing was observed.
    """
    rules, device, seen = state.rules.value, state.weight.device, state.weight > 0
    values = state.damping if isinstance(state.damping, dict) else {"": state.damping}
    patterns = rules.patterns or ("",) * len(rules.layouts)

    def raised(by: float) -> dict[str, Tensor]:
        return {pattern: torch.where(seen, value.to(device) + by, 1.0) for pattern, value in values.items()}

    plain = raised(0.0)
    covered = raised(rules.options.l2) if rules.decayed else plain
    return {
        layout.name: (covered if layout.leaves[0] in rules.decayed else plain)[pattern]
        for layout, pattern in zip(rules.layouts, patterns, strict=True)
    }


def leaf_damping(state: KFacState) -> Tensor | dict[str, Tensor]:
    """λ as a quadratic model adds it, without the l2 term: one number, or by the path of every leaf in a block."""
    rules, values = state.rules.value, state.damping
    if not isinstance(values, dict):
        return values
    return {
        path: values[pattern]
        for layout, pattern in zip(rules.layouts, rules.patterns, strict=True)
        for path in layout.leaves
    }
