"""Curvature, averages, damping and refresh policy become one link of a chain; and the two primitives that work on its
state alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from kfac_func import _tree
from kfac_func._errors import StateError, TreeMismatchError, explain
from kfac_func._tree import Static
from kfac_func._typing import PyTree, ScalarOrSchedule
from kfac_func.blocks import pack, unpack
from kfac_func.curvature import Curvature
from kfac_func.estimators import Stats
from kfac_func.state import KFacState, Options, Rules, inside
from kfac_func.transforms import GradientTransformation


def preconditioner(curvature: Curvature, damping: ScalarOrSchedule, options: Options) -> GradientTransformation:
    """The transformation behind `kfac()`: absorb statistics, refresh the factorisation when due, solve."""

    def init(params: PyTree) -> KFacState:
        device = next((leaf.device for leaf in _tree.leaves(params)), torch.device("cpu"))
        zero = torch.zeros((), dtype=torch.int64)
        observed, rejected, failed = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(3))
        weight = torch.zeros((), dtype=torch.float64, device=device)
        rules = Static(Rules(curvature, options))
        return KFacState(zero, observed, rejected, failed, weight, _value(damping, zero), (), (), rules)

    def update(
        updates: PyTree,
        state: KFacState,
        params: PyTree | None = None,
        *,
        stats: Stats | None = None,
        refresh: bool | None = None,
        inplace: bool = False,
        **extra: Any,
    ) -> tuple[PyTree, KFacState]:
        del params, inplace, extra
        state = _attached(state, curvature)
        if callable(damping):
            state = state._replace(damping=_value(damping, state.step))
        if stats is not None:
            state = _absorb(state, stats)
        if state.curvature != () and (state.factored == () or _due(state, refresh)):
            state = _refreshed(state)
        return precondition(state, updates), state._replace(step=state.step + 1)

    return GradientTransformation(init, update)


def _value(damping: ScalarOrSchedule, count: Tensor) -> Tensor:
    value = damping(count) if callable(damping) else damping
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _due(state: KFacState, refresh: bool | None) -> bool:
    """Whether to factorise now: as asked, or by an interval that grows from 1 to `refresh_every` as averages age."""
    every = _rules(state).options.refresh_every
    if refresh is not None or every == 1:
        return True if refresh is None else refresh
    if torch.compiler.is_compiling():
        raise StateError(_ask_refresh)
    try:
        step = int(state.step)
    except RuntimeError as error:  # a batched count under vmap has no single value
        raise StateError(_ask_refresh) from error
    return step % min(every, 1 + step // every) == 0


_ask_refresh = explain(
    "whether to refresh the factorisation cannot be read from the count under vmap or torch.compile.",
    options="pass refresh=True or refresh=False to update; or use refresh_every=1",
)


def _attached(state: KFacState, curvature: Curvature) -> KFacState:
    """A state with its curvature: the one it has, or after loading from a file the one given."""
    rules = state.rules.value
    return state if rules.curvature is not None else state._replace(rules=Static(rules._replace(curvature=curvature)))


def _rules(state: KFacState) -> Rules:
    return state.rules.value


def _curvature(state: KFacState) -> Curvature:
    found = _rules(state).curvature
    if found is None:
        raise StateError(
            explain(
                "the state was loaded from a file and has not met its transformation yet.",
                options="call tx.update(...) first; functions are not saved",
            )
        )
    return found


def _absorb(state: KFacState, stats: Stats) -> KFacState:
    """One step of the moving averages; a batch that is not finite changes nothing but `rejected`."""
    curvature, plan = _curvature(state), stats.rules.value.plan
    moments = curvature.measure(stats.blocks()) if stats.moments == () else stats.moments
    layouts = stats.rules.value.layouts
    rules = _rules(state)
    if rules.layouts and rules.layouts != layouts:
        raise StateError(
            explain(
                "the statistics describe other blocks than the state.",
                got=", ".join(layout.name for layout in layouts),
                wanted=", ".join(layout.name for layout in rules.layouts),
                options="use one model and one `unclaimed` setting per state",
            )
        )
    rules = rules._replace(layouts=layouts, paths=plan.paths, unclaimed=plan.unclaimed)
    old = curvature.init(moments) if state.curvature == () else state.curvature
    finite = _finite(moments)
    if state.curvature == () and _readable(finite) and not finite:  # nothing was observed yet, and still is not
        return state._replace(rejected=state.rejected + 1)
    kept = _tree.tree_map(lambda m, x: torch.where(finite, m, x), moments, old)
    weight = torch.where(finite, rules.options.decay * state.weight + 1, state.weight)
    fraction = 1 / weight.clamp(min=1)
    if rules.options.average == "warmup":
        fraction = (1 / (state.observed + 1).to(torch.float64)).clamp(min=1 - rules.options.decay)
    return state._replace(
        observed=state.observed + finite,
        rejected=state.rejected + ~finite,
        weight=weight,
        curvature=curvature.absorb(old, kept, torch.where(finite, fraction, 0.0)),
        rules=Static(rules),
    )


def _refreshed(state: KFacState) -> KFacState:
    """Factorise; a factorisation that is not finite does not replace one that is. With nothing observed yet it is the
    identity.
    """
    damping = torch.where(state.weight > 0, state.damping.to(state.weight.device), 1.0)
    factored = _curvature(state).factorize(state.curvature, damping, _rules(state).options.split)
    finite, before = _finite(factored), state.factored
    if before == () and _readable(finite) and finite:
        return state._replace(factored=factored)
    if before == ():  # the identity takes the place of what was not there before
        empty, one = _tree.tree_map(torch.zeros_like, state.curvature), torch.ones_like(damping)
        before = _curvature(state).factorize(empty, one, _rules(state).options.split)
    kept = _tree.tree_map(lambda new, old: torch.where(finite, new, old), factored, before)
    return state._replace(factored=kept, failed=state.failed + ~finite)


def _readable(flag: Tensor) -> bool:
    """Whether Python may ask for the value: not under torch.compile, vmap or a transform."""
    return not torch.compiler.is_compiling() and not is_functorch_wrapped_tensor(flag)


def _finite(tree: PyTree) -> Tensor:
    """Whether all leaves are finite: a 0-dim tensor, so nothing waits for a device."""
    sums = [torch.isfinite(leaf.sum()) for leaf in _tree.leaves(tree)]
    return torch.stack(sums).all() if sums else torch.tensor(True)


def observe(state: PyTree, stats: Stats, *, refresh: bool = True) -> PyTree:
    """Absorb the statistics of a batch into the K-FAC state inside ANY optimiser state; everything else stays as it is.

    refresh    factorise as well (the first statistics always do)

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
        inner = _absorb(inner, stats)
        due = inner.curvature != () and (refresh or inner.factored == ())
        return _refreshed(inner) if due else inner

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
    rules = _rules(state)
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
    solved = _curvature(state).solve(state.factored, vs)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    new = {path: leaf.clone() for path, leaf in leaves.items() if not any(path in layout.leaves for layout in here)}
    for layout in here:
        new |= {path: v.to(leaves[path].dtype) for path, v in unpack(layout, solved[layout.name], shapes).items()}
    return _tree.with_leaves(grads, [new[path] for path in leaves])
