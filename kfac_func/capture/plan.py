"""What a plan is: the uses, their kinds, the parameters that they claim, and where the examples are."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from kfac_func.blocks import Where
from kfac_func.capture.coverage import Policy
from kfac_func.capture.examples import Cut
from kfac_func.capture.grouping import PlannedBlock


class TapRule(NamedTuple):
    """One recorded call: what it must be again, and its output for one example."""

    use: Hashable  # `signature` of the use
    owner: str  # the path of its weight
    shape: tuple[int, ...]
    where: Where | None
    dtype: torch.dtype
    device: torch.device
    copied: bool  # its result is written in place later


class Plan(NamedTuple):
    """What is captured, hashable.

    unclaimed  the policy of leaves without a kind         unused   leaves whose gradient is zero
    cut        where the examples of the inputs are
    mixing     how the examples of a batch see each other, in words; "" where they do not
    crossed    whether gradients go from the output of one example to the rows of another
    mapped     whether many vectors go back in one vmap; else one after the other (autocast, fused attention)
    """

    paths: tuple[str, ...]
    taps: tuple[TapRule, ...]
    blocks: tuple[PlannedBlock, ...]
    unclaimed: tuple[tuple[str, Policy], ...]
    unused: tuple[str, ...]
    cut: Cut
    mixing: str = ""
    crossed: bool = False
    mapped: bool = True

    @property
    def claimed(self) -> frozenset[str]:
        """The paths of the leaves that blocks own."""
        return frozenset(path for block in self.blocks for path in block.layout.leaves)

    @property
    def shared(self) -> bool:
        """Whether vectors need a mean of zero: gradients cross, all examples share a use, or a diagonal is wanted."""
        diagonal = any(policy == "diagonal" for _, policy in self.unclaimed)
        return self.crossed or diagonal or any(tap.where is None for tap in self.taps)
