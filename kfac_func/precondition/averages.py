"""A K-FAC state meets the statistics of a batch: averages, refresh, scalings, factorisation. Pure functions, each with
its own period.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import StateError, explain
from kfac_func._tracing import readable
from kfac_func._tree import Static
from kfac_func._typing import PyTree
from kfac_func.curvature import Curvature
from kfac_func.estimators import Stats
from kfac_func.state import KFacState, Options, Rules


class Batch:
    """The looks at one batch: every answer is made finite, and `finite` says whether it was so by itself."""

    def __init__(self, state: KFacState, stats: Stats):
        self.curvature = curvature_of(state)
        self.stats = stats
        self.prepared = None if stats.moments != () else self.curvature.prepare(stats.blocks())
        self.first, self.finite = self._checked(stats.moments if self.prepared is None else self._measured(()))
        self.later = self.finite

    def look(self, frame: Any) -> Any:
        """The moments of the batch in a frame; () is the first look."""
        if isinstance(frame, tuple) and frame == ():
            return self.first
        found, finite = self._checked(self._measured(frame))
        self.later = self.later & finite
        return found

    def _measured(self, frame: Any) -> Any:
        if self.prepared is None:
            raise StateError(
                explain(
                    f"{self.curvature.name} looks at a batch more than once, and the statistics are moments already.",
                    why="a basis or factors of the state decide what is measured",
                    options="leave `measure=` out of value_grad_and_stats; or use kronecker() or diagonal()",
                )
            )
        return self.curvature.measure(self.prepared, frame)

    @staticmethod
    def _checked(moments: Any) -> tuple[Any, Tensor]:
        finite = all_finite(moments)
        return _tree.tree_map(lambda m: torch.where(finite, m, 0.0), moments), finite


def absorbed(state: KFacState, batch: Batch) -> KFacState:
    """One step of the moving averages; a batch that is not finite changes nothing but `rejected`."""
    stats, rules = batch.stats, state.rules.value
    layouts, plan = stats.rules.value.layouts, stats.rules.value.plan
    if rules.layouts and rules.layouts != layouts:
        raise StateError(
            explain(
                "the statistics describe other blocks than the state.",
                got=", ".join(layout.name for layout in layouts),
                wanted=", ".join(layout.name for layout in rules.layouts),
                options="use one model and one `unclaimed` setting per state",
            )
        )
    if state.curvature == () and readable(batch.finite) and not batch.finite:  # nothing was observed, and still is not
        return state._replace(rejected=state.rejected + 1)
    rules = rules._replace(layouts=layouts, paths=plan.paths, unclaimed=plan.unclaimed)
    weight, fraction = _next(state.observed, state.weight, batch.finite, rules.options)
    curvature = batch.curvature.absorb(state.curvature, batch.look, fraction)
    return state._replace(
        observed=state.observed + batch.finite,
        rejected=state.rejected + ~batch.finite,
        weight=weight,
        curvature=_chosen(batch, curvature, state.curvature),
        rules=Static(rules),
    )


def scaled(state: KFacState, batch: Batch) -> KFacState:
    """One step of the averages that are seen in the refreshed frame (the scalings of EKFAC)."""
    weight, fraction = _next(state.scaled, state.scale_weight, batch.finite, state.rules.value.options)
    curvature = batch.curvature.scale(state.curvature, batch.look, fraction)
    return state._replace(
        scaled=state.scaled + batch.finite,
        scale_weight=weight,
        curvature=_chosen(batch, curvature, state.curvature),
    )


def _next(count: Tensor, weight: Tensor, finite: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The weight W after one more batch, and the fraction of that batch in the average."""
    weight = torch.where(finite, options.decay * weight + 1, weight)
    fraction = 1 / weight.clamp(min=1)
    if options.average == "warmup":
        fraction = (1 / (count + 1).to(torch.float64)).clamp(min=1 - options.decay)
    return weight, torch.where(finite, fraction, 0.0)


def _chosen(batch: Batch, new: Any, old: Any) -> Any:
    """The new averages, unless a later look at the batch was not finite."""
    if batch.later is batch.finite or (readable(batch.later) and batch.later):
        return new
    old = _tree.tree_map(torch.zeros_like, new) if old == () else old
    return _tree.tree_map(lambda x, y: torch.where(batch.later | ~batch.finite, x, y), new, old)


def refreshed(state: KFacState) -> KFacState:
    """The dear part of the curvature's state anew."""
    curvature = curvature_of(state).refresh(state.curvature, _damping(state), state.rules.value.options.split)
    return state._replace(curvature=curvature)


def factorized(state: KFacState, kept: Any = ()) -> KFacState:
    """Factorise; a factorisation that is not finite does not replace one that is. With nothing observed yet it is the
    identity.
    """
    own, split = curvature_of(state), state.rules.value.options.split
    factored = own.factorize(state.curvature, _damping(state), split, kept)
    finite, before = all_finite(factored), state.factored
    if readable(finite) and (finite or before != ()):  # `where` would ask them to be of one shape
        return state._replace(factored=factored if finite else before, failed=state.failed + ~finite)
    if before == ():  # the identity takes the place of what was not there before
        empty, one = _tree.tree_map(torch.zeros_like, state.curvature), torch.ones_like(_damping(state))
        before = own.factorize(empty, one, split)
    chosen = _tree.tree_map(lambda new, old: torch.where(finite, new, old), factored, before)
    return state._replace(factored=chosen, failed=state.failed + ~finite)


def _damping(state: KFacState) -> Tensor:
    return torch.where(state.weight > 0, state.damping.to(state.weight.device), 1.0)


def curvature_of(state: KFacState) -> Curvature:
    """The curvature of a state. Raises StateError when it came from a file and has not met its transformation yet."""
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
    """A state with its curvature: the one it has, or after loading from a file the one given."""
    rules: Rules = state.rules.value
    return state if rules.curvature is not None else state._replace(rules=Static(rules._replace(curvature=curvature)))


def all_finite(tree: PyTree) -> Tensor:
    """Whether all leaves are finite: a 0-dim tensor, so nothing waits for a device."""
    sums = [torch.isfinite(leaf.sum()) for leaf in _tree.leaves(tree)]
    return torch.stack(sums).all() if sums else torch.tensor(True)
