"""What is taken for a loss: only what knows its curvature."""

from __future__ import annotations

from typing import Any

from kfac_func._errors import HyperparameterError, explain
from kfac_func.losses.base import Loss

_OURS = {
    ("mse", "MSELoss", "mse_loss"): "kf.losses.mse()",
    ("cross_entropy", "CrossEntropyLoss"): "kf.losses.cross_entropy()",
    ("NLLLoss", "nll_loss"): "kf.losses.cross_entropy(), on the outputs before log_softmax",
    ("bce_with_logits", "BCEWithLogitsLoss", "binary_cross_entropy_with_logits"): "kf.losses.bce_with_logits()",
    ("BCELoss", "binary_cross_entropy"): "kf.losses.bce_with_logits(), on the outputs before the sigmoid",
}
_INSTEAD = {name: ours for names, ours in _OURS.items() for name in names}


def checked_loss(loss: Any) -> Any:
    """The loss itself, if it is one of this library: the functions of a `Loss`, whatever class holds them.

    Raises HyperparameterError for a function, a module of torch and everything else, with the loss to take instead.

    >>> checked_loss(kf.losses.mse()).reduction
    'mean'
    """
    if all(hasattr(loss, name) for name in Loss._fields):
        return loss
    name = getattr(loss, "__name__", type(loss).__name__)
    other = "kf.losses.mse(), cross_entropy() or bce_with_logits(), whichever likelihood is meant; or a kf.losses.Loss"
    raise HyperparameterError(
        explain(
            f"{name} is no loss of kf.losses.",
            got=repr(loss),
            wanted="mse(...), cross_entropy(...) or bce_with_logits(...) of kf.losses",
            why="curvature needs the score, a square root of the Hessian and draws from the model besides the value",
            options=_INSTEAD.get(name, f"{other} of functions of your own"),
        )
    )
