r"""Scale a preconditioned direction by its length in the damped Fisher metric, ⟨v, g⟩ = vᵀ(F̂ + λ)v."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kfac_func._tree import storable
from kfac_func._typing import PyTree, Scalar, ScalarOrSchedule
from kfac_func.transforms.base import (
    GradientTransformation,
    beside,
    check_scalar,
    resolve,
    safe_sqrt,
    scale_tree,
    zero_count,
)
from kfac_func.transforms.keywords import strict
from kfac_func.transforms.trail import covector_of, tree_vdot


class ClipByKLState(NamedTuple):
    """t, and the factor ν of the last step, float64 (1 before the first)."""

    step: Int[Tensor, ""]
    scale: Float[Tensor, ""]


class FisherNormState(NamedTuple):
    """The factor ⟨v, g⟩^(-1/2) of the last step, float64 (1 before the first)."""

    scale: Float[Tensor, ""]


storable(ClipByKLState, FisherNormState)


def clip_by_kl(max_kl: Scalar, learning_rate: ScalarOrSchedule) -> GradientTransformation:
    r"""The norm constraint: shorten a step whose change of the model is too large.

        u' = ν v,      ν = min(1, √(κ / (η² ⟨v, g⟩)))      so that δ = -η u' has δᵀ(F̂ + λ)δ ≤ κ

    Symbols: v = (F̂ + λ)⁻¹ g the updates; κ > 0 = `max_kl`, a number or a 0-dim tensor, about twice the KL divergence
    (nats per example) that one step may make; η ≥ 0 = `learning_rate`, that of the chain: a number, a 0-dim tensor or a
    schedule of t = 0, 1, ... g is what the preconditioner of the chain was given (momentum, where that comes first), so
    put the link right behind it; or pass `update(..., gradient=g)`.

    Shorter steps keep every bit, a zero gradient gives zero, a NaN anywhere makes every leaf NaN. State:
    `ClipByKLState`, which keeps ν. Raises HyperparameterError for Python numbers outside these, and without g.
    Source: Ba, Grosse & Martens 2017, §5.

    >>> tx = clip_by_kl(0.01, learning_rate=0.5)
    >>> v = torch.tensor([3.0, 4.0])
    >>> updates, state = tx.update(v, tx.init(v), gradient=v)  # (0.5)² ⟨v, v⟩ = 6.25
    >>> [round(u, 3) for u in updates.tolist()], round(state.scale.item(), 3)
    ([0.12, 0.16], 0.04)
    """
    check_scalar("max_kl", max_kl, "(0, inf]")
    check_scalar("learning_rate", learning_rate, "[0, inf)", schedule=True)

    def init(params: PyTree) -> ClipByKLState:
        del params
        return ClipByKLState(zero_count(), torch.ones((), dtype=torch.float64))

    def update(updates, state, params=None, *, gradient=None, trail=None, **extra):
        del params, extra
        squared = tree_vdot(updates, covector_of("clip_by_kl", trail, gradient)).to(torch.float64)
        limit, rate = beside(max_kl)(squared), beside(resolve(learning_rate, state.step))(squared)
        size = rate**2 * squared
        inside = size <= limit
        factor = torch.where(inside, 1.0, safe_sqrt(limit / torch.where(inside, 1.0, size)))
        return scale_tree(updates, factor), ClipByKLState(state.step + 1, factor)

    return GradientTransformation(init, strict(update))


def normalize_by_fisher_norm() -> GradientTransformation:
    r"""Give every direction length one in the damped Fisher metric:

        u' = v / √⟨v, g⟩      so that u'ᵀ(F̂ + λ)u' = 1

    Symbols: v and g as in `clip_by_kl`. Unlike that it also lengthens: near a minimum, where g is small, steps do not
    shrink unless a schedule makes them. A zero gradient gives zero, a direction with ⟨v, g⟩ < 0 passes unchanged.
    State: `FisherNormState`, which keeps the factor. Raises HyperparameterError without g.
    Source: the option `constraint_norm` of EKFAC-pytorch.

    >>> tx = normalize_by_fisher_norm()
    >>> v = torch.tensor([3.0, 4.0])
    >>> [round(u, 3) for u in tx.update(v, tx.init(v), gradient=v)[0].tolist()]
    [0.6, 0.8]
    """

    def init(params: PyTree) -> FisherNormState:
        del params
        return FisherNormState(torch.ones((), dtype=torch.float64))

    def update(updates, state, params=None, *, gradient=None, trail=None, **extra):
        del state, params, extra
        given = covector_of("normalize_by_fisher_norm", trail, gradient)
        squared = tree_vdot(updates, given).to(torch.float64)
        idle = squared <= 0
        factor = torch.where(idle, 1.0, 1 / torch.where(idle, 1.0, squared).sqrt())
        return scale_tree(updates, factor), FisherNormState(factor)

    return GradientTransformation(init, strict(update))
