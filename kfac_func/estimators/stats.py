"""What a batch says about curvature, as a value."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

from kfac_func._tree import Static
from kfac_func.blocks import Block, Layout, Thin, Use, UseRule
from kfac_func.capture import Plan
from kfac_func.layers import unstructured

Sharing = Literal["expand", "reduce"]


class StatsRules(NamedTuple):
    """What is static about statistics. `silent`: they say nothing about curvature, and only carry the gradient."""

    plan: Plan
    layouts: tuple[Layout, ...]  # of the plan's blocks, then of the unclaimed leaves with the policy "diagonal"
    examples: int
    sharing: Sharing
    silent: bool = False


class Gradient(NamedTuple):
    """The gradient of a block of the loss as rows, and the leaves that the step returned for it."""

    rows: Thin
    leaves: tuple[Tensor, ...]


class Stats(NamedTuple):
    """What a batch says about curvature: tensors only at the leaves.

    inputs   the layer input of every tap                grads   [V, *output] of every tap; () without output vectors
    rest     [V, *shape], the gradients of unclaimed leaves summed over the examples
    moments  already measured moments, when `measure` was given (then the others are empty); else ()
    gradient the gradient of the loss as rows, for blocks that are wider than the batch is long: solving for those very
             leaves is cheaper then
    kept     by number of the tap, the rows [B, S] that count, where the loss ignores positions
    """

    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    rest: dict[str, Tensor]
    moments: Any
    gradient: dict[str, Gradient]
    rules: Static[StatsRules]
    kept: dict[str, Tensor] = {}  # noqa: RUF012  never written

    def blocks(self) -> dict[str, Block]:
        """The waist: every block of the batch, by the path of its weight."""
        plan, layouts, examples, sharing, _ = self.rules.value
        found = {}
        for layout, uses in plan.blocks:
            grads = self.grads or [None] * len(self.inputs)
            mine = tuple(Use(self.inputs[k], grads[k], rule, self.kept.get(str(k))) for k, rule in uses)
            positions = sum(use.rule.positions for use in mine) if sharing == "expand" else len(mine)
            found[layout.name] = Block(layout, mine, examples, positions, sharing, plan.crossed)
        for layout in layouts[len(plan.blocks) :]:
            grads = self.rest[layout.name]
            use = Use(grads[:1], grads if grads.shape[0] else None, UseRule(unstructured, (), None, 1))
            found[layout.name] = Block(layout, (use,), examples, 1, sharing)
        return found


def layouts_of(plan: Plan, rest: dict[str, Tensor]) -> tuple[Layout, ...]:
    unclaimed = (
        Layout(path, "unstructured", path, None, tuple(rest[path].shape), outputs=rest[path].numel(), matrix=False)
        for path, policy in plan.unclaimed
        if policy == "diagonal"
    )
    return (*(block.layout for block in plan.blocks), *unclaimed)
