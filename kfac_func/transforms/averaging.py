r"""Moving averages: of the updates, and of the parameters that they lead to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from kfac_func._errors import HyperparameterError, StateError, at_least, explain
from kfac_func._tree import nodes, storable, tree_map
from kfac_func._typing import PyTree, Scalar
from kfac_func.transforms.base import (
    GradientTransformation,
    beside,
    check_scalar,
    keep_missing,
    map_updates,
    scale_tree,
    zero_count,
)
from kfac_func.transforms.keywords import strict
from kfac_func.transforms.masking import opened


class EmaState(NamedTuple):
    """t, and the moving average m of the updates, one leaf per parameter."""

    step: Int[Tensor, "*members"]
    ema: PyTree


def ema(decay: Scalar, debias: bool = True) -> GradientTransformation:
    r"""The moving average of the updates, with m = 0 before step t = 1:

        m_t = β m_{t-1} + (1-β) u_t,      u'_t = m_t / (1-βᵗ),      or without `debias`:  u'_t = m_t

    Symbols: u, m like the parameters; β in [0, 1) a number or a 0-dim tensor. With `debias` the first update passes
    unchanged whatever β is.
    Raises HyperparameterError for a Python number outside [0, 1), TreeMismatchError for updates unlike the average.
    Source: optax.ema.

    >>> tx = ema(0.5)
    >>> _, state = tx.update(torch.tensor(3.0), tx.init(torch.tensor(0.0)))
    >>> tx.update(torch.tensor(6.0), state)[0]
    tensor(5.)
    """
    check_scalar("decay", decay, "[0, 1)")

    def init(params: PyTree) -> EmaState:
        return EmaState(zero_count(), tree_map(torch.zeros_like, params))

    def update(updates, state, params=None, *, stats=None, inplace=False, **extra):
        del params, stats, inplace, extra
        step = state.step + 1
        average = _mixed(1 - decay, updates, state.ema)
        new = EmaState(step, keep_missing(state.ema, average))
        return scale_tree(average, 1 / (1 - decay ** step.to(torch.float64)) if debias else 1.0), new

    return GradientTransformation(init, strict(update))


class AverageParamsState(NamedTuple):
    """t, and the average of the parameters so far (those that `init` was given before the first step)."""

    step: Int[Tensor, "*members"]
    average: PyTree


storable(EmaState, AverageParamsState)


def average_params(decay: Scalar | None = 0.999, start: int = 0) -> GradientTransformation:
    r"""Average the parameters along the way, and pass the updates unchanged; the last link of a chain:

        p_t = p_{t-1} + u_t,      a_t = (1-w_t) a_{t-1} + w_t p_t,      n = max(t - start, 1)
        w_t = (1-β) / (1-βⁿ),     or with `decay=None`:  w_t = 1/n

    Symbols: t = 1, 2, ... the step; β = `decay` in [0, 1), a number or a 0-dim tensor; a_t the exactly debiased moving
    average of p_{start+1}, ..., p_t, or their plain mean (Polyak); up to `start` ≥ 0 and one step more a_t = p_t. The
    average of a leaf that gets None stays as it was. `averaged_params` takes it out of any state.
    Raises HyperparameterError for numbers outside these and when `update` gets no params, TreeMismatchError when the
    updates are unlike the params.     Source: Polyak & Juditsky 1992; Kingma & Ba 2015, §7.2.

    >>> tx = average_params(decay=None)
    >>> params = torch.tensor(0.0)
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(torch.tensor(1.0), state, params)
    ...     params = params + updates
    >>> params, averaged_params(state)
    (tensor(3.), tensor(2.))
    """
    at_least(0, start=start)
    if decay is not None:
        check_scalar("decay", decay, "[0, 1)")

    def init(params: PyTree) -> AverageParamsState:
        return AverageParamsState(zero_count(), tree_map(torch.clone, params))

    def update(updates, state, params=None, *, stats=None, inplace=False, **extra):
        del stats, inplace, extra
        if params is None:
            raise HyperparameterError(
                explain(
                    "average_params needs the parameters.", got="params=None", wanted="update(updates, state, params)"
                )
            )
        step = state.step + 1
        n = (step - start).clamp(min=1).to(torch.float64)
        weight = 1 / n if decay is None else (1 - decay) / (1 - decay**n)
        moved = map_updates(lambda update, param: (param + update).to(param.dtype), updates, params)
        average = keep_missing(state.average, _mixed(weight, moved, state.average))
        return tree_map(torch.clone, updates), AverageParamsState(step, average)

    return GradientTransformation(init, strict(update))


def _mixed(weight: Scalar, new: PyTree, old: PyTree) -> PyTree:
    """(1-w) x + w y for every new leaf y and the old leaf x."""
    keep, add = beside(1 - weight), beside(weight)
    return map_updates(lambda y, x: x * keep(x) + y * add(y), new, old)


def averaged_params(state: PyTree) -> PyTree:
    """The average that `average_params` keeps, from any state with exactly one inside; in fresh memory. None at
    the leaves that a mask keeps from it.

    Raises StateError when there is none, or several.

    >>> tx = kf.chain(kf.sgd(0.1), average_params())
    >>> averaged_params(tx.init({"w": torch.ones(2)}))
    {'w': tensor([1., 1.])}
    """
    found = nodes(state, AverageParamsState)
    if len(found) != 1:
        raise StateError(
            explain(
                "the state does not hold one average of the parameters.",
                got=f"{len(found)} inside a {type(state).__name__}",
                options="pass the state of a chain with one average_params() in it, or its own state",
            )
        )
    return tree_map(torch.clone, opened(found[0].average))
