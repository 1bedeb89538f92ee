r"""Multiply the updates by a number: fixed, scheduled, or the learning rate with its sign."""

from __future__ import annotations

from kfac_func._typing import Scalar, ScalarOrSchedule
from kfac_func.transforms.base import (
    GradientTransformation,
    check_scalar,
    counted,
    resolve,
    scale_tree,
    stateless,
)


def scale(step_size: Scalar) -> GradientTransformation:
    r"""Scale by a fixed number:  u' = s u.

    Symbols: s a finite number or a 0-dim tensor, which gradients flow through. Stateless.
    Raises HyperparameterError when s is not finite or no scalar.     Source: optax.scale.

    >>> import torch
    >>> scale(-0.5).update(torch.tensor([1.0, 2.0]), ())[0].tolist()
    [-0.5, -1.0]
    """
    check_scalar("step_size", step_size, "(-inf, inf)")
    return stateless(lambda updates, params: scale_tree(updates, step_size))


def scale_by_schedule(step_size_fn: ScalarOrSchedule) -> GradientTransformation:
    r"""Scale by a number that depends on the step:  u'_t = s(t) u_t,  with t = 0 at the first update.

    Symbols: s a schedule (see `schedules`), called with the count as a 0-dim int64 CPU tensor; a plain number is the
    constant schedule. State: the count. Raises HyperparameterError when s is no schedule and no finite number.
       Source: optax.scale_by_schedule.

    >>> import torch
    >>> tx = scale_by_schedule(lambda count: 1.0 + count)
    >>> _, state = tx.update(torch.ones(2), tx.init(torch.ones(2)))
    >>> tx.update(torch.ones(2), state)[0].tolist()
    [2.0, 2.0]
    """
    check_scalar("step_size_fn", step_size_fn, "(-inf, inf)", schedule=True)
    return counted(lambda updates, params, count: scale_tree(updates, resolve(step_size_fn, count)))


def scale_by_learning_rate(learning_rate: ScalarOrSchedule, *, flip_sign: bool = True) -> GradientTransformation:
    r"""Turn a direction into a step of descent:  u'_t = -η_t u_t.

    Symbols: η ≥ 0 a number, a 0-dim tensor (hyper-gradients flow through it) or a schedule of the step t = 0, 1, ...
    `flip_sign=False` keeps the sign of u. State: the count for a schedule, otherwise nothing.
    Raises HyperparameterError when η is a negative or non-finite Python number.
    Source: optax.scale_by_learning_rate.

    >>> import torch
    >>> scale_by_learning_rate(0.5).update(torch.tensor([1.0, 2.0]), ())[0].tolist()
    [-0.5, -1.0]
    """
    check_scalar("learning_rate", learning_rate, "[0, inf)", schedule=True)
    sign = -1 if flip_sign else 1
    if callable(learning_rate):
        return scale_by_schedule(lambda count: sign * resolve(learning_rate, count))
    return scale(sign * learning_rate)
