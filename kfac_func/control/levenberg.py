"""How well the quadratic model foretold the loss decides about damping: Levenberg-Marquardt as a pure rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func.transforms.base import check_scalar


class LevenbergMarquardt(NamedTuple):
    """The settings of `levenberg_marquardt`."""

    interval: int
    decay: float
    low: float
    high: float
    min: float
    max: float
    damping_in_model: bool

    def __call__(self, damping: Tensor, ratio: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        """The damping after the reduction ratio ρ: λω above `high`, λ/ω below `low` and for NaN, within the bounds."""
        power = self.decay**self.interval
        new = torch.where(ratio > self.high, damping * power, torch.where(ratio >= self.low, damping, damping / power))
        return torch.minimum(torch.maximum(new, self._bound(self.min, unit, new)), self._bound(self.max, unit, new))

    @staticmethod
    def _bound(value: float, unit: Tensor | float, like: Tensor) -> Tensor:
        return torch.as_tensor(value * unit, dtype=like.dtype, device=like.device)


def levenberg_marquardt(
    interval: int = 5,
    decay: float = 0.95,
    *,
    low: float = 0.25,
    high: float = 0.75,
    min: float = 1e-8,
    max: float = float("inf"),
    damping_in_model: bool = False,
) -> LevenbergMarquardt:
    r"""The Levenberg-Marquardt rule for the damping λ of a step δ:

        ρ = (h(θ+δ) − h(θ)) / (M(δ) − M(0)),      ω = decay^interval
        ρ > high: λ ω        low ≤ ρ ≤ high: λ        ρ < low or NaN: λ / ω        then clipped to [min, max]

    interval           k ≥ 1: ρ is measured at every k-th step, on the batch of that step, before and after
    decay              in (0, 1): λ moves by this factor per step
    low, high          ¼ and ¾
    min, max           of λ, in units of the curvature; in units of c where `adapt_damping` calibrates
    damping_in_model   whether M has the term ½ δᵀΛδ

    A rule is a function (λ, ρ) -> λ. Raises HyperparameterError for values without meaning or that contradict each
    other. Source: Martens & Grosse 2015 (1503.05671), §6.5.

        >>> rule = kf.levenberg_marquardt(interval=5, decay=0.9)
        >>> [round(rule(torch.tensor(0.1), torch.tensor(ratio)).item(), 5) for ratio in (0.9, 0.5, 0.1, float("nan"))]
        [0.05905, 0.1, 0.16935, 0.16935]
    """
    at_least(1, interval=interval)
    if not 0 < decay < 1:
        raise HyperparameterError(explain("decay must be in (0, 1): it is the factor of the damping.", got=decay))
    for name, value in (("low", low), ("high", high)):
        check_scalar(name, value, "(-inf, inf)")
    check_scalar("min", min, "[0, inf)")
    check_scalar("max", max, "(0, inf]")
    for below, above, small, large in (("low", "high", low, high), ("min", "max", min, max)):
        if small > large:
            raise HyperparameterError(
                explain(f"{below} and {above} contradict each other.", got=f"{below}={small}, {above}={large}")
            )
    return LevenbergMarquardt(interval, decay, low, high, min, max, damping_in_model)
