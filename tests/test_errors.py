"""Every `raise` outside losses, transformations and the demo is reached by a case here: what, where and what to do.

A case counts for the statement that its traceback ends in, so a `raise` without a case, or a case whose error comes
from somewhere else, turns the last test red.
"""

from __future__ import annotations

import ast
import io
import linecache
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree, errors
from kfac_func.blocks import Layout, pack
from tests import error_cases
from tests.error_cases import Case, wrong

pytestmark = pytest.mark.usefixtures("unchecked")

ROOM = Path(kf.__file__).parent
ELSEWHERE = ("losses", "transforms", "demo", "diagnostics")  # their own tests reach their errors

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 2)
TOKENS = torch.tensor([[0, 1], [2, 2], [4, 3], [1, 0]])
W, FILTER = torch.eye(3) + 0.1, torch.ones(3, 3, 1)
FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
MSE = kf.losses.mse()


def plan(fn: Callable, params: Any = None, x: Any = X, **options: Any) -> Callable[[], Any]:
    return lambda: kf.make_plan(fn, {"w": W} if params is None else params, x, **options)


def module(m: nn.Module, x: Any = X) -> Callable[[], Any]:
    return lambda: kf.make_plan(*kf.make_functional(m), x)


def step(fn: Callable = FN, params: Any = None, x: Any = X, estimator: Any = None, **options: Any) -> Any:
    estimator = kf.estimators.exact() if estimator is None else estimator
    run = kf.value_grad_and_stats(fn, MSE, estimator=estimator)
    params = PARAMS if params is None else params
    return run(params, (x, torch.zeros_like(fn(params, x))), **options)


def drifting(one: Callable, other: Callable) -> Callable[[], Any]:
    """A model that does one thing on positive inputs, for which its plan is made, and another on negative ones."""

    def fn(p: Any, x: Tensor) -> Tensor:
        return (one if x.sum() > 0 else other)(x, p["w"])

    def call() -> None:
        params = {"w": W}
        step(fn, params, -X.abs(), plan=kf.make_plan(fn, params, X.abs()))

    return call


def observed(every: int = 10) -> tuple[Any, Any]:
    tx = kf.kfac(refresh_every=every)
    return tx, kf.observe(tx.init(PARAMS), step()[2])


