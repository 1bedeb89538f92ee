"""Patterns of names, as in `fnmatch` ("*" and "**" both match any part of a dotted path)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from kfac_func._errors import HyperparameterError, explain


def first_match(patterns: Iterable[str], name: str, user: str) -> str:
    """The first pattern that matches the name of a block. Raises HyperparameterError, in the name of `user`.

    >>> first_match(["head.*", "**"], "body.weight", "damping")
    '**'
    """
    for pattern in patterns:
        if fnmatchcase(name, pattern):
            return pattern
    raise HyperparameterError(
        explain(
            f"no rule of {user} matches block {name!r}.",
            got=", ".join(map(repr, patterns)),
            options="add a last rule '**'",
        )
    )


def useful(patterns: Iterable[str], names: Iterable[str], user: str) -> None:
    """Raise HyperparameterError, in the name of `user`, for a pattern that matches none of the names; "**" may.

    >>> useful(["head.*", "**"], ["head.weight"], "damping")
    """
    for pattern in patterns:
        if pattern.strip("*") and not any(fnmatchcase(name, pattern) for name in names):
            raise HyperparameterError(
                explain(
                    f"the pattern {pattern!r} of {user} matches nothing.",
                    got=", ".join(map(repr, list(names)[:20])),
                    options="mend the pattern: leaves are named by their dotted path, blocks by that of their weight",
                )
            )


def chosen(patterns: Sequence[str] | None, names: Iterable[str], user: str) -> list[str]:
    """The names that a pattern matches, all of them for None. Raises HyperparameterError for a pattern without a name.

    >>> chosen(["head.*"], ["body.weight", "head.weight"], "only")
    ['head.weight']
    """
    names = list(names)
    if patterns is None:
        return names
    useful(patterns, names, user)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
