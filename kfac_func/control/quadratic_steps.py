"""Learning rate and momentum from the exact quadratic model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tracing import settled
from kfac_func._tree import storable, tree_map
from kfac_func._typing import PyTree, Scalar, ScalarOrSchedule
from kfac_func.control.quadratic_model import QuadraticModel
from kfac_func.transforms.base import (
    GradientTransformation,
    add_scaled,
    check_scalar,
    keep_missing,
    resolve,
    scale_tree,
    zero_count,
)
from kfac_func.transforms.keywords import strict


class QuadraticModelState(NamedTuple):
    """The last step δ (`velocity`), its coefficients, and what the model said of it; scalars are float64.

    learning_rate, momentum   α and μ of δ = −α v + μ δ_before
    change                    M(δ) − M(0), without damping         penalty   ½ δᵀΛδ
    value                     h(θ) before the step, on the examples that the model looks at
    """

    step: Int[Tensor, ""]
    velocity: PyTree
    learning_rate: Float[Tensor, ""]
    momentum: Float[Tensor, ""]
    change: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    value: Float[Tensor, ""]


storable(QuadraticModelState)


def scale_by_quadratic_model(
    model: QuadraticModel,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    momentum: Scalar | None = None,
    damping: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    r"""Turn a direction into the step that the quadratic model likes best, with momentum:

        δ = −α v + μ δ_before,      (−α, μ) = w = −(VᵀFV + γVᵀRV + λVᵀV)⁻¹ Vᵀ∇h,      V = [v, δ_before]

    Symbols: v the updates; F and γR of `model` (see `quadratic_model`), ∇h from the gradient that entered the chain;
    λ that of the preconditioner in front. It goes last: δ is added to the parameters as it is, no rate after it.

    learning_rate   α fixed, a number or a schedule: only μ is chosen
    momentum        μ fixed: only α is chosen; 0 is none
    damping         λ, in place of that of the preconditioner (without one: 0)

    `update` needs params and the extra `batch=(inputs, targets)`, the batch of the gradient; outside of a chain also
    `gradient=`. The first step has no δ_before. State: `QuadraticModelState`. Raises HyperparameterError for values
    without meaning, when both are fixed, and naming what `update` lacks.
    Source: Martens & Grosse 2015 (1503.05671), §6.4 and §7.

        >>> fn = lambda p, x: x * p["w"]
        >>> tx = kf.scale_by_quadratic_model(kf.quadratic_model(fn, kf.losses.mse()))
        >>> params, batch = {"w": torch.tensor([2.0])}, (torch.ones(4, 1), torch.zeros(4, 1))
        >>> g = {"w": torch.tensor([4.0])}
        >>> updates, state = tx.update(g, tx.init(params), params, batch=batch, gradient=g)
        >>> updates["w"], state.learning_rate.item(), state.change.item()
        (tensor([-2.]), 0.5, -4.0)
    """
    for name, value in (("learning_rate", learning_rate), ("damping", damping)):
        if value is not None:
            check_scalar(name, value, "[0, inf)", schedule=True)
    if momentum is not None:
        check_scalar("momentum", momentum, "(-inf, inf)")
    if learning_rate is not None and momentum is not None:
        raise HyperparameterError(
            explain(
                "learning_rate and momentum contradict each other: fixing both leaves nothing to the model.",
                options="fix one of them; or use sgd(learning_rate, momentum)",
            )
        )

    def init(params: PyTree) -> QuadraticModelState:
        numbers = (torch.zeros((), dtype=torch.float64) for _ in range(5))
        return QuadraticModelState(zero_count(), tree_map(torch.zeros_like, params), *numbers)

    def update(updates, state, params=None, *, batch=None, gradient=None, trail=None, **extra):
        del extra
        entered = gradient if gradient is not None else trail.gradient if trail is not None else None
        _wanted(params=params, batch=batch, gradient=entered)
        rate = None if learning_rate is None else resolve(learning_rate, state.step)
        shrink = trail.damping if trail is not None else None
        shrink = shrink if damping is None else resolve(damping, state.step)
        directions, here = [updates, state.velocity], tree_map(settled, params)
        form = model.form(here, batch, directions, entered, 0.0 if shrink is None else shrink)
        w = form.minimizer([None if rate is None else -rate, momentum])
        step = add_scaled(scale_tree(updates, w[0]), w[1], state.velocity)
        return step, QuadraticModelState(
            step=state.step + 1,
            velocity=tree_map(torch.clone, keep_missing(state.velocity, step)),
            learning_rate=-w[0],
            momentum=w[1],
            change=form.change(w),
            penalty=0.5 * w @ form.damping @ w,
            value=form.value,
        )

    return GradientTransformation(init, strict(update))


def _wanted(**extras: object) -> None:
    ways = {
        "params": "update(updates, state, params, ...)",
        "batch": "update(..., batch=(inputs, targets)), the batch of the gradient",
        "gradient": "put it in a chain; or update(..., gradient=g)",
    }
    for name, value in extras.items():
        if value is None:
            raise HyperparameterError(
                explain(f"scale_by_quadratic_model needs {name} and got none.", options=ways[name])
            )
