"""The checker of the suite turns red wherever jaxtyping's own would, also for closures, which share their checkers."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import jaxtyping
import pytest
import torch
from jaxtyping import TypeCheckError

from tests import typechecking

SOURCE = """
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor


def apply(w: Float[Tensor, "o i"], x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
    return x @ w.mT


class Scale(NamedTuple):
    by: float

    def times(self, x: Float[Tensor, "n i"], y: Float[Tensor, "n i"]) -> Float[Tensor, "n i"]:
        return self.by * x * y


def linear(w: Tensor, offset: Any = 0.0) -> Callable:
    def closure(x: Float[Tensor, "n i"], y: Float[Tensor, "n i"], *, power: int = 1) -> Float[Tensor, "n o"]:
        return (x * y) ** power @ w.mT + offset
    return closure


def default(value: Any) -> Callable:
    def closure(x: float = value) -> float:
        return x
    return closure


def wide(width: int) -> Callable:
    def closure(x: Float[Tensor, "{n}"], n: int = width) -> Float[Tensor, "{n}"]:
        return x
    return closure


def collect(prefix: str) -> Callable:
    def closure(*xs: int, **named: int) -> dict[str, int]:
        return {prefix + k: v for k, v in named.items()} | {prefix: sum(xs)}
    return closure


def count(stop: Any) -> Callable:
    def closure(start: int) -> Iterator[int]:
        yield from range(start, stop)
    return closure


def local(scale: Any) -> Any:
    class Local(NamedTuple):
        x: float

        def scaled(self, by: int) -> float:
            return scale * by * self.x
    return Local


def nest(depth: int) -> Callable:
    def closure(x: Float[Tensor, "n"], other: Callable) -> Float[Tensor, "m"]:
        return depth * other(torch.cat([x, x]), nest(0)) if depth else x
    return closure
"""
X = torch.ones(2, 3)
Load = Callable[..., ModuleType]


def red() -> AbstractContextManager:
    return pytest.raises(TypeCheckError)


@pytest.fixture
def load(tmp_path, monkeypatch) -> Iterator[Load]:
    """The source text, changed and imported through the hook as the tests import the library."""
    monkeypatch.setattr(jaxtyping, "jaxtyped", jaxtyping.jaxtyped)
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def load(old: str = "", new: str = "") -> ModuleType:
        assert old in SOURCE
        names.append(f"checked_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(SOURCE.replace(old, new, 1) if old else SOURCE)
        importlib.invalidate_caches()
        with typechecking.install(names[-1]):
            return importlib.import_module(names[-1])

    yield load
    for name in names:
        del sys.modules[name]


def test_functions_and_methods(load):
    module = load()
    assert module.apply(torch.ones(4, 3), X).shape == (2, 4)
    assert module.Scale(2.0).times(X, X).sum() == 12
    for f, *wrong in (
        (module.apply, torch.ones(3, 4), X),
        (module.apply, torch.ones(4, 3).int(), X),
        (module.apply, torch.ones(3), X),
        (module.Scale(2.0).times, X, X.mT),
        (module.Scale(2.0).times, X, 1.0),
    ):
        with red():
            f(*wrong)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_closure_is_checked_each_time_it_is_made(load, times):
    module = load()
    closure = [module.linear(torch.ones(4, 3)) for _ in range(times)][-1]
    assert closure(X, X).shape == (2, 4)
    for wrong in ((X, X.mT), (X, X.int()), (X[0], X[0]), (None, X)):
        with red():
            closure(*wrong)
    with red():
        closure(X, X, power=0.5)
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        closure(X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        closure(X, X, z=1)


def test_results_of_a_closure_are_checked(load):
    make = load().linear
    right, wrong, other = (make(torch.ones(4, 3), offset) for offset in (1, 1j, torch.ones(3, 1, 1)))
    for closure in (wrong, other):
        assert right(X, X).shape == (2, 4)
        with red():
            closure(X, X)


def test_closures_are_not_mixed_up(load):
    module = load()
    made = [module.linear(k * torch.ones(4, 3), offset=float(k)) for k in range(5)]
    for k in (3, 0, 4, 1, 2):
        assert made[k](X, 2 * X, power=2).unique() == 13 * k
    prefixes = [module.collect(p) for p in "abc"]
    assert [f(1, 2, x=3) for f in prefixes] == [{f"{p}x": 3, p: 3} for p in "abc"]
    assert [list(module.count(stop)(1)) for stop in (2, 3)] == [[1], [1, 2]]
    assert [module.local(float(s))(2.0).scaled(3) for s in (1, 2)] == [6, 12]


def test_every_closure_has_its_own_defaults(load):
    module = load()
    assert [module.default(value)() for value in (1, 2.0, 1.0, 2)] == [1, 2.0, 1.0, 2]
    with red():
        module.default("text")()
    for width in (2, 3):
        assert len(module.wide(width)(torch.ones(width))) == width
        with red():
            module.wide(width)(torch.ones(width + 1))


def test_keywords_generators_and_local_classes(load):
    module = load()
    for call in (
        lambda: module.collect("a")(1, x="text"),
        lambda: module.collect("a")(1.5),
        lambda: module.count(3)("one"),
        lambda: module.local(1.0)(2.0).scaled(0.5),
        lambda: module.local("text")(2).scaled(1),
    ):
        for _ in range(2):
            with red():
                call()


def test_a_closure_may_call_its_like(load):
    """The axes of the inner call are its own."""
    module = load("import Tensor", "import Tensor\nimport torch")
    assert module.nest(3)(torch.ones(2), module.nest(2)).shape == (8,)


def test_threads_share_checkers(load):
    made = [load().linear(k * torch.ones(4, 3)) for k in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda f: [int(f(X, X).unique()) for _ in range(20)], made))
    assert found == [[3 * k] * 20 for k in range(8)]


MUTANTS = {
    "function": ('x: Float[Tensor, "n i"]) ->', 'x: Float[Tensor, "i n"]) ->'),
    "result": ('-> Float[Tensor, "n o"]:\n    return x', '-> Float[Tensor, "o n"]:\n    return x'),
    "method": ('y: Float[Tensor, "n i"]) ->', 'y: Float[Tensor, "i n"]) ->'),
    "closure": ('y: Float[Tensor, "n i"], *', 'y: Float[Tensor, "i n"], *'),
    "type in a closure": ("power: int = 1", 'power: str = "1"'),
    "result of a closure": ('-> Float[Tensor, "n o"]:\n        return', '-> Float[Tensor, "o n"]:\n        return'),
    "keywords": ("**named: int", "**named: str"),
    "generator": ("start: int) -> Iterator[int]", "start: int) -> list[int]"),
    "local method": ("by: int", "by: str"),
}


@pytest.mark.parametrize("mutant", ["", *MUTANTS])
def test_mutated_annotations_turn_red(load, mutant):
    """In a second module whose code is the same, after all checkers of the first were made."""
    for module, is_red in ((load(), False), (load(*MUTANTS.get(mutant, ())), bool(mutant))):
        with red() if is_red else nullcontext():
            module.apply(torch.ones(4, 3), X)
            module.Scale(2.0).times(X, X)
            for w in torch.ones(2, 4, 3):
                module.linear(w)(X, X, power=1)
            module.collect("a")(1, x=3)
            module.count(3)(1)
            module.local(1.0)(2.0).scaled(3)


def test_annotations_that_are_objects(load):
    """Without `from __future__ import annotations` they may differ from closure to closure."""

    def make(kind: type) -> Callable:
        def closure(x):
            return x

        closure.__annotations__ = {"x": kind, "return": kind}
        return typechecking.jaxtyped(closure, typechecker=typechecking.check)

    for kind, right, wrong in ((int, 1, "1"), (str, "1", 1), (int, 2, 2.0)):
        assert make(kind)(right) == right
        with red():
            make(kind)(wrong)


def test_a_closure_looks_like_itself(load):
    closure = load().linear(torch.ones(4, 3))
    assert closure.__qualname__ == "linear.<locals>.closure"
    assert list(inspect.signature(closure).parameters) == ["x", "y", "power"]
    with pytest.raises(TypeCheckError, match=r"checking the parameters of checked_0\.linear\.<locals>\.closure"):
        closure(X, X.mT)


def test_checkers_are_made_once(load, monkeypatch):
    module, made, jaxtyped = load(), [], typechecking._jaxtyped
    monkeypatch.setattr(typechecking, "_jaxtyped", lambda fn, **kw: made.append(fn.__name__) or jaxtyped(fn, **kw))
    for k in range(5):
        module.linear(k * torch.ones(4, 3))
        module.count(k)
    assert made == ["closure", "closure"]


def test_types_alone_are_beartypes(load, monkeypatch):
    """One checker for all closures of a definition, none where nothing is annotated, and none that is switched off."""
    made: list[str] = []
    monkeypatch.setattr(
        typechecking, "check", lambda fn, check=typechecking.check: made.append(fn.__name__) or check(fn)
    )
    module = load()
    del made[:]
    closures = [module.collect(prefix) for prefix in "abc"]
    assert made == ["closure"]
    for closure in closures:
        assert closure.__qualname__ == "collect.<locals>.closure"
        with pytest.raises(TypeCheckError, match=r"checking checked_0\.collect\.<locals>\.closure"):
            closure("1")
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert module.default("text")() == "text"
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)

    def free(x, y=1):
        return x + y

    assert typechecking.jaxtyped(free, typechecker=typechecking.check) is free
