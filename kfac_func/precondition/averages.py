"""A K-FAC state meets the statistics of a batch: averages, refresh, scalings, factorisation. Pure functions, each with
its own period.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._tracing import at_hand, readable
from kfac_func._tree import Static
from kfac_func.precondition.batch import Observed, all_finite
from kfac_func.precondition.notices import rejected_at_first
from kfac_func.precondition.rules import block_damping, curvature_of, met
from kfac_func.state import KFacState


def absorbed(state: KFacState, seen: Observed) -> KFacState:
    """One step of the moving averages; a batch that is not finite changes nothing but `rejected`."""
    if state.curvature == () and readable(seen.finite) and not seen.finite:  # nothing was observed, and still is not
        rejected_at_first(state.rejected + 1)
        return state._replace(rejected=state.rejected + 1)
    rules = met(state.rules.value, seen.rules)
    weight, fraction = _next(state, state.observed, state.weight, seen.finite)
    curvature = seen.curvature.absorb(state.curvature, seen.batch, fraction)
    return state._replace(
        observed=state.observed + seen.finite,
        rejected=state.rejected + ~seen.finite,
        weight=weight,
        curvature=_chosen(seen, curvature, state.curvature),
        rules=Static(rules),
    )


def scaled(state: KFacState, seen: Observed) -> KFacState:
    """One step of the averages that are asked for by the refreshed state (the scalings of EKFAC)."""
    weight, fraction = _next(state, state.scaled, state.scale_weight, seen.finite)
    curvature = seen.curvature.scale(state.curvature, seen.batch, fraction)
    return state._replace(
        scaled=state.scaled + seen.finite,
        scaled_at=state.step.clone(),
        scale_weight=weight,
        curvature=_chosen(seen, curvature, state.curvature),
    )


def _next(state: KFacState, count: Tensor, weight: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """The weight W after one more batch, and the fraction of that batch in the average."""
    options = state.rules.value.options
    decay: Any = state.decay.to(weight.device, non_blocking=True) if isinstance(state.decay, Tensor) else options.decay
    weight, new = torch.where(finite, decay * weight + 1, weight), 1 - decay
    match options.average:
        case "warmup":
            fraction = (1 / (count + 1).to(torch.float64)).clamp(min=new)
        case "constant":
            fraction = (count == 0).to(torch.float64).clamp(min=new)
        case _:
            fraction = 1 / weight.clamp(min=1)
    return weight, torch.where(finite, fraction, 0.0)


def _chosen(seen: Observed, new: Any, old: Any) -> Any:
    """The new averages, unless a later answer of the batch was not finite."""
    if seen.later is seen.finite or (at_hand(seen.later) and seen.later):
        return new
    old = _tree.tree_map(torch.zeros_like, new) if old == () else old
    kept = seen.later | ~seen.finite

    def chosen(x: Tensor, y: Any) -> Tensor:  # what is seen for the first time was () before
        return torch.where(kept, x, y if isinstance(y, Tensor) else torch.zeros_like(x))

    return _tree.tree_map(chosen, new, old)


def refreshed(state: KFacState, due: frozenset[str] | None = None) -> KFacState:
    """The dear part of the curvature's state anew; `due`: that of these blocks alone."""
    some = () if due is None else (due,)
    split = state.rules.value.options.split
    return state._replace(curvature=curvature_of(state).refresh(state.curvature, block_damping(state), split, *some))


def factorized(state: KFacState, kept: Any = (), due: frozenset[str] | None = None) -> KFacState:
    """Factorise; a factorisation that is not finite does not replace one that is. With nothing observed yet it is the
    identity. `kept`: an older one to be kept, but for the blocks that are `due` and those whose scalings move.
    """
    own, split, damping = curvature_of(state), state.rules.value.options.split, block_damping(state)
    some = () if due is None else (due,)
    factored = own.factorize(state.curvature, damping, split, kept, *some)
    finite, before = all_finite(factored), state.factored
    same = _shapes(factored) == _shapes(before)  # `where` asks for that, and then nothing waits for a device
    if (at_hand(finite) or (readable(finite) and not same)) and (finite or before != ()):
        return state._replace(factored=factored if finite else before, failed=state.failed + ~finite)
    if before == ():  # the identity takes the place of what was not there before
        empty, one = (
            _tree.tree_map(f, x) for f, x in ((torch.zeros_like, state.curvature), (torch.ones_like, damping))
        )
        before = own.factorize(empty, one, split)
    chosen = _tree.tree_map(lambda new, old: torch.where(finite, new, old), factored, before)
    return state._replace(factored=chosen, failed=state.failed + ~finite)


def _shapes(tree: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in _tree.leaves(tree)]
