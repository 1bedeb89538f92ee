"""Curvature, averages, damping and periods become one link of a chain; and the two primitives that work on its state
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import StateError, TreeMismatchError, explain
from kfac_func._tracing import without_autocast
from kfac_func._tree import Static
from kfac_func._typing import PyTree, ScalarOrSchedule
from kfac_func.blocks import Thin, pack, unpack
from kfac_func.curvature import Curvature
from kfac_func.estimators import Stats
from kfac_func.precondition.averages import absorbed, factorized, refreshed, scaled
from kfac_func.precondition.batch import Observed, rows_of, speaking
from kfac_func.precondition.notices import Streak, unseen, wide
from kfac_func.precondition.periods import refresh_due, scale_due
from kfac_func.precondition.rules import attached, curvature_of, leaf_damping
from kfac_func.state import KFacState, Options, Rules, inside, the_one
from kfac_func.transforms import GradientTransformation
from kfac_func.transforms.base import zero_count
from kfac_func.transforms.masks import Mask, selected
from kfac_func.transforms.trail import Trail

Damping = ScalarOrSchedule | Mapping[str, ScalarOrSchedule]
"""λ of all blocks, or by patterns of paths."""


def preconditioner(
    curvature: Curvature, damping: Damping, decay: ScalarOrSchedule, options: Options, l2_mask: Mask | None = None
) -> GradientTransformation:
    """The transformation behind `kfac()`: absorb statistics, refresh the factorisation when due, solve."""

    streak = Streak()

    def init(params: PyTree) -> KFacState:
        device = next((leaf.device for leaf in _tree.leaves(params)), torch.device("cpu"))
        counts = {
            name: torch.zeros((), dtype=torch.int64, device=device)
            for name in ("observed", "rejected", "failed", "scaled")
        }
        weights = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("weight", "scale_weight")}
        covered = selected(l2_mask, params) if options.l2 or l2_mask is not None else {}
        decayed = tuple(path for path, meant in covered.items() if meant)
        rules = Rules(curvature, options, decayed=decayed, name=curvature.name)
        return KFacState(
            step=zero_count(),
            **counts,
            **weights,
            scaled_at=zero_count(),
            damping=_initial(damping),
            curvature=(),
            factored=(),
            rules=Static(rules),
            decay=_value(decay, zero_count()) if options.decay is None else (),
        )

    @without_autocast
    def update(
        updates: PyTree,
        state: KFacState,
        params: PyTree | None = None,
        *,
        stats: Stats | Sequence[Stats] | None = None,
        refresh: bool | None = None,
        scale: bool | None = None,
        trail: Trail | None = None,
        inplace: bool = False,
        **extra: Any,
    ) -> tuple[PyTree, KFacState]:
        del params, inplace, extra
        before = state = _scheduled(attached(state, curvature), damping, decay)
        state = _advanced(state, stats, refresh, scale)
        unseen(state)
        streak.follow(before, state)
        if trail is not None:
            trail.covector, trail.damping = updates, leaf_damping(state)
        return _solved(state, updates, rows_of(stats, updates)), state._replace(step=state.step + 1)

    return GradientTransformation(init, update)


def _advanced(
    state: KFacState, stats: Stats | Sequence[Stats] | None, refresh: bool | None, scale: bool | None
) -> KFacState:
    """Averages, refresh, scalings, factorisation: whatever is due, in this order."""
    stats = speaking(stats)
    seen = None if stats is None else Observed(state, stats)
    if seen is not None:
        state = absorbed(state, seen)
    if state.curvature == ():
        return state
    first = state.factored == ()
    if first:
        wide(state)
    due = first or refresh_due(state, refresh)
    some = due if isinstance(due, frozenset) else None
    kept = state.factored if some is not None or not due else ()
    if due:
        state = refreshed(state, some)
    scale = curvature_of(state).scales and seen is not None and (first or scale_due(state, scale))
    if scale and seen is not None:
        state = scaled(state, seen)
    seen = None  # factorisations need the memory of its moments
    return factorized(state, kept, some) if due or scale else state


def _value(setting: ScalarOrSchedule, count: Tensor) -> Tensor:
    value = setting(count) if callable(setting) else setting
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _initial(damping: Damping) -> Tensor | dict[str, Tensor]:
    if isinstance(damping, Mapping):
        return {pattern: _value(value, zero_count()) for pattern, value in damping.items()}
    return _value(damping, zero_count())


def _scheduled(state: KFacState, damping: Damping, decay: ScalarOrSchedule) -> KFacState:
    """The values of schedules and tensors at this step. The number of a damping only begins, and then the state has
    its own; that of a decay is static.
    """
    if not isinstance(decay, (int, float)):
        state = state._replace(decay=_value(decay, state.step))
    if isinstance(damping, Mapping) and isinstance(state.damping, dict):
        given = {pattern: value for pattern, value in damping.items() if not isinstance(value, (int, float))}
        new = {pattern: _value(value, state.step) for pattern, value in given.items()}
        return state._replace(damping=state.damping | new)
    return state if isinstance(damping, (int, float, Mapping)) else state._replace(damping=_value(damping, state.step))


@without_autocast
def observe(state: PyTree, stats: Stats | Sequence[Stats], *, refresh: bool = True) -> PyTree:
    """Absorb the statistics of a batch into the K-FAC state inside ANY optimiser state; everything else stays as it is.

    stats      of a batch, or a sequence of those of its micro-batches: absorbed together, as means over all examples
    refresh    refresh, scale and factorise as well (the first statistics always do)

    Statistics with NaN or infinities are not absorbed: `rejected` counts them and the state stays usable. Periods count
    updates: what is observed without a refresh counts at the next update that is due.
    Raises StateError when there is no K-FAC state inside, the statistics describe other blocks, or there are none in
    them (they only carry the gradient).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> state = kf.observe(kf.kfac().init(params), stats)
        >>> int(state.observed), kf.precondition(state, grads)["weight"].shape
        (1, torch.Size([2, 3]))
    """

    def one(inner: KFacState) -> KFacState:
        return _advanced(inner, stats, refresh, refresh)

    inside(state)
    if speaking(stats) is None:
        raise StateError(
            explain(
                "there is nothing to observe in these statistics.",
                got="the gradient as rows, from a step with stats=False",
                options="observe statistics of steps with stats=True",
            )
        )
    return _tree.map_nodes(one, state, KFacState)


@without_autocast
def precondition(state: PyTree, grads: PyTree) -> PyTree:
    """Multiply gradients by the damped inverse curvature: v = (F̂ + λ)⁻¹ g, block by block. Linear, symmetric
    positive definite.

    state    a K-FAC state, or any state with exactly one inside
    grads    a tree like the parameters; None leaves stay None; leaves without curvature come back as they are (copied)

    Before the first statistics, and during `burn_in`, these are the gradients themselves. The direction is not scaled
    by a learning rate.
    Raises StateError without a K-FAC state, TreeMismatchError when the trees do not fit. See `observe` for an example.

        >>> state = kf.kfac().init({"w": torch.ones(2)})
        >>> kf.precondition(state, {"w": torch.ones(2)})
        {'w': tensor([1., 1.])}
    """
    return _solved(the_one(state), grads, {})


def _solved(state: KFacState, grads: PyTree, rows: dict[str, Thin]) -> PyTree:
    if state.factored == ():
        return _tree.tree_map(torch.clone, grads)
    rules = state.rules.value
    leaves = _tree.unique_paths(grads)
    unknown = [path for path in leaves if path not in rules.paths]
    if unknown:
        raise TreeMismatchError(
            explain(
                "the gradients are not a tree like the parameters.",
                unexpected=", ".join(map(repr, unknown[:5])),
                wanted=", ".join(map(repr, rules.paths[:20])),
            )
        )
    here = [layout for layout in rules.layouts if any(path in leaves for path in layout.leaves)]
    own = curvature_of(state)
    rows = {name: one for name, one in rows.items() if own.thin(name)}
    vs = {layout.name: rows[layout.name] if layout.name in rows else pack(layout, leaves) for layout in here}
    solved = own.solve(state.factored, vs)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    new = {path: leaf.clone() for path, leaf in leaves.items() if not any(path in layout.leaves for layout in here)}
    for layout in here:
        new |= {path: v.to(leaves[path].dtype) for path, v in unpack(layout, solved[layout.name], shapes).items()}
    if rules.options.burn_in:
        ready = state.observed > rules.options.burn_in
        new = {path: torch.where(ready, v, leaves[path]) for path, v in new.items()}
    return _tree.with_leaves(grads, [new[path] for path in leaves])
