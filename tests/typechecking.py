"""The run-time type checker of the test suite, used by `make test` through jaxtyping's import hook.

The hook decorates every function when it is defined, and a closure is defined each time its factory runs: nearly all of
the time of the tests would go into making checkers. So closures share the checker of their definition. What has no
shapes in its annotations goes to beartype alone, which is ten times as fast as a search for axes that are not there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import config

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""beartype with the numeric tower: an int is a float, as for static type checkers."""

# beartype alone asks what a generator was given only when it is begun, and does not know P.args in a string
SHAPED = re.compile(rf"\b({'|'.join(name for name in dir(jaxtyping) if name[0].isupper())})\[|\bP\.args\b")
FUNCTION = "__beartype_func"  # beartype's own name, in a checker, for the function that it checks

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
    if not isinstance(fn, FunctionType):
        return _jaxtyped(fn, typechecker=typechecker)
    hints = (hint if isinstance(hint, str) else repr(hint) for hint in fn.__annotations__.values())
    shaped = inspect.isgeneratorfunction(fn) or any(map(SHAPED.search, hints))
    return _shaped(fn, typechecker) if shaped else _typed(fn, typechecker)


def _shaped(fn: FunctionType, typechecker: Callable) -> Callable:
    if "<locals>" not in fn.__qualname__:
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


def _typed(fn: FunctionType, typechecker: Callable) -> Callable:
    """A function whose types alone are checked, red in the words of jaxtyping, and not where that is switched off."""
    strict = _strict(fn, typechecker)
    if strict is fn:  # nothing to check
        return fn

    @wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if config.jaxtyping_disable:
            return fn(*args, **kwargs)
        try:
            return strict(*args, **kwargs)
        except BeartypeCallHintViolation as error:
            raise jaxtyping.TypeCheckError(f"checking {fn.__module__}.{fn.__qualname__}: {error}") from error

    return checked


def _strict(fn: FunctionType, typechecker: Callable) -> Callable:
    """beartype's checker of a function: for a closure that of its definition, with another function to call."""
    if "<locals>" not in fn.__qualname__:
        return typechecker(fn)
    key = _definition(fn), typechecker
    if key not in _shared:
        _shared[key] = typechecker(fn)
    shared: Any = _shared[key]
    if FUNCTION not in (shared.__kwdefaults__ or {}):  # the closure itself: it has nothing to check
        return fn
    own = FunctionType(shared.__code__, shared.__globals__, fn.__name__, shared.__defaults__, shared.__closure__)
    own.__kwdefaults__ = {**shared.__kwdefaults__, FUNCTION: fn}
    return own


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
