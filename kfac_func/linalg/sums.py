r"""Sums of Kronecker products Σ_k S_k ⊗ R_k: their averages with a batch, and their damped inverses.

    two terms     v = K₂ [(K₂ᵀ V K₁) ⊘ D] K₁ᵀ                     K₁, K₂, D of `two_term`
    more terms    v = K₂ [(D + c E)⁻¹ (K₂ᵀ V K₁)] K₁ᵀ,            E X = Σ_{k≥3} (K₂ᵀ S_k K₂) X (K₁ᵀ R_k K₁)

(D + c E)⁻¹ is a fixed Chebyshev polynomial in D^{-½} E D^{-½}, hence linear and symmetric. c ≤ 1 keeps the spectral
radius of c D^{-½} E D^{-½} at most 0.9, by a bound that holds for sure, so that the inverse is positive definite.
Sources: Koroko et al. 2022 (2201.10285), §3; Collatz 1942; Saad 2003, Iterative Methods, §12.3.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func._tree import storable
from kfac_func.blocks.rearranged import to_inputs, to_outputs
from kfac_func.linalg.kron import kron
from kfac_func.linalg.krylov import Operator, Triplet, two_term
from kfac_func.linalg.psd import eigenbasis

FLOOR = 0.1  # of 1 + s₂ s₁ᵀ: what the second term may take away from the first
RADIUS = 0.9  # the spectral radius that later terms may have, relative to the first two


class Terms(NamedTuple):
    """Σ_k S_k ⊗ R_k: r [k, (q), i, i] and s [k, (q), o, o], symmetric. The sum is a whole block: no factor T."""

    r: Tensor
    s: Tensor


class SumFactored(NamedTuple):
    """K₁ [(q), i, i], K₂ [(q), o, o], D [(q), o, i], and the later terms of c E in their frame, [k − 2, (q), ...]."""

    k1: Tensor
    k2: Tensor
    diagonal: Tensor
    later: Terms


storable(Terms, SumFactored)


def terms_of(triplets: list[Triplet]) -> Terms:
    """R_k = √σ_k left_k and S_k = √σ_k right_k, exactly symmetric."""

    sigmas, lefts, rights = (torch.stack(each) for each in zip(*triplets, strict=True))
    root = sigmas.sqrt()[..., None, None]
    return Terms(symmetric(root * lefts), symmetric(root * rights))


def densified(terms: Terms) -> Tensor:
    """Σ_k S_k ⊗ R_k as a matrix [p, p]."""
    return torch.stack([kron(s, r) for r, s in zip(*terms, strict=True)]).sum(0)


def symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def averaged(old: Any, ask: Callable[..., Any], fraction: Tensor) -> tuple[Operator, Operator]:
    """The products with (1 − f) Σ_k S_k ⊗ R_k + f F, rearranged: V̂ ↦ [i, i] and Û ↦ [o, o]; `old` () is zero.

    Exactly symmetric, so that rounding cannot stray to the antisymmetric pairs that F may have.
    """

    def mixed(seen: Tensor, x: Tensor, onto: Any) -> Tensor:
        f, seen = fraction.to(x.dtype), symmetric(seen)
        if old == ():
            return f * seen
        mine, other = onto
        weights = torch.einsum("k...ab,...ab->k...", other, x)
        return (1 - f) * torch.einsum("k...,k...ab->...ab", weights, mine) + f * seen

    def forward(v: Tensor) -> Tensor:
        return mixed(ask(lambda z: to_inputs(z, v)), v, old)

    def adjoint(u: Tensor) -> Tensor:
        return mixed(ask(lambda z: to_outputs(z, u)), u, old[::-1])

    return forward, adjoint


def warm(old: Tensor | None, fresh: Tensor) -> Tensor:
    """Where to start: at the old matrix [(q), o, o], unless there is none or it is zero."""
    if old is None:
        return fresh
    return torch.where((old != 0).any(-1, keepdim=True).any(-2, keepdim=True), old, fresh.to(old.dtype))


def changed(old: Any, new: Terms, fraction: Tensor) -> Terms:
    """The new terms, or the old ones (zeros for ()) where the fraction is 0."""
    before = tuple(map(torch.zeros_like, new)) if old == () else old
    return Terms(*(torch.where(fraction > 0, x, y) for x, y in zip(new, before, strict=True)))


def positive(x: Tensor) -> Tensor:
    """A symmetric matrix without its negative eigenvalues."""
    values, basis = eigenbasis(x)
    assert isinstance(basis, Tensor)
    return (basis * values.unsqueeze(-2)) @ basis.mT


def factorized_sum(terms: Terms, r_shift: Tensor, s_shift: Tensor) -> SumFactored:
    """What it takes to solve with (S₁ + s_shift I) ⊗ (R₁ + r_shift I) + Σ_{k≥2} S_k ⊗ R_k; R₁ and S₁ semi-definite.

    D = max(1 + s₂ s₁ᵀ, FLOOR, λ n₂ n₁ᵀ) with λ = r_shift · s_shift and n the squared lengths of the columns of K: no
    column of the frame is amplified by more than 1/λ, which only binds where the sum itself is not semi-definite.
    """
    r2, s2 = (x[1] if x.shape[0] > 1 else torch.zeros_like(x[0]) for x in terms)
    k1, k2, d = two_term(_shifted(terms.r[0], r_shift), _shifted(terms.s[0], s_shift), r2, s2, FLOOR)
    lengths = k2.square().sum(-2).unsqueeze(-1) * k1.square().sum(-2).unsqueeze(-2)
    d = torch.maximum(d, (r_shift * s_shift).to(d.dtype)[..., None, None] * lengths)
    later = Terms(k1.mT @ terms.r[2:] @ k1, k2.mT @ terms.s[2:] @ k2)
    if later.r.shape[0]:
        c = (RADIUS / _radius(later, d).clamp(min=torch.finfo(d.dtype).tiny)).clamp(max=1)
        later = later._replace(s=c[..., None, None] * later.s)
    return SumFactored(k1, k2, d, later)


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    return x + shift.to(x.dtype)[..., None, None] * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def solve_sum(factored: SumFactored, v: Tensor) -> Tensor:
    """The inverse on V [(q), o, i]."""
    k1, k2, d, later = factored
    x = k2.mT @ v @ k1
    if later.r.shape[0] == 0:
        return k2 @ (x / d) @ k1.mT
    root = d.rsqrt()
    return k2 @ (root * _chebyshev(lambda y: y + root * _applied(later, root * y), root * x)) @ k1.mT


def _applied(terms: Terms, x: Tensor) -> Tensor:
    """Σ_k S_k X R_k."""
    return (terms.s @ x @ terms.r).sum(0)


def _radius(later: Terms, d: Tensor) -> Tensor:
    """A number ≥ the spectral radius of D^{-½} E D^{-½}, the smaller of two bounds; one per group.

    Collatz-Wielandt: ρ(M) ≤ ρ(|M|) ≤ max (|M| x) / x for every x > 0. Norms: ρ ≤ Σ_k ‖S_k‖ ‖R_k‖ / min D.
    """
    root, sizes = d.rsqrt(), Terms(*(x.abs() for x in later))
    norms = [torch.linalg.eigvalsh(torch.nan_to_num(x, 0, 0, 0)).abs().amax(-1) for x in later]
    bound, x = (norms[0] * norms[1]).sum(0) / d.amin((-2, -1)), torch.ones_like(d)
    for _ in range(4):
        y = root * _applied(sizes, root * x)
        most = (y / x).amax((-2, -1))
        bound = torch.minimum(bound, most)
        x = x + y / most.clamp(min=torch.finfo(d.dtype).tiny)[..., None, None]
    return bound


def _chebyshev(operator: Operator, b: Tensor) -> Tensor:
    """operator⁻¹ b to the precision of b, for a spectrum within [1 − RADIUS, 1 + RADIUS]."""
    rate = RADIUS / (1 + sqrt(1 - RADIUS**2))
    steps = ceil(log(2 / torch.finfo(b.dtype).eps) / -log(rate))
    x, rest, change, weight = b, b - operator(b), b, RADIUS
    for _ in range(steps):
        weight, before = 1 / (2 / RADIUS - weight), weight
        change = weight * before * change + 2 * weight / RADIUS * rest
        x, rest = x + change, rest - operator(change)
    return x
