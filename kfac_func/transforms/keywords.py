"""Which keywords an update takes, and that no other is swallowed: a misspelt `stats=` would leave K-FAC without any."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch

from kfac_func._errors import KeywordError, explain

Names: TypeAlias = frozenset[str] | None
"""The keywords that something takes; None: any."""

EVERYWHERE = frozenset({"params", "stats", "inplace"})  # what every transformation may be passed
_SILENT = ("inplace", "trail")
_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def named(update: Callable[..., Any], own: bool) -> Names:
    """The keywords that an update and whatever is inside of it take, as far as `strict` or its signature tell.

    own    whether its `**` means the keywords of other links, as in a GradientTransformation. The `**` of a foreign
           function takes any

    >>> sorted(named(lambda updates, state, params=None, *, value=None, **extra: None, own=True))
    ['params', 'value']
    """
    if hasattr(update, "takes"):
        return update.takes  # pyright: ignore[reportFunctionMemberAccess]
    parameters = list(inspect.signature(update).parameters.values())[2:]
    if not own and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in _NAMED)


def together(*names: Names) -> Names:
    """The keywords that one or another takes.

    >>> sorted(together(frozenset({"value"}), frozenset({"batch"}))), together(None, frozenset())
    (['batch', 'value'], None)
    """
    known = [one for one in names if one is not None]
    return frozenset().union(*known) if len(known) == len(names) else None


def strict(update: Callable[..., Any], *inside: Callable[..., Any]) -> Callable[..., Any]:
    """An update of ours that refuses a keyword which neither it nor anything inside of it names.

    inside   the updates that it hands its keywords on to

    A call that comes from a chain (it brings a `trail`) was checked there, against all links. Raises KeywordError.

    >>> def update(updates, state, params=None, *, value=1.0, **extra):
    ...     return value * updates, state
    >>> strict(update)(torch.ones(2), (), valeu=2.0)
    Traceback (most recent call last):
    ...
    kfac_func._errors.KeywordError: update got valeu=, and nothing here takes that.
      wanted   params, stats or value
      why      it would be swallowed, and what should have got it would never know
      options  value=, if that was meant; or name it in the signature of the update that takes it
    """
    if torch.compiler.is_compiling():  # what is made in a graph is inside of something that was made before
        return update
    takes = together(EVERYWHERE, *(named(one, own=True) for one in (update, *inside)))

    @functools.wraps(update)
    def checked(updates, state, params=None, **keywords):
        if takes is not None and "trail" not in keywords and not all(name in takes for name in keywords):
            raise KeywordError(_unknown(update.__name__, [name for name in keywords if name not in takes], takes))
        return update(updates, state, params, **keywords)

    checked.takes = takes  # pyright: ignore[reportAttributeAccessIssue]
    return checked


def lenient(update: Callable[..., Any], takes: Names) -> Callable[..., Any]:
    """An update that may be called with every keyword, marked with those that what is inside of it takes.

    >>> lenient(lambda updates, state, **extra: (updates, state), frozenset({"value"})).takes
    frozenset({'value'})
    """
    if not torch.compiler.is_compiling():
        update.takes = takes  # pyright: ignore[reportFunctionMemberAccess]
    return update


def _unknown(update: str, unknown: list[str], takes: frozenset[str]) -> str:
    *most, last = sorted(takes.difference(_SILENT))
    near = dict.fromkeys(f"{match}=" for name in unknown for match in get_close_matches(name, [*most, last], n=1))
    meant = f"{' and '.join(near)}, if that was meant; or " if near else ""
    return explain(
        f"{update} got {', '.join(f'{name}=' for name in unknown)}, and nothing here takes that.",
        wanted=f"{', '.join(most)} or {last}",
        why="it would be swallowed, and what should have got it would never know",
        options=meant + "name it in the signature of the update that takes it",
    )
