"""What a run is told once. The host alone decides, by shapes and values at hand: no device is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import explain, warn
from kfac_func._tracing import at_hand, readable
from kfac_func.blocks import KroneckerState
from kfac_func.curvature.inverse_free import InverseFreeState
from kfac_func.state import KFacState, of_block

UNSEEN = 20
"""Updates without any statistics that pass in silence."""
PATIENCE = 3
"""Batches in a row that are rejected, with the last of which the silence ends."""
WIDE = 4096
"""Rows of a dense factor that is factorised in silence."""


def unseen(state: KFacState) -> None:
    """Warn at the update number UNSEEN of a state that never saw statistics."""
    tried = at_hand(state.rejected) and state.rejected > 0
    if state.curvature == () and not tried and at_hand(state.step) and state.step == UNSEEN:
        warn(
            explain(
                f"the K-FAC state has made {UNSEEN} updates and never seen statistics: gradients pass unchanged.",
                options="tx.update(grads, state, params, stats=stats), with the stats of value_grad_and_stats; or "
                "kf.observe(state, stats)",
            )
        )


class Streak:
    """The batches in a row that a transformation rejected: memory of the host, for nothing but a warning."""

    def __init__(self) -> None:
        self.length = 0

    def follow(self, before: KFacState, after: KFacState) -> None:
        """Count, and warn at the batch number PATIENCE."""
        if before.curvature == () or not (at_hand(before.rejected) and at_hand(after.rejected)):
            return
        if after.observed > before.observed:
            self.length = 0
        elif after.rejected > before.rejected:
            self.length += 1
            if self.length == PATIENCE:
                rejected(f"the last {PATIENCE} batches")


def rejected_at_first(count: Tensor) -> None:
    """Warn at the batch number PATIENCE when none was observed before, which is known by then."""
    if count == PATIENCE:
        rejected(f"all of the first {PATIENCE} batches")


def rejected(which: str) -> None:
    """Warn that these batches are not finite."""
    warn(
        explain(
            f"the statistics of {which} are not finite, so that the K-FAC state does not change.",
            why="the inputs, the parameters or the outputs have NaN or infinities",
            options="look for them; describe(state) counts the rejected batches",
        )
    )


def wide(state: KFacState) -> None:
    """Warn of the blocks that are about to be factorised densely for the first time although that is dear."""
    if torch.compiler.is_compiling() or not readable(state.weight):
        return
    widths = {layout.name: _width(of_block(state.curvature, layout.name)) for layout in state.rules.value.layouts}
    found = [f"{name!r} ({width} rows)" for name, width in widths.items() if width > WIDE]
    if found:
        warn(
            explain(
                f"factors wider than {WIDE} are about to be factorised densely.",
                got=", ".join(found),
                why="that takes d³ operations and 3 d² numbers at every refresh",
                options="max_dim= of the structure, e.g. kronecker(max_dim=1024); by_path() for these blocks alone",
            )
        )


def _width(things: list) -> int:
    """The rows of the largest dense factor."""
    states = [] if _tree.nodes(things, InverseFreeState) else _tree.nodes(things, KroneckerState)
    factors = [side for one in states for side in (one.a, one.g) if isinstance(side, Tensor)]
    return max((side.shape[-1] for side in factors), default=0)
