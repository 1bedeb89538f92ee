"""Cases of `test_errors`, a module per room: every module here has a table `CASES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A call that fails, its error, what the message names, and the way out (or what is wanted) that it shows."""

    call: Callable[[], Any]
    error: type[Exception]
    names: str
    offers: str


def wrong(value: Any) -> Any:
    """A value that type checkers would not let pass."""
    return value
