"""The run-time type checker of the test suite, used by `make test` through jaxtyping's import hook.

The hook decorates every function when it is defined, and a closure is defined each time its factory runs: nearly all of
the time of the tests would go into making checkers. So closures share the checker of their definition.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""beartype with the numeric tower: an int is a float, as for static type checkers."""

_jaxtyped = jaxtyping.jaxtyped
_shared: dict[Hashable, Callable] = {}


def install(package: str) -> AbstractContextManager:
    """jaxtyping's import hook for a package, with closures that share checkers; a context that takes it away again."""
    jaxtyping.jaxtyped = jaxtyped  # the hook writes `@jaxtyping.jaxtyped(typechecker=...)` over every definition
    return jaxtyping.install_import_hook(package, "tests.typechecking.check")


def jaxtyped(fn: Any = None, *, typechecker: Callable) -> Any:
    """`jaxtyping.jaxtyped`, in constant time for a closure that was defined before with the same annotations."""
    if fn is None:
        return partial(jaxtyped, typechecker=typechecker)
    if not isinstance(fn, FunctionType) or "<locals>" not in fn.__qualname__:
        return _jaxtyped(fn, typechecker=typechecker)
    key = _definition(fn), typechecker
    if key not in _shared:
        _shared[key] = _jaxtyped(_anyone(fn), typechecker=typechecker)
    shared = _shared[key]

    @wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return shared(*args, _closure=fn, **kwargs)

    return checked


def _definition(fn: FunctionType) -> Hashable:
    """What decides about the checks. Annotations and defaults count as objects; the shared checker keeps them alive."""
    hints = tuple((name, id(hint)) for name, hint in fn.__annotations__.items())
    defaults = (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values())
    return fn.__code__, id(fn.__globals__), hints, tuple(map(id, defaults))


def _anyone(fn: FunctionType) -> FunctionType:
    """A function of the signature of `fn`, in the module of `fn`, that calls the closure it is given."""
    anyone = FunctionType(_call.__code__, fn.__globals__, fn.__name__)
    anyone.__module__, anyone.__qualname__ = fn.__module__, fn.__qualname__
    signature = inspect.signature(fn)
    parameters = list(signature.parameters.values())
    last = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    parameters.insert(last, inspect.Parameter("_closure", inspect.Parameter.KEYWORD_ONLY))
    anyone.__signature__ = signature.replace(parameters=parameters)
    return anyone


def _call(*args: Any, _closure: Callable, **kwargs: Any) -> Any:
    __tracebackhide__ = True
    return _closure(*args, **kwargs)
