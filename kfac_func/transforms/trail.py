"""What one call of a chain leaves on its way for the links further on."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import leaves
from kfac_func._typing import PyTree
from kfac_func.transforms.base import map_updates


class Trail:
    """Made by the outermost chain, handed to every member as the extra `trail`, gone with the call.

    gradient   the updates that entered that chain
    covector   what the last preconditioner was given; None before there was one. A direction v = (F̂ + λ)⁻¹ g and this
               g make ⟨v, g⟩ = vᵀ(F̂ + λ)v without another product
    damping    the λ of that preconditioner: a 0-dim tensor, or one per leaf by its path

    >>> trail = Trail({"w": 1.0})
    >>> trail.gradient, trail.covector
    ({'w': 1.0}, None)
    """

    def __init__(self, gradient: PyTree):
        self.gradient = gradient
        self.covector: PyTree | None = None
        self.damping: Any = None


def covector_of(name: str, trail: Trail | None, gradient: PyTree | None) -> PyTree:
    """The gradient behind a preconditioned direction: the one passed, or what the preconditioner of the chain got.

    Raises HyperparameterError, naming the transformation that wants it, when there is neither.
    """
    found = gradient if gradient is not None else trail.covector if trail is not None else None
    if found is None:
        raise HyperparameterError(
            explain(
                f"{name} needs the gradient that was preconditioned, and got none.",
                why="it measures vᵀ(F̂ + λ)v = ⟨v, g⟩ with the g that a preconditioner made v of",
                options=f"chain(kfac(), {name}(...), ...), behind the preconditioner; or update(..., gradient=g)",
            )
        )
    return found


def tree_vdot(a: PyTree, b: PyTree) -> Float[Tensor, ""]:
    """⟨a, b⟩ over the leaves of `a` that are not None, in at least float32, on the device of the first.

    Raises TreeMismatchError when `b` has no leaf of that shape. Source: optax.tree_utils.tree_vdot.

    >>> tree_vdot([torch.ones(2), None], [torch.full((2,), 3.0), torch.ones(1)])
    tensor(6.)
    """

    def product(x: Tensor, y: Tensor) -> Tensor:
        kind = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        return torch.dot(x.reshape(-1).to(kind), y.reshape(-1).to(kind))

    parts = leaves(map_updates(product, a, b))
    return torch.stack([part.to(parts[0].device) for part in parts]).sum() if parts else torch.zeros(())
