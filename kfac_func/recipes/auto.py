"""K-FAC with nothing to tune: rate, momentum and damping come from the quadratic model of the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import StateError, explain
from kfac_func._tracing import readable
from kfac_func._typing import Model, PyTree
from kfac_func.capture import steadied
from kfac_func.control import (
    AdaptDampingState,
    QuadraticModelState,
    adapt_damping,
    levenberg_marquardt,
    quadratic_model,
    scale_by_quadratic_model,
)
from kfac_func.curvature import Curvature, Structure
from kfac_func.estimators import value_grad_and_stats
from kfac_func.estimators.vectors import Estimator
from kfac_func.losses import Loss
from kfac_func.recipes.structures import kfac
from kfac_func.state import inside
from kfac_func.transforms import add_decayed_weights, apply_updates, chain, ema
from kfac_func.transforms.masks import Mask


class AutoInfo(NamedTuple):
    """What a step of `kfac_auto` did, 0-dim tensors on the device of the parameters (nothing waits for it).

    loss            h(θ) before the step, on its batch, with the l2 term
    learning_rate   α, momentum μ of δ = −α v + μ δ_before
    damping         λ for the next step          rho   ρ where it was measured last (1 before)
    """

    loss: Float[Tensor, ""]
    learning_rate: Float[Tensor, ""]
    momentum: Float[Tensor, ""]
    damping: Float[Tensor, ""]
    rho: Float[Tensor, ""]


class Auto(NamedTuple):
    """A training loop's two functions.

    init  params -> state
    step  (params, state, batch, generator=None) -> (params, state, AutoInfo)
    """

    init: Callable[[PyTree], AdaptDampingState]
    step: Callable[..., tuple[PyTree, AdaptDampingState, AutoInfo]]


def kfac_auto(
    fn: Model,
    loss: Loss,
    *,
    l2: float = 0.0,
    l2_mask: Mask | None = None,
    curvature: Structure | Curvature | None = None,
    estimator: Estimator | None = None,
    averaging: float = 0.7,
    refresh_every: int = 5,
    reject: bool = False,
    examples: int | float = 1.0,
    **options: Any,
) -> Auto:
    r"""K-FAC that chooses its rate, momentum and damping itself. The chain, to copy and change:

        inner = chain(ema(0.7), add_decayed_weights(l2), kfac(damping=5e-4, l2=l2, refresh_every=5),
                      scale_by_quadratic_model(model))
        adapt_damping(inner, levenberg_marquardt(min=5e-6), model=model, calibrate=True)

    Every step the exact quadratic model of the batch gives the best α and μ of δ = −α v + μ δ_before; every fifth step
    the loss after the step, on the same batch, decides whether λ falls or rises. λ counts in units of the curvature
    along the first gradient, so the scale of the loss does not matter.

    fn, loss        as in `value_grad_and_stats`; `strict`, `unclaimed`, `sharing` and `plan` in `options` go there
    l2, l2_mask     γ of γ/2 ‖θ‖² over the leaves of the mask: in the objective, the preconditioner and the model
    curvature       as in `kfac`                estimator  of the statistics, default `monte_carlo()`
    averaging       β: what is preconditioned is the average of gradients, m ← βm + (1 − β)g, zero-debiased. A model
                    of one batch believes the noise of that batch; the average has less. 0 for full batches
    refresh_every   as in `kfac`
    examples        of a batch that the model looks at, as in `quadratic_model`. Fewer save time, but a direction that
                    these examples do not feel gets too long a step: only for batches of hundreds
    reject          take steps back after which the loss of their batch is higher: one more forward pass per step

    `step` makes one forward pass for value, gradient and statistics, one jvp per direction, and every fifth time one
    more forward pass, all with the same dropout. Without a generator the draws of the estimator are seeded by the
    number of the step: equal states make equal steps. Not under vmap and torch.compile (take the chain). Raises what
    its parts raise.
    Source: Martens & Grosse 2015 (1503.05671), §6 and §7; averaged gradients and the unit of damping are ours.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> auto = kf.kfac_auto(fn, kf.losses.mse())
        >>> state = auto.init(params)
        >>> for _ in range(10):
        ...     params, state, info = auto.step(params, state, (torch.eye(3), torch.ones(3, 2)))
        >>> info.loss.item() < 0.01
        True
    """
    fn, steady = steadied(fn)
    model = quadratic_model(fn, loss, l2=l2, mask=l2_mask, examples=examples)
    run = value_grad_and_stats(fn, loss, estimator=estimator, **options)
    pull = [add_decayed_weights(l2, l2_mask)] if l2 else []
    inner = chain(
        ema(averaging),
        *pull,
        kfac(curvature, damping=5e-4, refresh_every=refresh_every, l2=l2, l2_mask=l2_mask),
        scale_by_quadratic_model(model),
    )
    tx = adapt_damping(inner, levenberg_marquardt(min=5e-6), model=model, reject=reject, calibrate=True)

    def step(
        params: PyTree, state: AdaptDampingState, batch: Any, generator: torch.Generator | None = None
    ) -> tuple[PyTree, AdaptDampingState, AutoInfo]:
        draws = _seeded(state, params) if generator is None else generator
        with steady.step(_tree.leaves(params)):
            value, grads, stats = run(params, batch, generator=draws)
            total = value.to(torch.float64) + model.penalty(params)
            updates, state = tx.update(grads, state, params, stats=stats, batch=batch, value=total)
        return apply_updates(params, updates), state, _info(state, total)

    return Auto(tx.init, step)


def _seeded(state: AdaptDampingState, params: PyTree) -> torch.Generator:
    if not readable(state.step):
        raise StateError(
            explain(
                "kfac_auto cannot seed its draws from the count under vmap or torch.compile.",
                options="pass generator=; or write the chain of kfac_auto with estimators that take noise=",
            )
        )
    return torch.Generator(_tree.leaves(params)[0].device).manual_seed(int(state.step))


def _info(state: AdaptDampingState, loss: Tensor) -> AutoInfo:
    (model,) = _tree.nodes(state, QuadraticModelState)
    (found,) = inside(state)
    damping = found.damping
    assert isinstance(damping, Tensor)
    return AutoInfo(loss, model.learning_rate, model.momentum, damping, state.ratio)
