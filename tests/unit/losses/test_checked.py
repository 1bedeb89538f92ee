"""What is no loss of the library, and targets that have no meaning, are refused wherever a loss is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func._errors import HyperparameterError, TargetError
from kfac_func.losses import Loss, bce_with_logits, checked_loss, cross_entropy, mse

NO_LOSSES = {
    "MSELoss": (nn.MSELoss(), r"options +kf\.losses\.mse\(\)"),
    "mse_loss": (F.mse_loss, r"options +kf\.losses\.mse\(\)"),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.1), r"options +kf\.losses\.cross_entropy\(\)"),
    "NLLLoss": (nn.NLLLoss(), "before log_softmax"),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), r"options +kf\.losses\.bce_with_logits\(\)"),
    "binary_cross_entropy": (F.binary_cross_entropy, "before the sigmoid"),
    "a constructor": (kf.losses.mse, r"options +kf\.losses\.mse\(\)"),
    "gaussian_nll_loss": (F.gaussian_nll_loss, r"options .*kf\.losses\.Loss"),
    "a function": (lambda z, y: (z - y).square().mean(), r"options .*kf\.losses\.Loss"),
    "a name": ("mse", "got +'mse'"),
    "nothing": (None, "got +None"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("given", "match"), NO_LOSSES.values(), ids=NO_LOSSES)
def test_what_is_no_loss_is_refused_with_the_loss_to_take(given: Any, match: str) -> None:
    with pytest.raises(HyperparameterError, match=rf"is no loss of kf\.losses(.|\n)*{match}"):
        checked_loss(given)


def test_losses_pass_whatever_class_holds_their_functions() -> None:
    class Mine:
        def __init__(self, loss: Loss) -> None:
            vars(self).update(loss._asdict())

    for loss in (mse(), cross_entropy(), bce_with_logits(), Mine(mse())):
        assert checked_loss(loss) is loss


def softened(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


Z, W = softened(4, 3), softened(4, 2, 3)
LOGITS = {
    "logits": (cross_entropy(), Z, Z.flip(0)),
    "positive logits": (cross_entropy(), Z, Z.abs() + 1),
    "another dimension": (cross_entropy(class_dim=-1), Z[:, None] + 0 * W, W.softmax(1)),
    "one negative entry": (cross_entropy(), Z, torch.tensor([[1.2, -0.2, 0.0]]).double().expand(4, 3)),
    "an infinite one": (cross_entropy(), Z, torch.tensor([[torch.inf, 0.0, 0.0]]).double().expand(4, 3)),
    "logits of a Bernoulli": (bce_with_logits(), Z, Z.flip(0)),
    "percents": (bce_with_logits(), Z, 100 * Z.sigmoid()),
}


@pytest.mark.parametrize(("loss", "z", "targets"), LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_targets_that_are_no_probabilities_are_refused(loss: Loss, z: Tensor, targets: Tensor, dtype: Any) -> None:
    targets = targets.to(dtype)
    for call in (loss.value, loss.score, loss.hessian, torch.func.grad(loss.value)):
        with pytest.raises(TargetError, match=r"these are none(.|\n)*got +entries from"):
            call(z, targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 3, 1000])
def test_probabilities_in_any_precision_pass(dtype: torch.dtype, classes: int) -> None:
    z = softened(6, classes)
    y = z.flip(0).softmax(1).to(dtype)
    y[2] = 0  # no target
    for reduction in ("mean", "sum"):
        loss = cross_entropy(reduction=reduction)
        assert loss.value(z, y).isfinite()
        assert (loss.hessian(z, y)[2] == 0).all()
    assert bce_with_logits().value(z, y).isfinite()
    nan = torch.full_like(y, torch.nan)
    assert cross_entropy().value(z, nan).isnan()  # as a loss that is not finite, which rejects the batch


def test_targets_under_transforms_are_read_and_members_are_not_mixed() -> None:
    good, bad = Z.softmax(1), Z
    for loss in (cross_entropy(), bce_with_logits()):
        run = torch.func.vmap(torch.func.grad(loss.value))
        assert run(torch.stack([Z, Z]), torch.stack([good, good])).shape == (2, 4, 3)
        with pytest.raises(TargetError, match="these are none"):
            run(torch.stack([Z, Z]), torch.stack([bad, bad]))


@pytest.mark.parametrize("make", [mse, cross_entropy, bce_with_logits])
@pytest.mark.parametrize("outputs", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("targets", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_targets_of_another_precision(make: Any, outputs: torch.dtype, targets: torch.dtype) -> None:
    loss, z = make(), Z.to(outputs)
    y = Z.flip(0).softmax(1).to(targets)
    exact, rough = y.double(), {2: 2e-2, 4: 1e-5, 8: 1e-12}
    value = loss.value(z, y)
    assert value.dtype == torch.promote_types(outputs, targets) or value.dtype.itemsize == max(4, outputs.itemsize)
    tolerance = rough[min(value.dtype.itemsize, outputs.itemsize)]
    torch.testing.assert_close(value.double(), make().value(z.double(), exact), rtol=tolerance, atol=tolerance)
    for name in ("score", "hessian", "factor"):
        got = getattr(loss, name)(z, y)
        assert got.dtype == outputs
        wanted = getattr(loss, name)(z.double(), exact)
        torch.testing.assert_close(got.double(), wanted, rtol=rough[outputs.itemsize], atol=rough[outputs.itemsize])
