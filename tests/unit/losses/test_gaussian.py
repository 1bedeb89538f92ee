"""Squared error: its scale, its variance, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kfac_func._errors import HyperparameterError, TargetError
from kfac_func.losses import mse

Z, Y = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]]), torch.tensor([[0.0, 2.5, 1.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(HyperparameterError, match="scale"):
        mse(scale=scale)


@pytest.mark.parametrize(
    ("targets", "match"),
    [(Y[:, 0], "targets do not fit"), (Y[:1], "targets do not fit"), (Y.long(), "floating-point")],
)
def test_nothing_is_broadcast_or_cast(targets: torch.Tensor, match: str) -> None:
    with pytest.raises(TargetError, match=match):
        mse().value(Z, targets)


def test_options_change_value_and_curvature() -> None:
    seen = [mse(), mse(scale=0.5), mse("sum"), mse("batchmean")]
    assert len({loss.value(Z, Y).item() for loss in seen}) == len(seen)
    assert [loss.hessian(Z, Y)[0, 0, 0].item() for loss in seen] == pytest.approx([2 / 3, 1 / 3, 2, 2])


def test_batchmean_is_the_squared_norm() -> None:
    torch.testing.assert_close(mse("batchmean").value(Z, Y), (Z - Y).square().sum(1).mean())
    torch.testing.assert_close(mse("batchmean", scale=0.5).score(Z, Y), Z - Y)


def test_half_scale_draws_with_unit_variance_and_keeps_digits_in_low_precision() -> None:
    z, y = Z.bfloat16() + 300, Y.bfloat16()
    noise = torch.full((2, 3), 0.6)
    drawn = mse("batchmean", scale=0.5).sample(z, y, noise)
    torch.testing.assert_close(drawn - z.float(), torch.full((2, 3), 0.2533471), atol=1e-4, rtol=0)
    score = mse("batchmean", scale=0.5).sampled_score(z, y, drawn)
    torch.testing.assert_close(score.float(), torch.full((2, 3), -0.2533471), atol=1e-2, rtol=0)


def test_targets_of_another_precision() -> None:
    loss = mse()
    torch.testing.assert_close(loss.value(Z.bfloat16(), Y), F.mse_loss(Z.bfloat16(), Y))
    torch.testing.assert_close(loss.score(Z.bfloat16(), Y).float(), loss.score(Z, Y), atol=0.02, rtol=0.01)
    torch.testing.assert_close(loss.score(Z, Y.double()), loss.score(Z, Y))
