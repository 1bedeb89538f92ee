"""Cases of `test_errors` for plans, batches and the examples in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

import kfac_func as kf
from kfac_func import errors
from kfac_func._tracing import level
from tests.error_cases import Case

X, Y, W = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 3), torch.eye(3) + 0.1
P, MSE = {"w": W}, kf.losses.mse()
BATCH, CAPTURE, HYPER = errors.BatchError, errors.CaptureError, errors.HyperparameterError
UNSEEN, PLAN = errors.UncapturedParameterError, errors.PlanMismatchError


def linear(p: dict, x: Tensor) -> Tensor:
    return F.linear(x, p["w"])


def plan(fn: Callable = linear, params: Any = P, x: Any = X, **options: Any) -> Callable[[], Any]:
    return lambda: kf.make_plan(fn, params, x, **options)


def step(fn: Callable, batch: Any, known: Any = None) -> Callable[[], Any]:
    run = kf.value_grad_and_stats(fn, MSE, estimator=kf.estimators.exact())
    return lambda: run(P, batch, plan=None if known is None else kf.make_plan(fn, P, known))


def shorter(p: dict, x: Tensor) -> Tensor:
    """Fewer outputs than examples, where there are many."""
    return linear(p, x)[:3]


class Counting(nn.Linear):
    """A buffer that is written, in place or not."""

    seen: Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__(3, 2)
        self.in_place = in_place
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        if self.in_place:
            self.seen.add_(len(input))
        else:
            self.seen = self.seen + len(input)
        return super().forward(input)


def taped(leaf: Tensor) -> bool:
    """Whether a claimed parameter is seen from inside a step: a transform is around that does not differentiate it."""
    return level() > 0 and not is_functorch_wrapped_tensor(leaf)


def unwatched(p: dict, x: Tensor) -> Tensor:
    if taped(p["w"]):
        raise RuntimeError("not when somebody watches")
    return linear(p, x)


def doubled(p: dict, x: Tensor) -> Tensor:
    return F.linear(x, p["v"]) + (2 if taped(p["v"]) else 1) * x * p["w"].sum()


def compiling() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        kf.make_plan(linear, P, X)


def mixing() -> Any:
    def fn(p: dict, x: Tensor) -> Tensor:
        h = linear(p, x)
        return h - h.mean(0).tanh()

    _, grads, stats = kf.value_grad_and_stats(fn, MSE)(P, (X, Y), generator=torch.Generator().manual_seed(0))
    tx = kf.kfac(kf.curvature.diagonal())
    return tx.update(grads, tx.init(P), P, stats=stats)


def frozen() -> Any:
    return kf.make_functional(nn.Linear(3, 2).requires_grad_(False))


def written(module: nn.Module) -> Callable[[], Any]:
    fn, params = kf.make_functional(module)
    return lambda: fn(params, X)


CASES = {
    "complex parameter": Case(plan(params={"w": W + 0j}), CAPTURE, "'w'", "view_as_real"),
    "integer parameter": Case(plan(params={"w": W, "n": torch.ones(2).long()}), CAPTURE, "'n'", "constant"),
    "number among the parameters": Case(plan(params={"w": W, "eps": 1e-5}), CAPTURE, "'eps'", "constant"),
    "inputs in another precision": Case(plan(x=X.double()), BATCH, "torch.float64", "inputs.to(torch.float32)"),
    "batch as a dict": Case(step(linear, {"x": X, "labels": Y}), BATCH, "'labels'", "batch['labels']"),
    "outputs as a dict": Case(plan(lambda p, x: {"z": linear(p, x)}), BATCH, "dict with 'z'", "output='z'"),
    "no such output": Case(
        plan(kf.batched(lambda p, x: {"z": linear(p, x)}, output="logits")), BATCH, "'logits'", "output="
    ),
    "whole and shared": Case(lambda: kf.batched(linear, whole=True, shared="x"), HYPER, "whole=True", "alone"),
    "inputs that disagree": Case(
        plan(kf.batched(lambda p, x: x[0] @ p["w"] + x[1].sum(), in_dims=(0, 0)), x=(X, X[:3])),
        BATCH, "'0': 4, '1': 3", "in_dims",
    ),
    "fewer outputs": Case(step(shorter, (X, Y[:3]), X[:3]), BATCH, "[3, 3] for 4 examples", "return [N,"),
    "other inputs": Case(step(linear, ((X, X), Y), X), PLAN, "2 inputs", "a new plan"),
    "parameters written": Case(plan(lambda p, x: linear({"w": p["w"].mul_(1)}, x)), CAPTURE, "'w'", "w.clone()"),
    "in_dims of another tree": Case(
        plan(kf.batched(linear, in_dims=(0, 1))), errors.TreeMismatchError, "2 leaves", "same containers"
    ),
    "under torch.compile": Case(compiling, CAPTURE, "torch.compile", "the first step outside"),
    "the diagonal where examples mix": Case(mixing, errors.StateError, "'w'", "kronecker()"),
    "a traced module": Case(
        lambda: kf.make_functional(cast(nn.Module, torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)))),
        CAPTURE, "TopLevelTracedModule", "the module that it was made of",
    ),
    "all parameters frozen": Case(frozen, CAPTURE, "2 parameters", "requires_grad_(True)"),
    "buffer written": Case(written(Counting(True)), CAPTURE, "'seen'", ".eval()"),
    "buffer replaced": Case(written(Counting(False)), CAPTURE, "'seen'", ".eval()"),
    "spectral norm": Case(
        written(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))), CAPTURE, "spectral norm", ".eval()"
    ),
    "vmap over parameters": Case(
        plan(lambda p, x: torch.func.vmap(lambda w: x @ w, out_dims=1)(p["w"])), UNSEEN, "'w'", "unclaimed={'w'"
    ),
    "vmap over rows": Case(
        plan(lambda p, x: torch.func.vmap(lambda row: p["w"] @ row)(x)), UNSEEN, "torch.func.vmap", "unclaimed={'w'"
    ),
    "what the tape cannot follow": Case(
        plan(unwatched), CAPTURE, "not when somebody watches", "route='loop'"
    ),
    "another gradient when watched": Case(
        plan(doubled, {"w": W, "v": W + 0}, unclaimed="diagonal"), CAPTURE, "'w'", "route='loop'"
    ),
}  # fmt: skip
