"""The settings that `kfac` and all recipes share, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, get_args

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func._typing import ScalarOrSchedule
from kfac_func.curvature import Curvature, Structure, blockwise
from kfac_func.damping import Split
from kfac_func.precondition.transform import Damping, preconditioner
from kfac_func.state import Average, Options
from kfac_func.transforms import GradientTransformation
from kfac_func.transforms.base import check_scalar
from kfac_func.transforms.masks import Mask


class Periods(TypedDict, total=False):
    """The settings of `kfac` that every recipe takes."""

    damping: Damping
    decay: ScalarOrSchedule
    average: Average
    burn_in: int
    refresh_every: int
    scale_every: int
    growing: bool
    stagger: bool
    l2: float
    l2_mask: Mask | None


class Settings(Periods, total=False):
    """Those of recipes whose damping can be factored."""

    split: Split


def link(
    curvature: Structure | Curvature,
    *,
    damping: Damping = 1e-3,
    split: Split = "pi",
    decay: ScalarOrSchedule = 0.95,
    average: Average = "debiased",
    burn_in: int = 0,
    refresh_every: int = 10,
    scale_every: int = 1,
    growing: bool = True,
    stagger: bool = False,
    l2: float = 0.0,
    l2_mask: Mask | None = None,
) -> GradientTransformation:
    """Check the settings and make the link of the chain. Raises HyperparameterError; see `kf.kfac`."""
    _check_damping(damping)
    for name, value, choices in (("split", split, get_args(Split)), ("average", average, get_args(Average))):
        if value not in choices:
            raise HyperparameterError(
                explain(f"unknown {name}.", got=repr(value), wanted=" or ".join(map(repr, choices)))
            )
    check_scalar("decay", decay, "[0, 1)", schedule=True)
    if not (isinstance(l2, (int, float)) and 0 <= l2 < float("inf")):
        raise HyperparameterError(explain("l2 must be a number, finite and not negative.", got=repr(l2)))
    at_least(1, refresh_every=refresh_every, scale_every=scale_every)
    at_least(0, burn_in=burn_in)
    tree = blockwise(curvature) if isinstance(curvature, Structure) else curvature
    _check_periods(tree, stagger, scale_every)
    patterns = tuple(damping) if isinstance(damping, Mapping) else ()
    values = damping.values() if isinstance(damping, Mapping) else (damping,)
    driven = any(not isinstance(value, (int, float)) for value in values)
    periods = (refresh_every, scale_every, growing, stagger, burn_in)
    fixed = decay if isinstance(decay, (int, float)) else None
    options = Options(split, fixed, average, *periods, float(l2), patterns, driven)
    return preconditioner(tree, damping, decay, options, l2_mask)


def _check_damping(damping: Any) -> None:
    if isinstance(damping, Mapping) and not damping:
        raise HyperparameterError(explain("damping got no rules.", options="damping={'head.*': 1e-2, '**': 1e-3}"))
    for value in damping.values() if isinstance(damping, Mapping) else (damping,):
        if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
            raise HyperparameterError(explain("damping must be finite and not negative.", got=value))


def _check_periods(curvature: Curvature, stagger: bool, scale_every: int) -> None:
    if stagger and curvature.costs is None:
        raise HyperparameterError(
            explain(
                f"{curvature.name} cannot be refreshed some blocks at a time.",
                why="its blocks are inverted together",
                options="stagger=False; or a curvature made by blockwise() or by_path()",
            )
        )
    if scale_every != 1 and not curvature.scales:
        raise HyperparameterError(
            explain(
                f"{curvature.name} has no scalings, so that scale_every has no meaning.",
                got=f"scale_every={scale_every}",
                options="leave it out; or use eigen()",
            )
        )
