"""Which rows of a layer count, where the loss ignores positions (padding)."""

from __future__ import annotations

from torch import Tensor

from kfac_func._tracing import at_hand
from kfac_func.blocks import Use, UseRule, output_rows
from kfac_func.capture import Plan
from kfac_func.losses import Loss


def counted(loss: Loss, z: Tensor, targets: Tensor, plan: Plan, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The rows [B, S] that count, by number of the tap; no entry where all do.

    A row of a layer without a kernel, one for every position of the outputs, does not count if the loss ignores its
    position and its output gradient for the loss itself is zero: what another position reads of it (attention) counts.
    """
    empty = _ignored(loss, z, targets)
    if empty is None:
        return {}
    rules = {k: rule for block in plan.blocks for k, rule in block.uses}
    return {
        str(k): ~empty | _moved(Use(z, grads[k].unsqueeze(0), rule))
        for k, rule in rules.items()
        if rule.positions == empty.shape[1] and _by_position(rule)
    }


def _ignored(loss: Loss, z: Tensor, targets: Tensor) -> Tensor | None:
    """The positions [N, P] of weight zero; None for outputs without positions, and where none is ignored."""
    weights = loss.weights(z, targets)
    if z.ndim < 3 or not isinstance(weights, Tensor) or weights.ndim < 2:
        return None
    empty = weights.flatten(1) == 0
    return None if at_hand(empty) and not empty.any() else empty


def _by_position(rule: UseRule) -> bool:
    kind = rule.kind
    return rule.where is not None and kind.output_rows is not None and kind.offsets is None


def _moved(use: Use) -> Tensor:
    rows = output_rows(use, "expand")[0]
    return (rows != 0).flatten(2).any(dim=2)
