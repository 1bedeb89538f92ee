r"""Schedules: pure functions from the number of finished steps to a value.

A schedule takes a Python int or a 0-dim integer tensor and returns a 0-dim tensor: on the CPU and float64, unless its
parameters are tensors elsewhere or of another kind. There is no branching on the count, so schedules work under
torch.func.vmap, torch.func.grad (with respect to parameters given as tensors) and torch.compile. Parameters that are
tensors are never checked, as that would have to read them. The first update sees the count 0. A boundary b belongs to
what comes after it: the value changes at count = b, that is after b steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import Scalar, Schedule
from kfac_func.transforms.base import check_scalar


def _number(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


def _count(count: Any) -> Tensor:
    return count if isinstance(count, Tensor) else torch.tensor(count, dtype=torch.int64, device="cpu")


def _select(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Choose without reading the condition, which may be on the CPU while a value is not."""
    device = no.device if yes.device.type == "cpu" else yes.device
    return torch.where(condition.to(device, non_blocking=True), yes, no)


def _progress(count: Any, steps: int) -> Tensor:
    """The finished fraction of `steps`, between 0 and 1."""
    return _count(count).clamp(0, steps).to(torch.float64) / steps


def constant(value: Scalar) -> Schedule:
    r"""The same value always:  s(t) = c.     Raises HyperparameterError when c is not finite.

    >>> constant(0.5)(10).item()
    0.5
    """
    check_scalar("value", value, "(-inf, inf)")

    def schedule(count: Any) -> Tensor:
        del count
        return _number(value)

    return schedule


