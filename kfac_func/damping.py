"""How damping meets a Kronecker-factored block."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import storable
from kfac_func.blocks import Factor, Thin, mean_eigenvalue, scaled, transpose
from kfac_func.linalg import Solver, Spectral, damped_inverse, eigenbasis, times
from kfac_func.linalg.sums import SumFactored, Terms, factorized_sum, positive

Split = Literal["pi", "none", "exact"]
"""How λ meets a block: factored with π, factored with π = 1, or exactly, in the eigenbasis."""


def pi_split(a: Factor, g: Factor, damping: Tensor, split: Split = "pi") -> tuple[Tensor, Tensor]:
    r"""Split Tikhonov damping between two Kronecker factors: the shifts of A and of G.

        (G + √λ/π I) ⊗ (A + π√λ I),        π² = (tr A / dim A) / (tr G / dim G)

    Shapes: A [(q), i, i], G [(q), o, o], λ ≥ 0 in units of the curvature G ⊗ A; the shifts are numbers, one per group.
    A zero trace (a dead layer) gives π = 1, as does split="none". Source: Martens & Grosse 2015 (1503.05671), §6.3.

        >>> a, g = torch.eye(2) * 4, torch.eye(3)
        >>> [round(float(s), 3) for s in pi_split(a, g, torch.tensor(0.01))]
        [0.2, 0.05]
    """
    root = damping.sqrt()
    top, bottom = mean_eigenvalue(a), mean_eigenvalue(g)
    if split == "none":
        return root * torch.ones_like(top), root * torch.ones_like(bottom)
    dead = (top <= 0) | (bottom <= 0)
    pi = torch.where(dead, 1.0, torch.where(dead, 1.0, top) / torch.where(dead, 1.0, bottom)).sqrt()
    return root * pi, root / pi


class KroneckerFactored(NamedTuple):
    """The inverse factors of factored damping; 1/T is inside the second."""

    a_inverse: Factor
    g_inverse: Factor


class EigenFactored(NamedTuple):
    """Eigenbases and the inverse eigenvalues [(q), o, i] of exact damping."""

    a_basis: Factor
    g_basis: Factor
    inverse: Tensor


storable(KroneckerFactored, EigenFactored)


def damped_product(
    a: Factor, g: Factor, t: Tensor, damping: Tensor, split: str, solver: Solver = "cholesky"
) -> KroneckerFactored | EigenFactored:
    r"""What it takes to solve with T · (G ⊗ A) and the damping λ:

        "pi", "none"   v = (1/T) (G + √λ'/π I)⁻¹ V (A + π√λ' I)⁻¹,        λ' = λ/T, π from the traces, or 1
        "exact"        v = U_G [ (U_Gᵀ V U_A) ⊘ (T λ_G λ_Aᵀ + λ) ] U_Aᵀ

    Shapes: A [(q), i, i], G [(q), o, o] in any form of a factor, T and λ numbers in units of the curvature.

        >>> factored = damped_product(torch.eye(3) * 4, torch.eye(2), torch.tensor(1.0), torch.tensor(0.0), "pi")
        >>> solve_product(factored, torch.ones(2, 3))
        tensor([[0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500]])
    """
    if split == "exact":
        a_basis, g_basis, values = product_spectrum(a, g, t, damping, split)
        return EigenFactored(a_basis, g_basis, 1 / values)
    a_shift, g_shift = pi_split(a, g, damping / t, "pi" if split == "pi" else "none")
    return KroneckerFactored(
        damped_inverse(a, a_shift, solver),
        scaled(damped_inverse(g, g_shift, solver), (1 / t).expand(g_shift.shape)),
    )


def product_spectrum(a: Factor, g: Factor, t: Tensor, damping: Tensor, split: str) -> Spectral:
    r"""The eigenvalues of T · (G ⊗ A) with the damping λ, and their bases; negative eigenvalues of A and G count 0.

        "pi", "none"   S = T (λ_G + √λ'/π) (λ_A + π√λ')ᵀ        λ' = λ/T
        "exact"        S = T λ_G λ_Aᵀ + λ

    Shapes as in `damped_product`; S is [(q), o, i].

        >>> product_spectrum(torch.eye(3) * 4, torch.eye(2), torch.tensor(1.0), torch.tensor(1.0), "exact").values
        tensor([[5., 5., 5.],
                [5., 5., 5.]])
    """
    a_values, a_basis = eigenbasis(a)
    g_values, g_basis = eigenbasis(g)
    if split != "exact":
        a_shift, g_shift = pi_split(a, g, damping / t, "pi" if split == "pi" else "none")
        a_values = a_values + a_shift.to(a_values.dtype).unsqueeze(-1)
        g_values = g_values + g_shift.to(g_values.dtype).unsqueeze(-1)
    values = t * g_values.unsqueeze(-1) * a_values.unsqueeze(-2)
    return Spectral(a_basis, g_basis, values + damping.to(values.dtype) if split == "exact" else values)


def solve_product(factored: KroneckerFactored | EigenFactored, v: Tensor | Thin) -> Tensor:
    """(T · G ⊗ A + damping)⁻¹ v for v [(q), o, i], or for one given by its rows."""
    if isinstance(factored, KroneckerFactored):
        return times(factored.g_inverse, v, factored.a_inverse)
    a, g, inverse = factored
    return times(g, times(transpose(g), v, a) * inverse, transpose(a))


def damped_sum(terms: Terms, damping: Tensor, split: str, name: str) -> SumFactored:
    r"""What it takes to solve with Σ_k S_k ⊗ R_k and the damping λ:

        (S₁ + λ_g I) ⊗ (R₁ + λ_a I) + Σ_{k≥2} S_k ⊗ R_k,        λ_a, λ_g = pi_split(R₁, S₁, λ)

    Negative eigenvalues of R₁ and S₁ are cut at 0. Raises HyperparameterError for split="exact": no eigenbasis is
    common to the terms.
    """
    if split not in ("pi", "none"):
        raise HyperparameterError(
            explain(
                f"{name} has no exact damping.",
                got=f"split={split!r}",
                why="a sum of Kronecker products has no Kronecker eigenbasis",
                options="split='pi' or split='none'; or the structure kpsvd()",
            )
        )
    r, s = (torch.cat([positive(x[:1]), x[1:]]) for x in terms)
    return factorized_sum(Terms(r, s), *pi_split(r[0], s[0], damping, "pi" if split == "pi" else "none"))
