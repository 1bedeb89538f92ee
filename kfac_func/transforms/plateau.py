r"""Shorten the steps when the loss stops falling."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func._tree import leaves, storable
from kfac_func._typing import PyTree, Scalar
from kfac_func.transforms.base import GradientTransformation, beside, check_scalar, scale_tree
from kfac_func.transforms.keywords import strict


class ReduceLROnPlateauState(NamedTuple):
    """The scale, the best mean value, the means without progress, the means still to ignore, and the mean of the values
    gathered so far with their number; 0-dim, on the device of the parameters.
    """

    scale: Float[Tensor, "*members"]
    best_value: Float[Tensor, "*members"]
    plateau_count: Int[Tensor, "*members"]
    cooldown_count: Int[Tensor, "*members"]
    gathered: Int[Tensor, "*members"]
    avg_value: Float[Tensor, "*members"]


storable(ReduceLROnPlateauState)


def reduce_on_plateau(
    factor: Scalar = 0.1,
    patience: int = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: Scalar = 0.0,
) -> GradientTransformation:
    r"""Scale by a number that falls when a value stops falling:  u'_t = s_t u_t,  s_0 = 1.

        every `accumulation_size` values, v̄ their mean:      progress  ⇔  v̄ < (1 - rtol) v_best - atol
        s ← max(factor · s, min_scale)   after `patience` means in a row without progress, counted anew from there

    Symbols: the value is what `update(..., value=loss)` gets, a number or a 0-dim tensor (NaN is no progress); factor
    in (0, 1); rtol in [0, 1], atol ≥ 0 in units of the value; min_scale in [0, 1]; after a cut the next `cooldown`
    means do not count. All but the counts may be 0-dim tensors.
    Raises HyperparameterError for Python numbers outside these and when `update` gets no value.
    Source: optax.contrib.reduce_on_plateau; torch.optim.lr_scheduler.ReduceLROnPlateau.

    >>> tx = reduce_on_plateau(factor=0.5, patience=2)
    >>> state = tx.init(torch.ones(2))
    >>> for loss in (1.0, 1.0, 1.0):
    ...     updates, state = tx.update(torch.ones(2), state, value=loss)
    >>> updates.tolist()
    [0.5, 0.5]
    """
    check_scalar("factor", factor, "(0, inf)")
    check_scalar("factor", factor, "[0, 1)")
    check_scalar("rtol", rtol, "[0, 1]")
    check_scalar("atol", atol, "[0, inf)")
    check_scalar("min_scale", min_scale, "[0, 1]")
    at_least(1, patience=patience, accumulation_size=accumulation_size)
    at_least(0, cooldown=cooldown)

    def init(params: PyTree) -> ReduceLROnPlateauState:
        device = next((leaf.device for leaf in leaves(params)), torch.device("cpu"))
        one = torch.ones((), dtype=torch.float64, device=device)
        none = torch.zeros((), dtype=torch.int64, device=device)
        return ReduceLROnPlateauState(one, one * float("inf"), none, none.clone(), none.clone(), 0 * one)

    def judged(state: ReduceLROnPlateauState) -> ReduceLROnPlateauState:
        slack, least, cut, low = (beside(x)(state.scale) for x in (rtol, atol, factor, min_scale))
        progress = state.avg_value < (1 - slack) * state.best_value - least
        idle = torch.where(progress, 0, state.plateau_count + 1)
        cooling = state.cooldown_count > 0
        stuck = ~cooling & (idle == patience)
        return ReduceLROnPlateauState(
            scale=torch.where(stuck, (state.scale * cut).clamp(min=low), state.scale),
            best_value=torch.where(progress, state.avg_value, state.best_value),
            plateau_count=torch.where(cooling | stuck, 0, idle),
            cooldown_count=torch.where(cooling, state.cooldown_count - 1, torch.where(stuck, cooldown, 0)),
            gathered=torch.zeros_like(state.gathered),
            avg_value=torch.zeros_like(state.avg_value),
        )

    def update(updates, state, params=None, *, value=None, **extra):
        del params, extra
        gathered = state.gathered + 1
        mean = state.avg_value + (_number(value, state.scale) - state.avg_value) / gathered
        state = state._replace(gathered=gathered, avg_value=mean)
        full = gathered == accumulation_size
        state = ReduceLROnPlateauState(*(torch.where(full, x, y) for x, y in zip(judged(state), state, strict=True)))
        return scale_tree(updates, state.scale), state

    return GradientTransformation(init, strict(update))


def _number(value: Any, like: Tensor) -> Tensor | float:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.detach().to(like, non_blocking=True)
    raise HyperparameterError(
        explain(
            "reduce_on_plateau needs the value that it watches.",
            got=f"value of shape {list(value.shape)}" if isinstance(value, Tensor) else f"value={value!r}",
            wanted="update(..., value=loss), a number or a 0-dim tensor",
        )
    )