def exponential_decay(
    init: Scalar,
    decay_rate: Scalar,
    transition_steps: int = 1,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    r"""A constant factor per period:  s(t) = s₀ r^(t/T),  with `staircase`:  s(t) = s₀ r^⌊t/T⌋.

    Symbols: s₀ = `init`; r > 0 = `decay_rate`; T ≥ 1 = `transition_steps`. s(T) = s₀ r; the stairs are stepped at
    t = T, 2T, ... `end_value` bounds s from below when r < 1 and from above otherwise.
    Raises HyperparameterError for Python numbers outside these.     Source: optax.exponential_decay.

    >>> schedule = exponential_decay(1.0, 0.5, transition_steps=10, staircase=True)
    >>> [schedule(t).item() for t in (0, 9, 10, 20)]
    [1.0, 1.0, 0.5, 0.25]
    """
    check_scalar("init", init, "(-inf, inf)")
    check_scalar("decay_rate", decay_rate, "(0, inf)")
    _check_steps("transition_steps", transition_steps)
    if end_value is not None:
        check_scalar("end_value", end_value, "(-inf, inf)")

    def schedule(count: Any) -> Tensor:
        periods = _count(count).to(torch.float64) / transition_steps
        rate = _number(decay_rate)
        value = init * rate ** (periods.floor() if staircase else periods)
        if end_value is None:
            return value
        end = _number(end_value)
        return _select(rate < 1, torch.maximum(value, end), torch.minimum(value, end))

    return schedule


def cosine_decay(init: Scalar, decay_steps: int, alpha: Scalar = 0.0) -> Schedule:
    r"""Half a cosine down to a fraction of the start:  s(t) = s₀ ( (1-α) ½ (1 + cos(π min(t, T)/T)) + α ).

    Symbols: s₀ = `init`; T ≥ 1 = `decay_steps`; α in [0, 1]. s(0) = s₀, s(t) = α s₀ from t = T on.
    Raises HyperparameterError for Python numbers outside these.     Source: Loshchilov & Hutter 2017, eq. 5.

    >>> schedule = cosine_decay(1.0, 10, alpha=0.5)
    >>> [round(schedule(t).item(), 6) for t in (0, 5, 10, 99)]
    [1.0, 0.75, 0.5, 0.5]
    """
    check_scalar("init", init, "(-inf, inf)")
    check_scalar("alpha", alpha, "[0, 1]")
    _check_steps("decay_steps", decay_steps)

    def schedule(count: Any) -> Tensor:
        cosine = 0.5 * (1 + torch.cos(math.pi * _progress(count, decay_steps)))
        return init * ((1 - alpha) * cosine + alpha)

    return schedule


def linear_warmup(init: Scalar, peak: Scalar, warmup_steps: int) -> Schedule:
    r"""A straight line, then constant:  s(t) = s₀ (1 - f) + s₁ f,  f = min(t, T)/T.

    Symbols: s₀ = `init`; s₁ = `peak` (it may be below s₀: then the line falls); T ≥ 1 = `warmup_steps`. s(0) = s₀
    exactly and s(t) = s₁ exactly from t = T on, so `init=0` makes the first step a step of length zero.
    Raises HyperparameterError for Python numbers outside these.     Source: optax.linear_schedule.

    >>> schedule = linear_warmup(0.0, 1.0, 4)
    >>> [schedule(t).item() for t in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    check_scalar("init", init, "(-inf, inf)")
    check_scalar("peak", peak, "(-inf, inf)")
    _check_steps("warmup_steps", warmup_steps)

    def schedule(count: Any) -> Tensor:
        fraction = _progress(count, warmup_steps)
        return init * (1 - fraction) + peak * fraction

    return schedule


def multistep(init: Scalar, boundaries_and_factors: Mapping[int, Scalar]) -> Schedule:
    r"""Steps at given counts:  s(t) = s₀ Π_{b ≤ t} f_b.

    Symbols: s₀ = `init`; {b: f_b} = `boundaries_and_factors`, b ≥ 1. At t = b the factor is already in.
    Raises HyperparameterError for a value that is not finite or a boundary below 1.
    Source: torch.optim.lr_scheduler.MultiStepLR, with one factor per boundary.

    >>> schedule = multistep(1.0, {10: 0.5, 20: 0.25})
    >>> [schedule(t).item() for t in (9, 10, 20)]
    [1.0, 0.5, 0.125]
    """
    check_scalar("init", init, "(-inf, inf)")
    for boundary, factor in boundaries_and_factors.items():
        _check_steps("a boundary", boundary)
        check_scalar(f"the factor at {boundary}", factor, "(-inf, inf)")
    factors = dict(boundaries_and_factors)

    def schedule(count: Any) -> Tensor:
        value, count = _number(init), _count(count)
        for boundary, factor in factors.items():
            value = value * _select(count >= boundary, _number(factor), _number(1.0))
        return value

    return schedule


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    r"""One schedule after the other, each with its own clock:  s(t) = s_k(t - b_k)  for  b_k ≤ t < b_{k+1}.

    Symbols: s_0, s_1, ... = `schedules`; b_1 < b_2 < ... = `boundaries`, one fewer than schedules, b_0 = 0. At t = b_k
    the schedule s_k is in charge, at its own count 0; no schedule ever sees a count outside the stretch that it serves.
    Raises HyperparameterError when the numbers do not match, or boundaries do not increase from 1 on.
    Source: optax.join_schedules.

    >>> schedule = join([linear_warmup(0.0, 1.0, 2), constant(0.5)], [3])
    >>> [schedule(t).item() for t in (0, 1, 2, 3, 4)]
    [0.0, 0.5, 1.0, 0.5, 0.5]
    """
    starts = [0, *boundaries]
    if len(starts) != len(schedules) or any(after <= before for before, after in itertools.pairwise(starts)):
        raise HyperparameterError(
            explain(
                "schedules and boundaries do not fit each other.",
                got=f"{len(schedules)} schedules and boundaries {list(boundaries)}",
                wanted="one boundary between every two schedules, increasing, the first at least 1",
            )
        )
    parts, lasts = tuple(schedules), [*boundaries, None]

    def schedule(count: Any) -> Tensor:
        count = _count(count)
        value = _number(0.0)
        for part, start, last in zip(parts, starts, lasts, strict=True):
            local = (count - start).clamp(0, None if last is None else last - 1 - start)
            here = _number(part(local))
            value = here if start == 0 else _select(count >= start, here, value)
        return value

    return schedule


def _check_steps(name: str, steps: Any) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise HyperparameterError(
            explain(f"{name} has a value that has no meaning.", got=repr(steps), wanted="a Python int of at least 1")
        )
