r"""Hyperparameters in the state: scheduled, read and changed while a run goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import storable
from kfac_func._typing import PyTree
from kfac_func.transforms.base import GradientTransformation, zero_count
from kfac_func.transforms.keywords import strict
from kfac_func.transforms.wrappers import with_extra_args_support


class InjectHyperparamsState(NamedTuple):
    """t, the hyperparameters of the last step by name (float64, of the first one before it), and the state inside."""

    step: Int[Tensor, "*members"]
    hyperparams: dict[str, Float[Tensor, "*members"]]
    inner: PyTree


storable(InjectHyperparamsState)


def inject_hyperparams(
    factory: Callable[..., Any], static: str | Iterable[str] = ()
) -> Callable[..., GradientTransformation]:
    r"""Move the hyperparameters of a transformation into its state:

        f_t = factory(h_t),      u'_t, s_{t+1} = f_t(u_t, s_t),      h_t = h_{t-1}, or schedule(t) where one was given

    factory  a constructor such as `sgd`, or any function that returns a member of a chain. It is called at every step,
             with 0-dim float64 tensors; the state s inside is made once
    static   names of arguments that stay as they are

    Calling the result takes the arguments of the factory. Those that are floats, 0-dim tensors of floats or schedules
    are injected, for options that take no schedule themselves as well. Static are ints, bools, strings, None and all
    else, and what is not passed: write `sgd(1.0)` for a rate that may change, and name functions and floats that a
    factory needs as they are (a `mask`, the `l2` of K-FAC) in `static`.

    Between two steps `tree_set(state, learning_rate=0.01)` changes a value for good, unless it has a schedule. Values
    are tensors of the state: hyper-gradients flow through them, and vmap gives each member of an ensemble its own.
    Raises HyperparameterError for unknown static names, when nothing is left to inject, when a function is no schedule,
    and what the factory raises about its numbers.     Source: optax.inject_hyperparams.

    >>> tx = inject_hyperparams(kf.scale)(step_size=lambda count: 1.0 + count)
    >>> _, state = tx.update(torch.ones(2), tx.init(torch.ones(2)))
    >>> updates, state = tx.update(torch.ones(2), state)
    >>> updates.tolist(), state.hyperparams
    ([2.0, 2.0], {'step_size': tensor(2., dtype=torch.float64)})
    """
    fixed = {static} if isinstance(static, str) else set(static)
    parameters = inspect.signature(factory).parameters
    unknown = sorted(fixed - set(parameters))
    if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise HyperparameterError(
            explain("static names what the factory does not take.", got=unknown, wanted=" or ".join(parameters))
        )

    def injected(*args: Any, **kwargs: Any) -> GradientTransformation:
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        moving = {name: value for name, value in arguments.items() if name not in fixed and _injectable(value)}
        if not moving:
            raise HyperparameterError(
                explain(
                    "there is nothing to inject.",
                    got=", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments",
                    wanted="a float, a 0-dim tensor or a schedule",
                    options="write 1.0 instead of 1; or leave the transformation as it is",
                )
            )
        schedules = {name: value for name, value in moving.items() if callable(value)}

        def build(hyperparams: dict[str, Any]) -> GradientTransformation:
            return with_extra_args_support(factory(**{**arguments, **hyperparams}))

        first = build(_values(schedules, zero_count()))  # the factory looks at Python numbers, and never into tensors

        def init(params: PyTree) -> InjectHyperparamsState:
            hyperparams = _values(moving, zero_count())
            return InjectHyperparamsState(zero_count(), hyperparams, build(hyperparams).init(params))

        def update(updates, state, params=None, **extra):
            hyperparams = {**state.hyperparams, **_values(schedules, state.step)}
            updates, inner = build(hyperparams).update(updates, state.inner, params, **extra)
            return updates, InjectHyperparamsState(state.step + 1, hyperparams, inner)

        return GradientTransformation(init, strict(update, first.update))

    return injected


def _injectable(value: Any) -> bool:
    return isinstance(value, float) or callable(value) or _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _values(options: dict[str, Any], count: Tensor) -> dict[str, Tensor]:
    """The value of every option at a step, in fresh memory."""
    found = {}
    for name, option in options.items():
        value = option(count) if callable(option) else option
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or _is_scalar(value)):
            raise HyperparameterError(
                explain(
                    f"{name} is a function, and no schedule.",
                    got=f"it returns {value!r}",
                    wanted="a number or a 0-dim tensor for a count",
                    options=f"static={name!r} passes it on as it is",
                )
            )
        number = value.clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
        found[name] = number.to(torch.float64)
    return found
