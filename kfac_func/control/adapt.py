"""Adapt the damping of whatever K-FAC is inside a transformation, and take back steps that raise the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func._tracing import readable, settled
from kfac_func._tree import storable, tree_map
from kfac_func._typing import PyTree
from kfac_func.control.levenberg import LevenbergMarquardt, levenberg_marquardt
from kfac_func.control.quadratic_model import QuadraticModel
from kfac_func.control.quadratic_steps import QuadraticModelState
from kfac_func.precondition.rules import leaf_damping
from kfac_func.state import KFacState, inside, map_damping
from kfac_func.transforms.base import apply_updates, zero_count
from kfac_func.transforms.keywords import strict
from kfac_func.transforms.wrappers import with_extra_args_support


class AdaptDampingState(NamedTuple):
    """t; ρ when it was measured last (1 before); c, the unit of damping (1 unless calibrated); steps taken back; and
    the state of the transformation inside.
    """

    step: Int[Tensor, ""]
    ratio: Float[Tensor, ""]
    unit: Float[Tensor, ""]
    rejected: Int[Tensor, ""]
    inner: Any


class Proposal(NamedTuple):
    """A step on trial: the states before and after it, and M(δ) − M(0) (() where it was not asked for)."""

    before: AdaptDampingState
    after: AdaptDampingState
    predicted: Any


storable(AdaptDampingState, Proposal)


class _Hole(NamedTuple):
    """The place of a K-FAC state."""


class Adaptive(NamedTuple):
    """A transformation whose update may also be taken in two phases; `due(state)` says whether accept wants losses.

    propose  (updates, state, params, **extra) -> (step δ, Proposal)
    accept   (δ, Proposal, before=h(θ), after=h(θ + δ)) -> (updates, state)
    """

    init: Callable[..., AdaptDampingState]
    update: Callable[..., tuple[PyTree, AdaptDampingState]]
    propose: Callable[..., tuple[PyTree, Proposal]]
    accept: Callable[..., tuple[PyTree, AdaptDampingState]]
    due: Callable[[AdaptDampingState], bool]


def adapt_damping(
    inner: Any,
    rule: LevenbergMarquardt | None = None,
    *,
    model: QuadraticModel | None = None,
    reject: bool = False,
    calibrate: bool = False,
) -> Adaptive:
    r"""Adapt the damping of the K-FAC inside `inner` by comparing the loss, before and after on the SAME batch, with
    what a quadratic model foretold:  ρ = (h(θ+δ) − h(θ)) / (M(δ) − M(0)), then λ ← rule(λ, ρ).

    inner      a chain with K-FAC in it, whose updates are added to the parameters as they are
    rule       `levenberg_marquardt(...)`, the default
    model      what M and h are, see `quadratic_model`. Needed unless a `scale_by_quadratic_model` inside says what it
               foretold (nothing may change the updates behind that one) and `value_fn=` is passed
    reject     also measure every step: one after which h is higher, or NaN, is taken back (a zero update; the states
               inside go back too, but what K-FAC observed stays) and the damping is raised at once
    calibrate  count all damping in units of c = gᵀ(F + γR)g / gᵀg, the curvature along the first gradient: the
               damping of K-FAC is multiplied by c at the first update, and so are the bounds of the rule. A loss
               multiplied by a constant then trains the same

    One phase: `update(grads, state, params, stats=..., batch=...)` evaluates h itself when it is due (the extra
    `value_fn(params)` in place of the model's h, `value=` where h(θ) is known). Two phases, with losses of your own:

        δ, proposal = tx.propose(grads, state, params, stats=..., batch=...)
        δ, state = tx.accept(δ, proposal, before=h(θ), after=h(θ + δ))          without losses where not tx.due(state)

    Changes below ten roundings of h are no evidence and no rise. State: `AdaptDampingState`. Raises
    HyperparameterError for K-FAC whose damping is a schedule or a tensor (it would be overwritten), for options that
    contradict each other, and naming what `update` lacks; StateError without K-FAC inside.
    Source: Martens & Grosse 2015 (1503.05671), §6.5; the unit of damping is ours.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> loss = kf.losses.mse()
        >>> model = kf.quadratic_model(fn, loss)
        >>> tx = kf.adapt_damping(kf.chain(kf.kfac(damping=1.0), kf.scale_by_quadratic_model(model)), model=model)
        >>> step = kf.value_grad_and_stats(fn, loss, estimator=kf.estimators.exact())
        >>> batch, state = (torch.eye(3), torch.ones(3, 2)), tx.init(params)
        >>> for _ in range(5):
        ...     _, grads, stats = step(params, batch)
        ...     updates, state = tx.update(grads, state, params, stats=stats, batch=batch)
        ...     params = kf.apply_updates(params, updates)
        >>> round(state.ratio.item(), 3)
        1.0
    """
    chosen = levenberg_marquardt() if rule is None else rule
    if calibrate and model is None:
        raise HyperparameterError(
            explain(
                "calibrate=True and model=None contradict each other: the model measures the unit of damping.",
                options="adapt_damping(inner, model=quadratic_model(fn, loss), calibrate=True)",
            )
        )
    link = with_extra_args_support(inner)

    def init(params: PyTree) -> AdaptDampingState:
        state = link.init(params)
        if any(one.rules.value.options.driven for one in inside(state)):
            raise HyperparameterError(
                explain(
                    "adapt_damping and a scheduled damping contradict each other.",
                    why="a schedule or a tensor overwrites the damping at every update",
                    options="kfac(damping=<a number>, ...); or leave out adapt_damping",
                )
            )
        one = torch.ones((), dtype=torch.float64)
        return AdaptDampingState(zero_count(), one, one.clone(), zero_count(), state)

    def due(state: AdaptDampingState) -> bool:
        return reject or not readable(state.step) or (int(state.step) + 1) % chosen.interval == 0

    def propose(updates, state, params=None, *, batch=None, **extra) -> tuple[PyTree, Proposal]:
        params = tree_map(settled, params)
        started = _calibrated(state, model, params, batch, updates) if calibrate else state
        step, new = link.update(updates, started.inner, params, batch=batch, **extra)
        predicted = _predicted(new, model, chosen, params, batch, step, updates) if due(state) else ()
        return step, Proposal(started, started._replace(step=state.step + 1, inner=new), predicted)

    def accept(updates, proposal, *, before=None, after=None) -> tuple[PyTree, AdaptDampingState]:
        old, new, predicted = proposal
        if not due(old):
            return updates, new
        _needed(before=before, after=after)
        return _judged(updates, old, new, predicted, before, after, chosen, reject)

    def update(updates, state, params=None, *, batch=None, value=None, value_fn=None, **extra):
        params = tree_map(settled, params)
        step, proposal = propose(updates, state, params, batch=batch, **extra)
        if not due(state):
            return accept(step, proposal)
        measure = value_fn if value_fn is not None else _measure(model, batch)
        moved = apply_updates(params, step)
        before = measure(params) if value is None else value
        return accept(step, proposal, before=before, after=measure(moved))

    return Adaptive(init, strict(update, link.update), strict(propose, link.update), accept, due)


def calibration(model: QuadraticModel, params: PyTree, batch: Any, gradient: PyTree) -> Float[Tensor, ""]:
    """c = ∇hᵀ(F + γR)∇h / ‖∇h‖², the curvature along the gradient; 1 where that is zero or not finite.

    `gradient` is that of the loss, without the l2 term; c has the units of F.
    """
    form = model.form(params, batch, [gradient], gradient, 1.0)
    unit = (form.curvature + form.l2)[0, 0] / form.damping[0, 0]
    return torch.where(torch.isfinite(unit) & (unit > 0), unit, 1.0)


def _calibrated(
    state: AdaptDampingState, model: QuadraticModel | None, params: PyTree, batch: Any, gradient: PyTree
) -> AdaptDampingState:
    first = state.step == 0
    if model is None or (readable(first) and not first):
        return state
    _needed(batch=batch, params=params)
    unit = torch.where(first.to(state.unit.device), calibration(model, params, batch, gradient).to(state.unit), 1.0)
    return state._replace(unit=state.unit * unit, inner=map_damping(state.inner, lambda damping: damping * unit))


def _predicted(
    inner: Any,
    model: QuadraticModel | None,
    rule: LevenbergMarquardt,
    params: PyTree,
    batch: Any,
    step: PyTree,
    gradient: PyTree,
) -> Tensor:
    """M(δ) − M(0), from the link that made δ of it, or anew."""
    own = _tree.nodes(inner, QuadraticModelState)
    if own:
        return own[-1].change + own[-1].penalty if rule.damping_in_model else own[-1].change
    if model is None:
        raise HyperparameterError(
            explain(
                "adapt_damping has nothing that foretells the loss.",
                why="there is no scale_by_quadratic_model inside and no model",
                options="adapt_damping(inner, model=quadratic_model(fn, loss))",
            )
        )
    _needed(batch=batch, params=params)
    damping = leaf_damping(inside(inner)[0]) if rule.damping_in_model else 0.0
    form = model.form(params, batch, [step], gradient, damping)
    w = torch.ones_like(form.slope)
    return form.change(w) + 0.5 * form.damping[0, 0]


def _judged(
    updates: PyTree,
    old: AdaptDampingState,
    new: AdaptDampingState,
    predicted: Tensor,
    before: Any,
    after: Any,
    rule: LevenbergMarquardt,
    reject: bool,
) -> tuple[PyTree, AdaptDampingState]:
    """ρ, the damping it asks for, and (with `reject`) the old place where the loss rose."""
    before, after = (torch.as_tensor(x).to(predicted) for x in (before, after))
    before, after = (x.detach() if readable(x) else x for x in (before, after))  # ρ is measured, not a function of θ
    finest = 10 * max(torch.finfo(leaf.dtype).eps for leaf in _tree.leaves(updates)) * before.abs()
    raised = ~(after <= before + finest)
    evidence = ~((predicted.abs() <= finest) & ((after - before).abs() <= finest))
    ratio = torch.where(evidence, (after - before) / torch.where(evidence, predicted, 1.0), 1.0)
    timely = ((new.step % rule.interval) == 0).to(ratio.device)
    judged = evidence & (timely | raised if reject else timely)
    asked = torch.where(raised, float("nan"), ratio) if reject else ratio

    def adapted(damping: Tensor) -> Tensor:
        at = judged.to(damping.device)
        return torch.where(at, rule(damping, asked.to(damping), new.unit.to(damping)), damping)

    inner = map_damping(new.inner, adapted)
    if reject:
        inner = _taken_back(raised, inner, old.inner)
        updates = tree_map(lambda u: torch.where(raised.to(u.device), 0.0, u), updates)
    state = new._replace(ratio=torch.where(evidence, ratio, new.ratio), inner=inner)
    return updates, state._replace(rejected=new.rejected + (raised.to(new.rejected.device) if reject else 0))


def _taken_back(raised: Bool[Tensor, ""], new: Any, old: Any) -> Any:
    """The old states where the loss rose; always the new ones of K-FAC, and the numbers of the trial."""
    learned, tried = _tree.nodes(new, KFacState)[::-1], _tree.nodes(new, QuadraticModelState)[::-1]
    emptied = [_tree.map_nodes(lambda _: _Hole(), state, KFacState) for state in (new, old)]
    chosen = tree_map(lambda n, o: torch.where(raised.to(n.device), o.to(n.device), n), *emptied)
    chosen = _tree.map_nodes(lambda _: learned.pop(), chosen, _Hole)
    return _tree.map_nodes(
        lambda own: tried.pop()._replace(step=own.step, velocity=own.velocity), chosen, QuadraticModelState
    )


def _measure(model: QuadraticModel | None, batch: Any) -> Callable[[PyTree], Tensor]:
    if model is None:
        raise HyperparameterError(
            explain(
                "adapt_damping needs value_fn and got none.",
                why="it compares the loss before and after the step, on the same batch",
                options="update(..., value_fn=lambda params: ...); or adapt_damping(inner, model=...); or accept()",
            )
        )
    _needed(batch=batch)
    return lambda params: model.value(params, batch)


def _needed(**extras: Any) -> None:
    for name, value in extras.items():
        if value is None:
            raise HyperparameterError(
                explain(
                    f"adapt_damping needs {name} and got none.",
                    options=f"accept(updates, proposal, {name}=...) in two phases; update(..., {name}=...) in one",
                )
            )
