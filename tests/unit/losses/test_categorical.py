"""Cross-entropy: its options, what it refuses, and the corners of its draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func._errors import BatchError, HyperparameterError, TargetError
from kfac_func.losses import cross_entropy

W = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
INDICES = torch.tensor([0, 2, 3])


def outputs(*shape: int) -> Tensor:
    return torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape).cos()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": torch.tensor([1.0, -1.0])}, "not negative"),
        ({"weight": torch.tensor([1.0, float("nan")])}, "finite"),
        ({"weight": torch.tensor([1, 1])}, "floating-point"),
        ({"weight": torch.ones(2, 2)}, "one entry per class"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 1.1}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"class_dim": 0}, "holds the examples"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(HyperparameterError, match=match):
        cross_entropy(**options)


@pytest.mark.parametrize(
    ("options", "shape", "targets", "error", "match"),
    [
        ({}, (4,), torch.tensor(1), BatchError, "no batch dimension"),
        ({}, (3, 0), INDICES, BatchError, "empty"),
        ({}, (3, 4), INDICES[:2], TargetError, r"targets \[2\] for outputs \[3, 4\]"),
        ({}, (3, 2, 4), torch.zeros(3, 2).long(), TargetError, "class_dim=-1"),
        ({"class_dim": -1}, (3, 4, 2), torch.zeros(3, 2).long(), TargetError, "class_dim=1"),
        ({"class_dim": -1}, (3, 4, 5, 6), torch.zeros(3, 4, 6).long(), TargetError, "class_dim=2"),
        ({}, (3, 4), INDICES.double(), TargetError, r"targets.long\(\)"),
        ({}, (3, 4), outputs(3, 5), TargetError, "class probabilities"),
        ({}, (3, 4), INDICES > 0, TargetError, "indices or probabilities"),
        ({}, (3, 4), INDICES + 0j, TargetError, "indices or probabilities"),
        ({"ignore_index": 1}, (3, 4), outputs(3, 4), TargetError, "ignore_index"),
        ({"weight": W}, (3, 5), INDICES, TargetError, "4 weights for 5 classes"),
        ({"class_dim": 2}, (3, 4), INDICES, TargetError, "no class dimension 2"),
        ({"class_dim": -2}, (3, 4), INDICES, TargetError, "no class dimension -2"),
        ({"class_dim": -3}, (3, 4), INDICES, TargetError, "no class dimension -3"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    options: dict[str, Any], shape: tuple[int, ...], targets: Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        cross_entropy(**options).value(outputs(*shape), targets)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ({}, {"weight": W}),
        ({"weight": W}, {"ignore_index": 2}),
        ({"weight": W}, {"label_smoothing": 0.2}),
        ({}, {"reduction": "sum"}),
        ({"weight": W}, {"reduction": "batchmean"}),
    ],
    ids=str,
)
def test_every_option_changes_the_value_and_the_curvature(base: dict[str, Any], options: dict[str, Any]) -> None:
    z, y = outputs(3, 4, 2), torch.tensor([[0, 1], [2, 3], [3, 3]])
    plain, other = cross_entropy(**base), cross_entropy(**base | options)
    for name in ("value", "score", "hessian"):
        assert not torch.allclose(getattr(plain, name)(z, y), getattr(other, name)(z, y))


def test_class_dim_moves_the_classes() -> None:
    z, y = outputs(3, 4, 4), torch.arange(12).reshape(3, 4) % 4
    first, last = cross_entropy(), cross_entropy(class_dim=-1)
    assert not torch.isclose(first.value(z, y), last.value(z, y))
    torch.testing.assert_close(last.score(z.mT, y).mT, first.score(z, y))


def test_integer_targets_of_any_width() -> None:
    z, loss = outputs(3, 4), cross_entropy(weight=W, label_smoothing=0.1)
    for dtype in (torch.uint8, torch.int32):
        for name in ("value", "score", "hessian"):
            assert torch.equal(getattr(loss, name)(z, INDICES.to(dtype)), getattr(loss, name)(z, INDICES))


def test_weights_in_the_outputs_precision() -> None:
    loss, low = cross_entropy(W, label_smoothing=0.1), outputs(3, 4).bfloat16()
    expected = F.cross_entropy(low, INDICES, W.bfloat16(), label_smoothing=0.1)
    torch.testing.assert_close(loss.value(low, INDICES), expected, rtol=0, atol=0)
    assert cross_entropy(W).value(low, INDICES).dtype == torch.bfloat16


def test_indices_and_one_hot_probabilities_agree() -> None:
    z, hot = outputs(3, 4), F.one_hot(INDICES, 4).double()
    for loss in (cross_entropy(), cross_entropy(label_smoothing=0.3), cross_entropy(W, reduction="sum")):
        for name in ("value", "score", "hessian", "factor"):
            torch.testing.assert_close(getattr(loss, name)(z, INDICES), getattr(loss, name)(z, hot))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_batch_without_targets_has_no_score_and_no_curvature(smoothing: float) -> None:
    z, y = outputs(2, 4), torch.full((2,), -100)
    loss = cross_entropy(label_smoothing=smoothing, weight=W)
    assert loss.value(z, y).isnan()
    assert F.cross_entropy(z, y, weight=W, label_smoothing=smoothing).isnan()
    for vectors in (loss.score(z, y), loss.hessian(z, y), loss.factor(z, y), loss.signs(z, y, z)):
        assert torch.equal(vectors, torch.zeros_like(vectors))


def test_the_ignored_class_is_still_drawn() -> None:
    z, y, loss = outputs(2, 3), torch.tensor([0, 1]), cross_entropy(ignore_index=1)
    drawn = torch.tensor([1, 1])
    score = loss.sampled_score(z, y, drawn)
    torch.testing.assert_close(score[0], 2**0.5 * (z.softmax(1) - F.one_hot(drawn, 3))[0])
    assert torch.equal(score[1], torch.zeros(3, dtype=z.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_class_of_probability_zero_is_never_drawn(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 50, generator=g).to(dtype)
    z[:, 0] = z[:, -1] = z[:, 7] = float("-inf")
    y = torch.ones(200, dtype=torch.long)
    wide = torch.promote_types(dtype, torch.float32)
    for noise in (0.0, 0.5, 1 - torch.finfo(wide).eps / 2):
        drawn = cross_entropy().sample(z, y, torch.full((200,), noise, dtype=wide))
        assert ((drawn > 0) & (drawn < 49) & (drawn != 7)).all()


def test_one_class_has_no_curvature() -> None:
    z, y = outputs(2, 1), torch.zeros(2, dtype=torch.long)
    assert cross_entropy().hessian(z, y).abs().max() == 0
    assert torch.equal(cross_entropy().sample(z, y, torch.tensor([0.1, 0.9])), y)
