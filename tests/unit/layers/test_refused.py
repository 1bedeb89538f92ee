"""What layer kinds refuse: options without an exact form are errors; what no kind claims stays visible as unclaimed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kfac_func as kf
from kfac_func._errors import CaptureError, UncapturedParameterError

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[0, 1], [2, 2], [4, 3], [1, 0]])
W, B = torch.eye(3) + 0.1, torch.ones(3)

OPTIONS = {
    "max_norm": (nn.Embedding(5, 3, max_norm=1.0), TOKENS, "writes into the weight"),
    "scale_grad_by_freq": (nn.Embedding(5, 3, scale_grad_by_freq=True), TOKENS, "counts of the batch"),
    "sparse": (nn.Embedding(5, 3, sparse=True), TOKENS, "sparse tensor"),
    "training=True": (nn.BatchNorm1d(3, track_running_stats=False), X, "mix the examples"),
}


@pytest.mark.parametrize(("option", "case"), OPTIONS.items(), ids=OPTIONS)
def test_options_without_an_exact_form(option, case):
    module, x, why = case
    fn, params = kf.make_functional(module)
    with pytest.raises(CaptureError, match="'weight' is used by") as caught:
        kf.make_plan(fn, params, x)
    got, reason, options = str(caught.value).splitlines()[1:]
    assert option in got
    assert why in reason
    assert options.split()[0] == "options"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.RNN(3, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


MODULES = {
    "bilinear": (nn.Bilinear(3, 3, 2), (X, X)),
    "instance_norm": (nn.InstanceNorm1d(3, affine=True), X[..., None].expand(4, 3, 2)),
    "rnn_tanh": (Recurrent(), X[:, None]),
}


@pytest.mark.parametrize(("op", "case"), MODULES.items(), ids=MODULES)
def test_modules_that_no_kind_knows_yet(op, case):
    module, x = case
    fn, params = kf.make_functional(module)
    with pytest.raises(UncapturedParameterError, match=f"by .*{op}"):
        kf.make_plan(fn, params, x)


CALLS = {
    "einsum, implicit result": lambda p, x: torch.einsum("nd,dk", x, p["w"]).T,
    "einsum, sums over examples": lambda p, x: torch.einsum("nd,dk->k", x, p["w"]).expand(len(x), 3),
    "einsum, sums a dimension of the weight alone": lambda p, x: torch.einsum("nd,dk->nd", x, p["w"]),
    "einsum, diagonal": lambda p, x: torch.einsum("nd,dd->nd", x, p["w"]),
    "einsum, one operand": lambda p, x: x + torch.einsum("ij->j", p["w"]),
    "einsum, three operands": lambda p, x: torch.einsum("nd,dk,kj->nj", x, x.mT @ x, p["w"]),
    "einsum, broadcast": lambda p, x: torch.einsum("nd,nd->nd", x, p["w"][:1]),
    "matmul, both are parameters": lambda p, x: x * (p["w"] @ p["w"]).sum(),
    "matmul, broadcast groups": lambda p, x: (x.expand(2, *x.shape) @ p["w"].expand(2, 3, 3)).sum(0),
    "addmm, beta": lambda p, x: torch.addmm(x, x, p["w"], beta=2),
    "addmm, alpha": lambda p, x: torch.addmm(x, x, p["w"], alpha=2),
    "mul": lambda p, x: x * p["w"][0],
    "outside a layer": lambda p, x: x + p["w"].sum(),
}


@pytest.mark.parametrize("fn", CALLS.values(), ids=CALLS)
def test_calls_that_are_no_plain_contraction(fn):
    y = fn({"w": W}, X)
    with pytest.raises(UncapturedParameterError, match="'w'"):
        kf.make_plan(fn, {"w": W}, X)
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.empirical(), unclaimed="diagonal")
    batch = X, torch.zeros_like(y)
    _, grads, _ = step({"w": W}, batch, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grads, step({"w": W}, batch, stats=False)[1])


BIASES = {
    "addmm, a row": (lambda p, x: torch.addmm(p["b"], x, p["w"]), B[None]),
    "addmm, scaled": (lambda p, x: torch.addmm(p["b"], x, p["w"], beta=2), B),
}
SHIFTS = {
    "broadcast": (lambda p, x: x @ p["w"] + p["b"], B[:1]),
    "a row": (lambda p, x: x @ p["w"] + p["b"], B[None]),
    "after a view": (lambda p, x: (x @ p["w"]).unsqueeze(1) + p["b"], B),
    "after another bias": (lambda p, x: F.linear(x, p["w"], torch.ones(3)).neg() + p["b"], B),
    "subtracted": (lambda p, x: x @ p["w"] - p["b"], B),
    "scaled": (lambda p, x: torch.add(x @ p["w"], p["b"], alpha=2), B),
    "beside another use of the result": (lambda p, x: (y := x @ p["w"]).sin() * (y + p["b"]), B),
}


@pytest.mark.parametrize(("fn", "b"), BIASES.values(), ids=BIASES)
def test_biases_of_another_form_are_not_taken_for_one(fn, b):
    params = {"w": W, "b": b}
    with pytest.raises(UncapturedParameterError, match="'b'"):
        kf.make_plan(fn, params, X)


@pytest.mark.parametrize(("fn", "b"), SHIFTS.values(), ids=SHIFTS)
def test_what_is_no_bias_of_a_layer_is_a_shift(fn, b):
    params = {"w": W, "b": b}
    plan = kf.make_plan(fn, params, X)
    assert {block.layout.leaves for block in plan.blocks} == {("w",), ("b",)}
    assert plan.blocks[-1].layout.kind == "shift"
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    _, grads, _ = step(params, (X, torch.zeros_like(fn(params, X))))
    wanted = torch.func.grad(lambda p: fn(p, X).square().mean())(params)
    torch.testing.assert_close(grads, wanted)


def test_a_weight_used_without_examples_is_shared():
    def fn(p: dict, x: torch.Tensor) -> torch.Tensor:
        return x + F.linear(torch.ones(2, 3), p["w"]).sum(0)

    plan = kf.make_plan(fn, {"w": W}, X)
    assert plan.shared
    assert plan.taps[0].where is None


def test_a_convolution_shared_by_all_examples_is_exact_or_refused():
    def fn(p: dict, x: torch.Tensor) -> torch.Tensor:
        return x * F.conv1d(torch.arange(15.0).reshape(3, 5).sin(), p["k"], p["b"], groups=1).mean(-1)

    params = {"k": torch.ones(3, 3, 2), "b": B}
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    try:
        _, grads, stats = step(params, (X, X), generator=torch.Generator().manual_seed(0))
    except CaptureError as error:
        assert "'k'" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(grads, step(params, (X, X), stats=False)[1])
    assert stats.blocks()["k"].positions == 4
