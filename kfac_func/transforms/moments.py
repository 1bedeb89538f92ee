r"""Directions made of moving averages of the updates: momentum and Adam."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from kfac_func._tree import storable, tree_map
from kfac_func._typing import PyTree, Scalar
from kfac_func.transforms.base import (
    GradientTransformation,
    add_scaled,
    beside,
    check_scalar,
    keep_missing,
    map_updates,
    safe_sqrt,
    zero_count,
)
from kfac_func.transforms.keywords import strict


class TraceState(NamedTuple):
    """m: the decayed sum of all updates so far, one leaf per parameter."""

    trace: PyTree


def trace(decay: Scalar, nesterov: bool = False) -> GradientTransformation:
    r"""Momentum (heavy ball, without dampening), with m = 0 before the first step:

        m_t = u_t + μ m_{t-1},      u'_t = m_t,      or with `nesterov`:  u'_t = u_t + μ m_t

    Symbols: u, m like the parameters; μ in [0, 1) a number or a 0-dim tensor.
    Raises HyperparameterError when μ is a Python number outside [0, 1), TreeMismatchError for updates unlike the trace.
    Source: Polyak 1964; Sutskever et al. 2013, §2; the conventions of torch.optim.SGD.

    >>> tx = trace(0.5)
    >>> _, state = tx.update(torch.ones(2), tx.init(torch.ones(2)))
    >>> tx.update(torch.ones(2), state)[0].tolist()
    [1.5, 1.5]
    """
    check_scalar("decay", decay, "[0, 1)")

    def init(params: PyTree) -> TraceState:
        return TraceState(tree_map(torch.zeros_like, params))

    def update(updates, state, params=None, *, stats=None, inplace=False, **extra):
        del params, stats, inplace, extra
        moved = add_scaled(updates, decay, state.trace)
        direction = add_scaled(updates, decay, moved) if nesterov else tree_map(torch.clone, moved)
        return direction, TraceState(keep_missing(state.trace, moved))

    return GradientTransformation(init, strict(update))


class ScaleByAdamState(NamedTuple):
    """t, and the moving averages m (of u) and v (of u²), one leaf per parameter each."""

    step: Int[Tensor, ""]
    mu: PyTree
    nu: PyTree


storable(TraceState, ScaleByAdamState)


def scale_by_adam(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8, eps_root: Scalar = 0.0
) -> GradientTransformation:
    r"""The direction of Adam, with m = v = 0 before step t = 1:

        m_t = β₁ m_{t-1} + (1-β₁) u_t          v_t = β₂ v_{t-1} + (1-β₂) u_t²
        u'_t = m_t / (1-β₁ᵗ)  /  ( √( v_t / (1-β₂ᵗ) + ε_root ) + ε )

    Symbols: u, m, v like the parameters (real); β in [0, 1); ε ≥ 0 in units of u, ε_root ≥ 0 in units of u². All may be
    0-dim tensors. The root of zero gets the derivative zero: hyper-gradients survive leaves that never had an update.
    Raises HyperparameterError for Python numbers outside these, TreeMismatchError for updates unlike the moments.
    Source: Kingma & Ba 2015, Algorithm 1.

    >>> tx = scale_by_adam(eps=0.0)
    >>> updates, state = tx.update(torch.tensor([4.0, -2.0]), tx.init(torch.ones(2)))
    >>> updates.round().tolist(), state.step.item()
    ([1.0, -1.0], 1)
    """
    check_scalar("b1", b1, "[0, 1)")
    check_scalar("b2", b2, "[0, 1)")
    check_scalar("eps", eps, "[0, inf)")
    check_scalar("eps_root", eps_root, "[0, inf)")

    def init(params: PyTree) -> ScaleByAdamState:
        zeros = (tree_map(torch.zeros_like, params) for _ in range(2))
        return ScaleByAdamState(zero_count(), *zeros)

    def update(updates, state, params=None, *, stats=None, inplace=False, **extra):
        del params, stats, inplace, extra
        step = state.step + 1
        mu = _moving_average(b1, state.mu, updates)
        nu = _moving_average(b2, state.nu, tree_map(torch.square, updates))
        power = step.to(torch.float64)
        unbias1, unbias2 = beside(1 - b1**power), beside(1 - b2**power)
        eps_at, eps_root_at = beside(eps), beside(eps_root)

        def direction(u: Tensor, m: Tensor, v: Tensor) -> Tensor:
            root = safe_sqrt(v / unbias2(v) + eps_root_at(v))
            return (m / unbias1(m) / (root + eps_at(v))).to(u.dtype)

        state = ScaleByAdamState(step, keep_missing(state.mu, mu), keep_missing(state.nu, nu))
        return map_updates(direction, updates, mu, nu), state

    return GradientTransformation(init, strict(update))


def _moving_average(decay: Scalar, average: PyTree, updates: PyTree) -> PyTree:
    keep, add = beside(decay), beside(1 - decay)
    return map_updates(lambda u, m: m * keep(m) + u * add(u), updates, average)
