"""A regime at work: its statistics beside the brute force, and the one way in which the two are compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func.blocks import Block
from kfac_func.capture import make_plan
from kfac_func.estimators import exact, value_grad_and_stats
from kfac_func.testing.dense import LIMIT
from kfac_func.testing.problem import Problem, opened, pulled
from kfac_func.testing.regimes import Regime


class Setting(NamedTuple):
    """blocks: the statistics of the regime's batch with exact output vectors; problem: the model as a function of one
    vector; name: of the regime, for messages.
    """

    regime: Regime
    name: str
    problem: Problem
    blocks: dict[str, Block]
    tolerance: float


def set_up(regime: Regime, name: str, tolerance: float) -> Setting:
    """Take the statistics. Raises HyperparameterError when a use is shared by all examples."""
    inputs, _ = regime.batch
    plan = make_plan(regime.fn, regime.params, inputs)
    if plan.shared:
        raise HyperparameterError(
            explain(
                f"{name} has a use that all examples share.",
                why="its statistics are random estimates, which are equal to nothing",
                options="give the shared use the batch dimension (expand its input)",
            )
        )
    step = value_grad_and_stats(regime.fn, regime.loss, estimator=exact(), sharing=regime.sharing)
    _, _, stats = step(regime.params, regime.batch, plan=plan)
    assert stats is not None
    problem = opened(regime.fn, regime.loss, regime.params, regime.batch, True, LIMIT)
    return Setting(regime, name, problem, stats.blocks(), tolerance)


def example_gradients(setting: Setting, vectors: Tensor) -> Tensor:
    """J_nᵀ c_{v,n} for output vectors c [V, N, *out], [V, N, P]: differentiation of the whole model."""
    return torch.stack([pulled(setting.problem, n, vectors[:, n]) for n in range(vectors.shape[1])], dim=1)


def compare(setting: Setting, who: str, checked: str, got: Tensor, wanted: Tensor) -> None:
    """Raise AssertionError unless two tensors are equal up to the tolerance, relative to the largest entry."""
    scale = float(wanted.abs().max())

    def message(_: str) -> str:
        found = _difference(got, wanted, scale) if got.shape == wanted.shape else _shapes(got, wanted)
        claim = setting.regime.claim or None
        return explain(f"{who} in {setting.name}.", checked=checked, **found, allowed=setting.tolerance, claim=claim)

    torch.testing.assert_close(
        got, wanted, rtol=0, atol=setting.tolerance * scale, check_dtype=False, check_device=False, msg=message
    )


def _shapes(got: Tensor, wanted: Tensor) -> dict[str, str]:
    return {"got": f"shape {list(got.shape)}", "wanted": f"shape {list(wanted.shape)}"}


def _difference(got: Tensor, wanted: Tensor, scale: float) -> dict[str, str]:
    """The largest difference and its place; a NaN counts as the largest."""
    difference = (got - wanted).abs()
    worst = difference.nan_to_num(nan=torch.inf).argmax()
    place = tuple(int(k) for k in torch.unravel_index(worst, difference.shape))
    return {
        "got": f"{float(got[place]):.6g} at {list(place)}",
        "wanted": f"{float(wanted[place]):.6g}",
        "difference": f"{float(difference[place]) / (scale or 1.0):.2g} of the largest entry, {scale:.3g}",
    }