def loaded() -> Any:
    file = io.BytesIO()
    torch.save(observed()[1], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def vmapped() -> None:
    tx, state = observed()
    many = state._replace(step=torch.arange(3))
    axes = state._replace(**{k: None for k in state._fields if k not in ("step", "rules")}, step=0)
    torch.func.vmap(lambda s: tx.update(PARAMS, s)[0], in_dims=(axes,))(many)


def compiling() -> None:
    tx, state = observed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        tx.update(PARAMS, state)


def other() -> Any:
    return step(*kf.make_functional(nn.Linear(3, 2, bias=False)))[2]


def written(p: Any, x: Tensor) -> Tensor:
    x = x.clone()
    y = F.linear(x, p["w"])
    x += 1
    return y + x


def nowhere(p: Any, x: Tensor) -> Tensor:
    return F.linear(torch.cat([x, torch.ones(1, 3)]), p["w"])[:-1]


def by_size(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"]) if len(x) == 2 else x @ p["w"]


def shared_norm(p: Any, x: Tensor) -> Tensor:
    return x * F.group_norm(torch.arange(6.0).reshape(1, 3, 2), 1, p["w"]).sum()


def two_forms(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"]) + torch.einsum("nd,dk->ndk", x, p["w"]).sum(-1)


def convolutions(p: Any, x: Tensor) -> Tensor:
    return (F.conv1d(x[..., None], p["w"], p["b"]) + F.conv1d(x[..., None], p["v"], p["b"])).squeeze(-1)


def nothing_observed() -> Any:
    stats = step()[2]
    silent = _tree.Static(stats.rules.value._replace(silent=True))  # as those of `stats=False, rows=True`
    return kf.observe(kf.kfac().init(PARAMS), stats._replace(rules=silent))


def mapped(*trees: Any) -> Callable[[], Any]:
    return lambda: _tree.tree_map(lambda *leaves: leaves, *trees)


TRAINING = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
BATCH_STATISTICS = nn.BatchNorm1d(3, track_running_stats=False)
WRAPPED = object.__new__(nn.parallel.DistributedDataParallel)
CONVOLUTIONS = {"w": FILTER, "v": FILTER + 0, "b": torch.ones(3)}
LINEAR: Callable = lambda x, w: F.linear(x, w)  # noqa: E731
TWICE: Callable = lambda x, w: F.linear(F.linear(x, w), w)  # noqa: E731
SCALED: Callable = lambda x, w: F.linear(x, w) * w.norm()  # noqa: E731
PRODUCT: Callable = lambda x, w: x @ w  # noqa: E731
LAYOUT = Layout("w", "linear", "w", "b", (2, 3), (0, 1), outputs=2)
HYPER, MISMATCH, CAPTURE, STATE, UNSEEN = (
    errors.HyperparameterError, errors.TreeMismatchError, errors.CaptureError, errors.StateError,
    errors.UncapturedParameterError,
)  # fmt: skip

ROOMS = {room.name: import_module(f"tests.error_cases.{room.name}") for room in iter_modules(error_cases.__path__)}
CASES = {f"{room}: {name}": case for room, module in ROOMS.items() for name, case in module.CASES.items()} | {
    "trees differ": Case(mapped({"a": 1}, {"b": 1}), MISMATCH, "'a'", "the same parameters"),
    "no such leaf": Case(lambda: _tree.replace_leaves({"a": 1}, {"b": 2}), MISMATCH, "'b'", "structure of the param"),
    "one path twice": Case(plan(FN, {"a.b": W, "a": {"b": W}}), MISMATCH, "'a.b'", "rename"),
    "another length": Case(lambda: _tree.ravel({"w": W})[1](torch.ones(3)), MISMATCH, "[3]", "wanted  [9]"),
    "a gradient is missing": Case(lambda: pack(LAYOUT, {"w": W[:2]}), MISMATCH, "'b'", "structure of the param"),
    "batch norm mixes": Case(module(BATCH_STATISTICS), CAPTURE, "'weight'", ".eval()"),
    "sparse embedding": Case(module(nn.Embedding(5, 2, sparse=True), TOKENS), CAPTURE, "'weight'", "without sparse"),
    "one tensor twice": Case(plan(FN, {"a": W, "b": W}), CAPTURE, "'a'", "clone one"),
    "no examples": Case(plan(FN, PARAMS, X[:0]), errors.BatchError, "[0, 3]", "at least one"),
    "a shared group norm": Case(plan(shared_norm, {"w": W[0]}), UNSEEN, "'w'", "unclaimed={'w': 'diagonal'}"),
    "examples nowhere": Case(plan(nowhere), UNSEEN, "'w'", "unclaimed={'w': 'diagonal'}"),
    "a bias of two": Case(plan(convolutions, CONVOLUTIONS), CAPTURE, "'b'", "a bias of its own"),
    "two forms": Case(plan(two_forms), CAPTURE, "'w'", "use two parameters"),
    "distributed": Case(lambda: kf.make_functional(WRAPPED), CAPTURE, "DistributedDataParallel", "module.module"),
    "batch norm trains": Case(module(TRAINING), CAPTURE, "'1'", ".eval()"),
    "depends on the size": Case(plan(by_size), CAPTURE, "two examples", "independent of the batch"),
    "input written": Case(plan(written), CAPTURE, "'w'", "x = x + y"),
    "unknown policy": Case(plan(FN, PARAMS, unclaimed={"w*": "skip"}), HYPER, "'w*'", "'diagonal' or 'identity'"),
    "no such path": Case(plan(FN, PARAMS, unclaimed={"x": "identity"}), CAPTURE, "'x'", "mend the path"),
    "uncaptured": Case(
        plan(lambda p, x: x * p["w"].sum()), errors.UncapturedParameterError, "'w'", "unclaimed={'w': 'diagonal'}"
    ),
    "fewer uses": Case(drifting(TWICE, LINEAR), errors.PlanMismatchError, "1 uses", "make a new plan"),
    "more uses": Case(drifting(LINEAR, TWICE), errors.PlanMismatchError, "wanted   1 uses", "make a new plan"),
    "another use": Case(drifting(LINEAR, PRODUCT), errors.PlanMismatchError, "'einsum'", "make a new plan"),
    "a use that no kind sees": Case(drifting(LINEAR, SCALED), errors.PlanMismatchError, "'w' used by", "a new plan"),
    "outputs without examples": Case(
        lambda: step(lambda p, x: F.linear(x, p["w"]).T, {"w": W}), errors.BatchError, "[4, 3]", "whole=True"
    ),
    "sharing": Case(lambda: kf.value_grad_and_stats(FN, MSE, sharing=wrong("sum")), HYPER, "'sum'", "'expand'"),
    "noise": Case(lambda: step(estimator=kf.estimators.monte_carlo(), noise=Y), HYPER, "[4, 2]", "wanted  [1, 4, 2]"),
    "no generator": Case(lambda: step(estimator=kf.estimators.monte_carlo()), HYPER, "monte_carlo", "generator="),
    "samples": Case(lambda: kf.estimators.monte_carlo(0), HYPER, "samples", "at least 1"),
    "chunk size": Case(lambda: kf.estimators.exact(-1), HYPER, "chunk_size", "at least 1"),
    "damping": Case(lambda: kf.kfac(damping=-1.0), HYPER, "damping", "not negative"),
    "infinite damping": Case(lambda: kf.kfac(damping=float("nan")), HYPER, "damping", "finite"),
    "split": Case(lambda: kf.kfac(split=wrong("half")), HYPER, "'half'", "'pi' or 'none' or 'exact'"),
    "average": Case(lambda: kf.kfac(average=wrong("ema")), HYPER, "'ema'", "'warmup' or 'constant'"),
    "burn-in": Case(lambda: kf.kfac(burn_in=-1), HYPER, "burn_in", "at least 0"),
    "no damping rules": Case(lambda: kf.kfac(damping={}), HYPER, "damping", "'**'"),
    "a damping rule": Case(lambda: kf.kfac(damping={"**": -1.0}), HYPER, "damping", "not negative"),
    "l2": Case(lambda: kf.kfac(l2=-1.0), HYPER, "l2", "not negative"),
    "stagger": Case(lambda: kf.kfac(kf.curvature.full(), stagger=True), HYPER, "full", "by_path()"),
    "no scalings": Case(lambda: kf.kfac(scale_every=2), HYPER, "scale_every", "eigen()"),
    "no micro-batches": Case(lambda: kf.observe(observed()[1], ()), STATE, "sequence", "stats=None"),
    "micro-batches of two models": Case(
        lambda: kf.observe(kf.kfac().init(PARAMS), (step()[2], other())), STATE, "other blocks", "one model"
    ),
    "refresh_every": Case(lambda: kf.kfac(refresh_every=0), HYPER, "refresh_every", "at least 1"),
    "refresh under vmap": Case(vmapped, STATE, "vmap", "refresh=True"),
    "refresh under compile": Case(compiling, STATE, "torch.compile", "refresh=True"),
    "loaded": Case(lambda: kf.precondition(loaded(), PARAMS), STATE, "loaded from a file", "call tx.update"),
    "other blocks": Case(lambda: kf.observe(observed()[1], other()), STATE, "other blocks", "one model"),
    "several states": Case(lambda: kf.precondition((observed()[1],) * 2, PARAMS), STATE, "several", "one of them"),
    "nothing observed": Case(nothing_observed, STATE, "nothing to observe", "stats=True"),
    "no state": Case(lambda: kf.describe(()), STATE, "no K-FAC state", "kfac() itself"),
    "another tree": Case(
        lambda: kf.precondition(observed()[1], {"v": W}), MISMATCH, "'v'", "wanted      'bias', 'weight'"
    ),
}  # fmt: skip


def caught(case: Case) -> tuple[Exception, tuple[str, int]]:
    """The error, and the file and line of the library where it was raised."""
    try:
        case.call()
    except Exception as error:
        frames, tb = [], error.__traceback__
        while tb is not None:
            path = Path(tb.tb_frame.f_code.co_filename)
            frames += [(str(path.relative_to(ROOM)), tb.tb_lineno)] if path.is_relative_to(ROOM) else []
            tb = tb.tb_next
        return error, frames[-1] if frames else ("", 0)
    return pytest.fail("nothing was raised")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_message_says_what_where_and_what_to_do(case):
    error, _ = caught(case)
    assert type(error) is case.error, error
    assert isinstance(error, errors.KFacError)
    what, *lines = str(error).splitlines()
    assert what.endswith(".")
    assert case.names in str(error)
    assert case.offers in str(error)
    assert all(line.startswith("  ") for line in lines if not line.startswith("parameter"))


def statements() -> dict[tuple[str, int], str]:
    """Every line of every `raise` of an error that was not there before, with the name of its statement."""
    found = {}
    for file in sorted(ROOM.rglob("*.py")):
        name = str(file.relative_to(ROOM))
        if name.split("/")[0] in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and not passed(node):
                label = f"{name}:{node.lineno}: {linecache.getline(str(file), node.lineno).strip()}"
                found |= {(name, line): label for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return found


def passed(node: ast.Raise) -> bool:
    """What only hands on the error of another, and the assertions of `kf.testing`, which have tests of their own."""
    return node.exc is None or (isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "AssertionError")


def test_every_raise_is_reached():
    where = statements()
    assert len(set(where.values())) > 30
    places = (caught(case)[1] for case in CASES.values())
    reached = {where.get(place) for place in places if place[0].split("/")[0] not in ELSEWHERE}
    assert None not in reached, "a case ends outside a raise statement"
    assert sorted(set(where.values()) - reached) == []
