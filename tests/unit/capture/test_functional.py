"""From modules to pure functions: copies, ties, buffers, inputs, and the modules that cannot be pure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func._errors import CaptureError

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.inner(x) * scale


class Special(nn.Linear):
    """A subclass, and a layer called as a function."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(super().forward(input).tanh(), self.weight.T)


@pytest.mark.parametrize(
    "inputs", [X, (X,), {"x": X}, (X, X[:, :1]), {"x": X, "scale": X[:, :1]}], ids=lambda i: type(i).__name__
)
def test_inputs_are_a_tensor_positions_or_keywords(inputs):
    module = Named()
    fn, params = kf.make_functional(module)
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    assert torch.equal(fn(params, inputs), module(*args, **kwargs))
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    _, grads, stats = step(params, (inputs, torch.zeros(4, 2)))
    torch.testing.assert_close(grads, step(params, (inputs, torch.zeros(4, 2)), stats=False)[1])
    assert stats.blocks()["inner.weight"].examples == 4


def test_parameters_are_copies_without_history():
    module = Named()
    fn, params = kf.make_functional(module)
    assert list(params) == ["inner.weight", "inner.bias"]
    for name, value in module.named_parameters():
        assert torch.equal(params[name], value)
        assert params[name].data_ptr() != value.data_ptr()
        assert not params[name].requires_grad
        assert type(params[name]) is Tensor
    wanted = fn(params, X)
    with torch.no_grad():
        module.inner.weight.zero_()
    assert torch.equal(fn(params, X), wanted)


def test_buffers_are_constants_copied_once():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    fn, params = kf.make_functional(module)
    assert set(params) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    wanted = fn(params, X)
    dict(module.named_buffers())["1.running_mean"].fill_(7.0)
    assert torch.equal(fn(params, X), wanted)


def test_tied_parameters_appear_once_and_get_the_gradient_of_all_uses():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    fn, params = kf.make_functional(module)
    assert set(params) == {"0.weight", "2.bias"}
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    _, grads, stats = step(params, (X, X))
    F.mse_loss(module(X), X).backward()
    torch.testing.assert_close(grads, {"0.weight": module[0].weight.grad, "2.bias": module[2].bias.grad})
    assert len(stats.blocks()["0.weight"].uses) == 2


def test_subclasses_and_function_calls_are_seen():
    fn, params = kf.make_functional(Special(3, 2))
    plan = kf.make_plan(fn, params, X)
    assert [block.layout.leaves for block in plan.blocks] == [("weight",), ("bias",)]
    assert [rule.transposed for _, rule in plan.blocks[0].uses] == [False, True]


def test_a_distributed_module_is_refused():
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(CaptureError, match=r"module\.module"):
        kf.make_functional(wrapped)


class Inner(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, **options))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_batch_norm_in_training_mode_is_refused_before_it_writes():
    module = Inner()
    fn, params = kf.make_functional(module)
    for call in (lambda: fn(params, X), lambda: kf.make_plan(fn, params, X)):
        with pytest.raises(CaptureError, match=r"'body\.1' is in training mode") as caught:
            call()
        assert ".eval()" in str(caught.value)
    assert module.body[1].num_batches_tracked == 0
    module.eval()
    assert fn(params, X).shape == (4, 2)


def test_batch_statistics_mix_examples_and_are_refused():
    fn, params = kf.make_functional(Inner(track_running_stats=False))
    with pytest.raises(CaptureError, match=r"'body\.1\.weight' is used by batch_norm"):
        kf.make_plan(fn, params, X)
