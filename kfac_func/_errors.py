"""Every error class of the library, and the one way their messages are laid out.

A message names what was wrong (with its tree path), then one line each for what was got, what was wanted,
why, and the ways out:

    parameter 'decoder.weight' is used where K-FAC cannot see it.
      got      mul(parameter, ...)
      options  mask the output instead; or unclaimed={"decoder.weight": "diagonal"}
"""

from __future__ import annotations

import sys
import warnings


def explain(what: str, **lines: object) -> str:
    """Lay out an error message: a sentence, then one aligned line per keyword that is not None.

    >>> print(explain("damping must not be negative.", got=-1, why=None, options="pass 0 or more"))
    damping must not be negative.
      got      -1
      options  pass 0 or more
    """
    shown = {name: text for name, text in lines.items() if text is not None}
    width = max([0, *map(len, shown)]) + 2
    return "\n".join([what, *(f"  {name:<{width}}{text}" for name, text in shown.items())])


class KFacError(Exception):
    """Base class of every error that this library raises on purpose."""


class HyperparameterError(KFacError, ValueError):
    """An option has a value that has no meaning (a negative damping, an unknown reduction, ...)."""


class KeywordError(HyperparameterError, TypeError):
    """A keyword that nothing takes, such as a misspelt one."""


class TreeMismatchError(KFacError, ValueError):
    """Two trees that must have the same structure or leaf shapes do not."""


class TargetError(KFacError, ValueError):
    """Outputs and targets do not fit each other, or cannot be honoured exactly by the loss."""


class BatchError(KFacError, ValueError):
    """A batch is empty, or its outputs do not keep the examples in the first dimension."""


class CaptureError(KFacError, ValueError):
    """The model, or one use of a parameter in it, cannot be captured exactly."""


class UncapturedParameterError(CaptureError):
    """A parameter is used where no layer kind can see it, and no policy was chosen for it."""


class PlanMismatchError(CaptureError):
    """The model did something else than its plan says (data-dependent control flow, a stale plan)."""


class StateError(KFacError, RuntimeError):
    """An optimiser state cannot be used the way it was asked to be."""


class MissingPackageError(KFacError, ImportError):
    """An optional package that a function needs is not installed."""


class KFacWarning(UserWarning):
    """Something that is allowed and hardly meant; said once."""


def warn(message: str) -> None:
    """Warn whoever called the library.

    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     warn("three batches were rejected in a row.")
    >>> told[0].category.__name__
    'KFacWarning'
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __name__.split(".")[0]:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, KFacWarning, stacklevel=level)


def at_least(low: int, **options: int | None) -> None:
    """Raise HyperparameterError for an option below `low`; None passes.

    >>> at_least(1, rank=2, radius=None)
    """
    for name, value in options.items():
        if value is not None and value < low:
            raise HyperparameterError(explain(f"{name} must be at least {low}.", got=value))
