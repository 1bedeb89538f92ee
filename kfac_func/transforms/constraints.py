r"""Transformations that hold something small: the norm of the updates, or the parameters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import leaves
from kfac_func._typing import PyTree, Scalar, ScalarOrSchedule
from kfac_func.transforms.base import (
    GradientTransformation,
    add_scaled,
    beside,
    check_scalar,
    counted,
    resolve,
    safe_sqrt,
    scale_tree,
    stateless,
)
from kfac_func.transforms.masking import masked
from kfac_func.transforms.masks import Mask


def global_norm(tree: PyTree) -> Float[Tensor, ""]:
    r"""The Euclidean norm of all leaves together:  ‖u‖ = √ Σ_leaves Σ_ij u_ij².

    Returns a 0-dim tensor on the device of the first leaf, summed in float32 at least; an empty tree has norm 0, and
    the derivative at u = 0 is 0. Raises nothing.     Source: optax.global_norm.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    squares = [_wide(leaf).square().sum() for leaf in leaves(tree)]
    if not squares:
        return torch.zeros(())
    return safe_sqrt(torch.stack([square.to(squares[0].device) for square in squares]).sum())


def _wide(leaf: Tensor) -> Tensor:
    return leaf.to(torch.promote_types(leaf.dtype, torch.float32))


def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    r"""Shorten updates that are too long, all leaves by one factor:

        u' = u · min(1, c / ‖u‖)

    Symbols: c > 0 in units of u, a number or a 0-dim tensor; ‖u‖ = `global_norm(u)`. Stateless. Updates with ‖u‖ ≤ c
    keep every bit, zero updates stay zero with finite derivatives, and a NaN anywhere makes every leaf NaN.
    Raises HyperparameterError when c is a Python number that is not positive.     Source: Pascanu et al. 2013, §3.2.

    >>> updates, _ = clip_by_global_norm(1.0).update(torch.tensor([0.0, 4.0]), ())
    >>> updates.tolist()
    [0.0, 1.0]
    """
    check_scalar("max_norm", max_norm, "(0, inf]")

    def clip(updates: PyTree, params: PyTree) -> PyTree:
        del params
        norm = global_norm(updates)
        limit = beside(max_norm)(norm)
        inside = norm <= limit
        return scale_tree(updates, torch.where(inside, 1.0, limit / torch.where(inside, 1.0, norm)))

    return stateless(clip)


def add_decayed_weights(weight_decay: ScalarOrSchedule = 0.0, mask: Mask | None = None) -> GradientTransformation:
    r"""Add a pull towards zero:  u'_t = u_t + λ_t p,  or with `mask` for some leaves only.

    Symbols: p the parameters; λ ≥ 0 a number, a 0-dim tensor or a schedule of the step t = 0, 1, ... Before momentum or
    Adam this is an L2 penalty of λ/2 ‖p‖², after them it is decoupled decay. The mask is one of `masked`: path patterns
    ("*.weight"), a tree of bools or a function of the params. State: the count for a schedule; the mask.
    Raises HyperparameterError when λ is a negative Python number or `update` gets no params, TreeMismatchError when the
    updates are unlike the params, and what `masked` raises.     Source: Loshchilov & Hutter 2019, Algorithm 2.

    >>> add_decayed_weights(0.5).update(torch.ones(2), (), torch.full((2,), 4.0))[0].tolist()
    [3.0, 3.0]
    """
    check_scalar("weight_decay", weight_decay, "[0, inf)", schedule=True)
    if mask is not None:
        return masked(add_decayed_weights(weight_decay), mask)

    def decay(updates: PyTree, params: PyTree, factor: Scalar) -> PyTree:
        if params is None:
            raise HyperparameterError(
                explain(
                    "weight decay needs the parameters.", got="params=None", wanted="update(updates, state, params)"
                )
            )
        return add_scaled(updates, factor, params)

    if callable(weight_decay):
        return counted(lambda updates, params, count: decay(updates, params, resolve(weight_decay, count)))
    return stateless(lambda updates, params: decay(updates, params, weight_decay))
