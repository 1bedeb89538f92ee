r"""K-FAC: one Kronecker product per block.

    F ≈ T · (G ⊗ A),     A = 1/(N T) Σ ā āᵀ     G = 1/(N T) Σ g gᵀ

Source: Martens & Grosse 2015 (1503.05671); convolutions: Grosse & Martens 2016 (1602.01407); shared weights:
Eschenhagen et al. 2023 (2311.00636).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import storable
from kfac_func.blocks import Block, Diagonal, Factor, add, balanced, kronecker_moments, scaled
from kfac_func.curvature.base import Structure
from kfac_func.damping import pi_split
from kfac_func.linalg import Solver, damped_inverse, densify, eigenbasis, kron, times, transpose


class KroneckerState(NamedTuple):
    """A [(q), i, i], G [(q), o, o] (dense or `Diagonal`), T and the rows that are not padding, 0-dim: F ≈ (T²/kept) ·
    (G ⊗ A).

    `turned` is a second set for uses that see the transposed matrix (an embedding tied to a head), () without such
    uses.
    """

    a: Factor
    g: Factor
    positions: Tensor
    kept: Tensor
    turned: Any = ()


class KroneckerFactored(NamedTuple):
    """The inverse factors of factored damping; 1/T is inside the second."""

    a_inverse: Factor
    g_inverse: Factor


class EigenFactored(NamedTuple):
    """Eigenbases and the inverse eigenvalues [(q), o, i] of exact damping."""

    a_basis: Factor
    g_basis: Factor
    inverse: Tensor


storable(KroneckerState, KroneckerFactored, EigenFactored, Diagonal)


def kronecker(solver: Solver = "cholesky") -> Structure:
    r"""The K-FAC block, damped as `split` says:

        "pi", "none"   v = (1/T) (G + √λ'/π I)⁻¹ V (A + π√λ' I)⁻¹,        λ' = λ/T, π from the traces, or 1
        "exact"        v = U_G [ (U_Gᵀ V U_A) ⊘ (T λ_G λ_Aᵀ + λ) ] U_Aᵀ     (always by eigh)

    solver    how factors of "pi" and "none" are inverted: "cholesky" (fast) or "eigh" (negative eigenvalues are cut
              at 0)

    V [o, i + 1], row-major vec(V) pairs with G ⊗ A; grouped layers have a Kronecker product per group. An embedding
    has a diagonal A. Raises HyperparameterError for an unknown solver.

        >>> k = kf.curvature.kronecker()
        >>> state = kf.curvature.KroneckerState(torch.eye(3) * 4, torch.eye(2), torch.tensor(1.0), torch.tensor(1.0))
        >>> k.solve(k.factorize(state, torch.tensor(0.0), "pi"), torch.ones(2, 3))
        tensor([[0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500]])
    """
    if solver not in ("cholesky", "eigh"):
        raise HyperparameterError(explain("unknown solver.", got=repr(solver), wanted="'cholesky' or 'eigh'"))

    def measure(block: Block) -> KroneckerState:
        plain, *turned = (KroneckerState(*moments) for moments in kronecker_moments(block))
        return plain._replace(turned=turned[0]) if turned else plain

    def factorize(state: KroneckerState, damping: Tensor, split: str) -> KroneckerFactored | EigenFactored:
        a, g, t = merged(state)
        if split == "exact":
            a_values, a_basis = eigenbasis(a)
            g_values, g_basis = eigenbasis(g)
            values = t * g_values.unsqueeze(-1) * a_values.unsqueeze(-2)
            return EigenFactored(a_basis, g_basis, 1 / (values + damping.to(values.dtype)))
        a_shift, g_shift = pi_split(a, g, damping / t, "pi" if split == "pi" else "none")
        return KroneckerFactored(
            damped_inverse(a, a_shift, solver),
            scaled(damped_inverse(g, g_shift, solver), (1 / t).expand(g_shift.shape)),
        )

    def solve(factored: KroneckerFactored | EigenFactored, v: Tensor) -> Tensor:
        if isinstance(factored, KroneckerFactored):
            return times(factored.g_inverse, v, factored.a_inverse)
        a, g, inverse = factored
        return times(g, times(transpose(g), v, a) * inverse, transpose(a))

    def dense(state: KroneckerState) -> Tensor:
        a, g, t = merged(state)
        return t * kron(densify(g), densify(a))

    return Structure(f"kronecker[{solver}]", measure, factorize, solve, dense, matrix=True)


def merged(state: KroneckerState) -> tuple[Factor, Factor, Tensor]:
    """A, G and T of one Kronecker product T · (G ⊗ A) for all uses; T = 1 before the first statistics.

    Two sets are first scaled to equal mean eigenvalues, (A·c, G/c), so that activations and gradients are added in
    one unit.
    """
    t = _scale(state)
    if state.turned == ():
        return state.a, state.g, t
    other = _scale(state.turned)
    pairs = ((t, *balanced(state.a, state.g)), (other, *balanced(state.turned.a, state.turned.g)))
    total = t + other
    return add([scaled(a, s / total) for s, a, _ in pairs]), add([scaled(g, s / total) for s, _, g in pairs]), total


def _scale(state: KroneckerState) -> Tensor:
    empty = state.kept <= 0  # before the first statistics
    return torch.where(empty, 1.0, state.positions**2 / torch.where(empty, 1.0, state.kept))
