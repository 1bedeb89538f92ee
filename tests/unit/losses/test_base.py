"""What all losses refuse, and the numerical care that all of them take."""

from __future__ import annotations

import doctest
import importlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func._errors import BatchError, HyperparameterError, TargetError
from kfac_func.losses import Loss, bce_with_logits, cross_entropy, mse

LOSSES = {"cross_entropy": cross_entropy, "mse": mse, "bce_with_logits": bce_with_logits}
EVERY = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


def batch(make: Callable[..., Loss], dtype: torch.dtype = torch.float32, n: int = 3) -> tuple[Tensor, Tensor]:
    z = torch.linspace(-2, 3, 4 * n).reshape(n, 4).to(dtype)
    return z, torch.arange(n) % 4 if make is cross_entropy else (z > 0).to(dtype)


@EVERY
@pytest.mark.parametrize("reduction", ["none", "average", ""])
def test_unknown_reductions_are_refused(make: Callable[..., Loss], reduction: str) -> None:
    with pytest.raises(HyperparameterError, match=r"unknown reduction.*\n.*batchmean"):
        make(reduction=reduction)


@EVERY
@pytest.mark.parametrize(
    ("z", "error", "match"),
    [
        (torch.tensor(1.0), BatchError, "no batch dimension"),
        (torch.zeros(0, 4), BatchError, "empty"),
        (torch.zeros(3, 4, dtype=torch.long), TargetError, "floating-point"),
        (torch.zeros(3, 4, dtype=torch.complex64), TargetError, "floating-point"),
    ],
)
def test_bad_outputs_are_refused_everywhere(
    make: Callable[..., Loss], z: Tensor, error: type[Exception], match: str
) -> None:
    loss, y = make(), batch(make)[1]
    for function in (loss.value, loss.score, loss.hessian, loss.factor):
        with pytest.raises(error, match=match):
            function(z, y)
    for function in (loss.sample, loss.signs, loss.product, loss.sampled_score):
        with pytest.raises(error, match=match):
            function(z, y, z)


@EVERY
def test_shapes_of_noise_draws_and_vectors_are_checked(make: Callable[..., Loss]) -> None:
    (z, y), loss, wrong = batch(make), make(), torch.zeros(3, 5)
    names = {"sample": "noise", "signs": "noise", "product": "vector", "sampled_score": "drawn pseudo-targets"}
    for function, name in names.items():
        with pytest.raises(TargetError, match=rf"the {name} do not fit the outputs.\n.*\[3, 5\]\n"):
            getattr(loss, function)(z, y, wrong)


@EVERY
@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (torch.zeros(1, 2, dtype=torch.long), "1-D tensor of integers"),
        (torch.zeros(2), "1-D tensor of integers"),
        (torch.zeros(4, dtype=torch.bool), "nonzero"),
        (range(5), "do not exist"),
        (range(3, -2, -1), "do not exist"),
    ],
)
def test_columns_that_do_not_exist_are_refused(make: Callable[..., Loss], columns: Tensor | range, match: str) -> None:
    with pytest.raises(HyperparameterError, match=match):
        make().factor(*batch(make), columns)


@EVERY
def test_no_columns_is_a_choice(make: Callable[..., Loss]) -> None:
    z, y = batch(make)
    for none in (range(0), torch.zeros(0, dtype=torch.long)):
        assert make().factor(z, y, none).shape == (0, *z.shape)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_low_precision_keeps_the_dtype_and_the_accuracy(make: Callable[..., Loss], dtype: torch.dtype) -> None:
    z, y = batch(make, dtype)
    torch_loss = {cross_entropy: F.cross_entropy, mse: F.mse_loss, bce_with_logits: F.binary_cross_entropy_with_logits}
    loss, exact_y, tolerance = make(), y.double() if y.is_floating_point() else y, 2 * torch.finfo(dtype).eps
    assert torch.equal(loss.value(z, y), torch_loss[make](z, y))
    for name in ("score", "factor", "hessian"):
        ours, exact = getattr(loss, name)(z, y), getattr(loss, name)(z.double(), exact_y)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    noise = torch.full(loss.noise_shape(z), 0.7)
    drawn = loss.sample(z, y, noise)
    assert drawn.is_floating_point() != (make is cross_entropy)
    for vectors in (loss.sampled_score(z, y, drawn), loss.signs(z, y, z), loss.product(z, y, z)):
        assert vectors.dtype == dtype
        assert vectors.isfinite().all()


@EVERY
def test_a_large_half_precision_batch_neither_under_nor_overflows(make: Callable[..., Loss]) -> None:
    z, y = batch(make, torch.float16, n=70_000)
    exact = make().score(z.double(), y.double() if y.is_floating_point() else y)
    torch.testing.assert_close(make().score(z, y).double(), exact, rtol=1e-3, atol=1e-6)


@EVERY
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_saturated_outputs_stay_finite(make: Callable[..., Loss]) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, 1e4, -1e4, -1e4]], dtype=torch.float64)
    y = torch.tensor([1, 1]) if make is cross_entropy else (z > 0).double()
    loss = make()
    factor, dense = loss.factor(z, y), loss.hessian(z, y)
    torch.testing.assert_close(torch.einsum("kni,knj->nij", factor, factor), dense, rtol=1e-12, atol=1e-12)
    slope = torch.func.jvp(lambda x: loss.factor(x, y), (z,), (torch.ones_like(z),))[1]
    for vectors in (factor, dense, slope, loss.score(z, y), loss.signs(z, y, z)):
        assert vectors.isfinite().all()
    for noise in (0.0, 1 - 2**-24):
        drawn = loss.sample(z, y, torch.full(loss.noise_shape(z), noise))
        assert drawn.double().isfinite().all()
        assert loss.sampled_score(z, y, drawn).isfinite().all()


@EVERY
def test_duplicating_or_permuting_examples_changes_nothing_else(make: Callable[..., Loss]) -> None:
    z, y = batch(make, torch.float64)
    loss, order = make(), torch.tensor([2, 0, 1, 1, 2, 0])
    for name in ("score", "hessian"):
        torch.testing.assert_close(getattr(loss, name)(z[order], y[order]), getattr(loss, name)(z, y)[order])


@EVERY
def test_noise_one_half_is_a_sign(make: Callable[..., Loss]) -> None:
    z, y = batch(make)
    loss, half = make(), torch.full_like(z, 0.5)
    assert torch.equal(loss.signs(z, y, half), loss.signs(z, y, half + 0.1))
    assert torch.equal(loss.signs(z, y, half - 0.1), -loss.signs(z, y, half + 0.1))


@pytest.mark.parametrize("name", ["categorical", "gaussian", "bernoulli"])
def test_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"kfac_func.losses.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_number_of_columns_counts_positions_and_classes() -> None:
    for shape in [(3,), (3, 4), (2, 4, 5, 6)]:
        assert mse().columns(torch.zeros(shape)) == math.prod(shape[1:])
