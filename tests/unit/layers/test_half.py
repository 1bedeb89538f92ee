"""Half precision: gradients and per-example quantities against float64 on the same rounded numbers.

Torch itself rounds more in places (layer norm on a CPU by 80 roundings, embeddings, group norm of inputs with a mean),
so what is asked for is what the rounding of outputs and their gradients explains.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import kfac_func as kf
from kfac_func.blocks import squares

LOSS = kf.losses.mse("batchmean")
G = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=G)


def batch_norm() -> nn.Module:
    module = nn.BatchNorm2d(6).eval()
    module.running_mean, module.running_var = 3 + randn(6), 1 + randn(6).abs()
    return module


CASES = {
    "linear": (nn.Linear(20, 7), randn(32, 16, 20)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), randn(32, 4, 40)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, stride=2), randn(32, 4, 13, 13)),
    "conv3d": (nn.Conv3d(2, 3, 2), randn(8, 2, 6, 6, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), randn(32, 4, 40)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), randn(16, 4, 9, 9)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), randn(8, 2, 6, 6, 6)),
    "layer_norm": (nn.LayerNorm(12), randn(32, 32, 12)),
    "layer_norm of a mean": (nn.LayerNorm(12), 30 + randn(32, 32, 12)),
    "rms_norm": (nn.RMSNorm(12), randn(32, 32, 12)),
    "group_norm of a mean": (nn.GroupNorm(2, 6), 10 + randn(32, 6, 8, 8)),
    "batch_norm": (batch_norm(), 3 + randn(32, 6, 8, 8)),
    "embedding": (nn.Embedding(9, 5), torch.randint(9, (32, 64), generator=G)),
}


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_as_float64_on_the_same_numbers(name, dtype):
    module, x = CASES[name]
    half = copy.deepcopy(module)
    for k, leaf in enumerate(half.parameters()):
        leaf.data = 1 + 0.5 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(k))
    half, rounding = half.to(dtype), torch.finfo(dtype).eps
    (fn, params), (wide, exact) = (kf.make_functional(m) for m in (half, copy.deepcopy(half).double()))
    x = cast(x, dtype)
    y = torch.randn(fn(params, x).shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    batches = (x, y), (cast(x, torch.float64), y.double())
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.empirical())
    of_exact: Any = kf.value_grad_and_stats(wide, LOSS, estimator=kf.estimators.empirical())
    (_, grads, stats), (_, _, wanted) = step(params, batches[0]), of_exact(exact, batches[1])
    plain = torch.func.grad(lambda p: LOSS.value(wide(p, batches[1][0]), batches[1][1]))(exact)
    each = kf.products.per_example_grads(fn, LOSS)(params, batches[0])
    truth = kf.products.per_example_grads(wide, LOSS)(exact, batches[1])
    for path in plain:
        assert error(grads[path], plain[path]) < rounding
        assert error(each[path], truth[path]) < rounding / 2
    for block, of_block in stats.blocks().items():
        assert error(squares(of_block), squares(wanted.blocks()[block])) < rounding / 4


def test_normalised_inputs_keep_their_digits():
    for name in ("layer_norm", "rms_norm", "group_norm of a mean", "batch_norm"):
        module, x = CASES[name]
        fn, params = kf.make_functional(copy.deepcopy(module).bfloat16())
        x = x.bfloat16()
        step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.forward_only())
        _, grads, stats = step(params, (x, torch.zeros_like(fn(params, x))))
        assert stats.inputs[0].dtype == torch.float32
        assert {leaf.dtype for leaf in grads.values()} == {torch.bfloat16}
