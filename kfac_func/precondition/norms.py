"""Norms in the metric of a K-FAC state."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tracing import known_bad
from kfac_func._tree import leaves
from kfac_func._typing import PyTree
from kfac_func.precondition.transform import precondition
from kfac_func.transforms import tree_vdot
from kfac_func.transforms.base import safe_sqrt


def natural_gradient_norm(state: PyTree, grads: PyTree) -> Float[Tensor, ""]:
    r"""The norm of a gradient in the metric of the damped inverse curvature, a scalar.

        √(gᵀ (F̂ + λ)⁻¹ g) = √⟨g, precondition(state, g)⟩

    state    a K-FAC state, or any state with exactly one inside
    grads    g, a tree like the parameters; None leaves count as zeros; leaves without curvature count with the
             identity, as in `precondition`

    This is the length of the natural gradient v = (F̂ + λ)⁻¹g itself, √(vᵀ(F̂ + λ)v), in the square root of the units
    of the loss. Its derivative is 0 where it is 0. Raises what `precondition` raises, HyperparameterError for NaN.
    Source: Amari 1998.

        >>> state = kf.kfac().init({"w": torch.ones(2)})
        >>> natural_gradient_norm(state, {"w": torch.tensor([3.0, 4.0])})
        tensor(5.)
    """
    if known_bad(leaves(grads)):
        raise HyperparameterError(explain("the gradient is not finite.", why="its norm would be NaN"))
    return safe_sqrt(tree_vdot(grads, precondition(state, grads)))
