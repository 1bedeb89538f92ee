"""Binary cross-entropy: its weights and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kfac_func._errors import HyperparameterError, TargetError
from kfac_func.losses import Loss, bce_with_logits

Z = torch.tensor([[1.0, -2.0, 0.5], [0.3, -1.0, 3.0]])
Y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.25]])


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_are_checked(name: str) -> None:
    def make(tensor: torch.Tensor) -> Loss:
        return bce_with_logits(weight=tensor) if name == "weight" else bce_with_logits(pos_weight=tensor)

    with pytest.raises(HyperparameterError, match=f"{name} must be finite and not negative"):
        make(torch.tensor([1.0, -0.5, 1.0]))
    with pytest.raises(HyperparameterError, match=f"{name} must be a floating-point"):
        make(torch.tensor([1, 2, 3]))
    for shape in [(2,), (1, 2, 3), (2, 2), (3, 1)]:
        loss = make(torch.ones(shape))
        for function in (loss.value, loss.hessian):
            with pytest.raises(TargetError, match=f"{name} does not broadcast"):
                function(Z, Y)


@pytest.mark.parametrize(("targets", "match"), [(Y[:, 0], "do not fit"), (Y.long(), "floating-point")])
def test_targets_that_do_not_fit(targets: torch.Tensor, match: str) -> None:
    with pytest.raises(TargetError, match=match):
        bce_with_logits().value(Z, targets)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": torch.tensor([1.0, 2.0, 3.0])},
        {"pos_weight": torch.tensor([1.0, 2.0, 3.0])},
        {"reduction": "sum"},
        {"reduction": "batchmean"},
    ],
    ids=str,
)
def test_every_option_changes_value_and_curvature(options: dict[str, Any]) -> None:
    plain, other = bce_with_logits(), bce_with_logits(**options)
    for name in ("value", "score", "hessian"):
        assert not torch.allclose(getattr(plain, name)(Z, Y), getattr(other, name)(Z, Y))


def test_weights_of_another_precision() -> None:
    w, p = torch.tensor([1.0, 2.0, 0.3]), torch.tensor([4.0, 0.3, 1.0])
    loss, low = bce_with_logits(weight=w, pos_weight=p), Z.bfloat16()
    expected = F.binary_cross_entropy_with_logits(low, Y.bfloat16(), w, pos_weight=p)
    torch.testing.assert_close(loss.value(low, Y.bfloat16()), expected, rtol=0, atol=0)
    double = bce_with_logits(weight=w.double(), pos_weight=p.double())
    for name in ("score", "hessian", "factor"):
        torch.testing.assert_close(getattr(double, name)(Z, Y), getattr(loss, name)(Z, Y))
    torch.testing.assert_close(loss.score(low, Y).float(), loss.score(Z, Y), atol=0.02, rtol=0.01)
