"""Curvature, averages, damping and periods become one link of a chain; and the two primitives that work on its state
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import StateError, TreeMismatchError, explain
from kfac_func._tree import Static
from kfac_func._typing import PyTree, ScalarOrSchedule
from kfac_func.blocks import pack, unpack
from kfac_func.curvature import Curvature
from kfac_func.estimators import Stats
from kfac_func.precondition.averages import (
    Batch,
    absorbed,
    attached,
    curvature_of,
    factorized,
    refreshed,
    scaled,
)
from kfac_func.state import KFacState, Options, Rules, inside
from kfac_func.transforms import GradientTransformation


def preconditioner(curvature: Curvature, damping: ScalarOrSchedule, options: Options) -> GradientTransformation:
    """The transformation behind `kfac()`: absorb statistics, refresh the factorisation when due, solve."""

    def init(params: PyTree) -> KFacState:
        device = next((leaf.device for leaf in _tree.leaves(params)), torch.device("cpu"))
        zero = torch.zeros((), dtype=torch.int64)
        counts = {
            name: torch.zeros((), dtype=torch.int64, device=device)
            for name in ("observed", "rejected", "failed", "scaled")
        }
        weights = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("weight", "scale_weight")}
        rules = Static(Rules(curvature, options))
        return KFacState(
            step=zero,
            **counts,
            **weights,
            damping=_value(damping, zero),
            curvature=(),
            factored=(),
            rules=rules,
        )

    def update(
        updates: PyTree,
        state: KFacState,
        params: PyTree | None = None,
        *,
        stats: Stats | None = None,
        refresh: bool | None = None,
        scale: bool | None = None,
        inplace: bool = False,
        **extra: Any,
    ) -> tuple[PyTree, KFacState]:
        del params, inplace, extra
        state = attached(state, curvature)
        if callable(damping):
            state = state._replace(damping=_value(damping, state.step))
        state = _advanced(state, stats, refresh, scale)
        return precondition(state, updates), state._replace(step=state.step + 1)

    return GradientTransformation(init, update)


def _advanced(state: KFacState, stats: Stats | None, refresh: bool | None, scale: bool | None) -> KFacState:
    """Averages, refresh, scalings, factorisation: whatever is due, in this order."""
    batch = None if stats is None else Batch(state, stats)
    if batch is not None:
        state = absorbed(state, batch)
    if state.curvature == ():
        return state
    options, own = state.rules.value.options, curvature_of(state)
    first = state.factored == ()
    due = first or _due(state, options.refresh_every, refresh, "refresh")
    if due:
        state = refreshed(state)
    scale = own.scales and batch is not None and (first or _due(state, options.scale_every, scale, "scale"))
    if scale and batch is not None:
        state = scaled(state, batch)
    return factorized(state, () if due else state.factored) if due or scale else state


def _value(damping: ScalarOrSchedule, count: Tensor) -> Tensor:
    value = damping(count) if callable(damping) else damping
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _due(state: KFacState, every: int, asked: bool | None, name: str) -> bool:
    """Whether to do it now: as asked, or by an interval that grows from 1 to `every` as averages age."""
    if asked is not None or every == 1:
        return True if asked is None else asked
    try:
        step = None if torch.compiler.is_compiling() else int(state.step)
    except RuntimeError:  # a batched count under vmap has no single value
        step = None
    if step is None:
        raise StateError(
            explain(
                f"whether to {name} cannot be read from the count under vmap or torch.compile.",
                options=f"pass {name}=True or {name}=False to update; or use {name}_every=1",
            )
        )
    return step % min(every, 1 + step // every) == 0


def observe(state: PyTree, stats: Stats, *, refresh: bool = True) -> PyTree:
    """Absorb the statistics of a batch into the K-FAC state inside ANY optimiser state; everything else stays as it is.

    refresh    refresh, scale and factorise as well (the first statistics always do)

    Statistics with NaN or infinities are not absorbed: `rejected` counts them and the state stays usable.
    Raises StateError when there is no K-FAC state inside, or the statistics describe other blocks.

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
    return _tree.map_nodes(one, state, KFacState)


def precondition(state: PyTree, grads: PyTree) -> PyTree:
    """Multiply gradients by the damped inverse curvature: v = (F̂ + λ)⁻¹ g, block by block. Linear, symmetric
    positive definite.

    state    a K-FAC state, or any state with exactly one inside
    grads    a tree like the parameters; None leaves stay None; leaves without curvature come back as they are (copied)

    Before the first statistics these are the gradients themselves. The direction is not scaled by a learning rate.
    Raises StateError without a K-FAC state, TreeMismatchError when the trees do not fit. See `observe` for an example.

        >>> state = kf.kfac().init({"w": torch.ones(2)})
        >>> kf.precondition(state, {"w": torch.ones(2)})
        {'w': tensor([1., 1.])}
    """
    found = inside(state)
    if len(found) > 1:
        raise StateError(explain("there are several K-FAC states inside.", got=len(found), options="pass one of them"))
    return _solved(found[0], grads)


def _solved(state: KFacState, grads: PyTree) -> PyTree:
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
    vs = {layout.name: pack(layout, leaves) for layout in here}
    solved = curvature_of(state).solve(state.factored, vs)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    new = {path: leaf.clone() for path, leaf in leaves.items() if not any(path in layout.leaves for layout in here)}
    for layout in here:
        new |= {path: v.to(leaves[path].dtype) for path, v in unpack(layout, solved[layout.name], shapes).items()}
    return _tree.with_leaves(grads, [new[path] for path in leaves])
