"""Leading singular triplets of an operator that is only known by its products, and the inverse of a two-term sum.

Z maps symmetric V [..., o, o] to symmetric [..., i, i], its adjoint maps back, with ⟨X, Y⟩ = Σ X∘Y. When Z rearranges a
curvature block F, its triplets are the terms of the best approximations of F by Kronecker products,

    Z v ≈ Σ_k σ_k left_k ⟨right_k, v⟩    ⟺    F ≈ Σ_k σ_k right_k ⊗ left_k.

Everything is relative: a scaled Z has the same vectors and scaled values; where Z is zero, so are its triplets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_func._tracing import at_hand

Operator: TypeAlias = Callable[[Tensor], Tensor]


class Triplet(NamedTuple):
    """σ [...] ≥ 0, left [..., i, i] and right [..., o, o] of norm 1, tr(left) ≥ 0; all zero where σ is."""

    sigma: Tensor
    left: Tensor
    right: Tensor


def power(forward: Operator, adjoint: Operator, start: Tensor, iterations: int, tolerance: float) -> Triplet:
    """The leading triplet by at most `iterations` ≥ 1 rounds of right ← ZᵀZ right / ‖·‖ from `start` [..., o, o].

    Ends where ‖change of right‖ ≤ tolerance, for each operator of a batch by itself. It cannot see what `start` is
    orthogonal to; for the first triplet of a Z that keeps matrices positive semi-definite, any definite start will do.
    """
    _, right = _unit(start)
    _, left = _unit(forward(right))
    sigma, new = _unit(adjoint(left))
    triplet, done = Triplet(sigma, left, new), _norm(new - right) <= tolerance
    for _ in range(iterations - 1):
        if at_hand(done) and bool(done.all()):
            break
        _, left = _unit(forward(triplet.right))
        sigma, right = _unit(adjoint(left))
        settled = _norm(right - triplet.right) <= tolerance
        pairs = zip(triplet, (sigma, left, right), strict=True)
        triplet = Triplet(*(torch.where(_over(done, new), old, new) for old, new in pairs))
        done = done | settled
    return _signed(triplet)


def deflated(forward: Operator, adjoint: Operator, triplets: Sequence[Triplet]) -> tuple[Operator, Operator]:
    """Z less its given triplets, Z v − Σ_k σ_k ⟨right_k, v⟩ left_k, and the adjoint of that."""

    def onward(v: Tensor) -> Tensor:
        out = forward(v)
        for sigma, left, right in triplets:
            out = out - _over(sigma * _inner(right, v), left) * left
        return out

    def back(u: Tensor) -> Tensor:
        out = adjoint(u)
        for sigma, left, right in triplets:
            out = out - _over(sigma * _inner(left, u), right) * right
        return out

    return onward, back


def golub_kahan(forward: Operator, adjoint: Operator, start: Tensor, rank: int, steps: int) -> list[Triplet]:
    """The leading `rank` triplets by max(steps, rank) steps of Golub-Kahan bidiagonalisation from `start` [..., o, o].

        Z v_j = β_{j-1} u_{j-1} + α_j u_j        Zᵀ u_j = α_j v_j + β_j v_{j+1}        Z ≈ U B Vᵀ,  B = bidiag(α, β)

    Both bases are fully re-orthogonalised. Where an α or β falls to ε^¾ of the largest one, the Krylov space is
    exhausted and zero vectors follow, so that triplets beyond the rank are zero; of equal singular values it holds one
    vector. Derivatives beyond the rank are NaN, as those of `torch.linalg.svd` are for equal values.
    """
    cut = torch.finfo(start.dtype).eps ** 0.75
    largest, right = _unit(start)
    largest = torch.zeros_like(largest)
    lefts, rights, alphas, betas = [], [], [], []
    for _ in range(max(steps, rank)):
        rights.append(right)
        alpha, left = _unit(_orthogonal(forward(right), lefts))
        largest = torch.maximum(largest, alpha)
        alpha, left = _kept(alpha > cut * largest, alpha, left)
        lefts.append(left)
        beta, right = _unit(_orthogonal(adjoint(left), rights))
        largest = torch.maximum(largest, beta)
        beta, right = _kept(beta > cut * largest, beta, right)
        alphas.append(alpha)
        betas.append(beta)
    bidiagonal = torch.diag_embed(torch.stack(alphas, -1))
    if len(betas) > 1:
        bidiagonal = bidiagonal + torch.diag_embed(torch.stack(betas[:-1], -1), offset=1)
    p, sigmas, qh = torch.linalg.svd(bidiagonal)
    found = sigmas > cut * sigmas[..., :1]
    left, right = (
        torch.einsum("...jab,...jk->...kab", torch.stack(basis, -3), vectors * found.unsqueeze(-2))
        for basis, vectors in ((lefts, p), (rights, qh.mT))
    )
    sigmas = sigmas * found
    return [_signed(Triplet(sigmas[..., k], left[..., k, :, :], right[..., k, :, :])) for k in range(rank)]


def start_matrix(size: int, like: Tensor) -> Tensor:
    """A fixed symmetric matrix [size, size] of norm 1 with no structure that an operator could be orthogonal to."""
    index = torch.arange(1, size + 1, dtype=torch.float64, device=like.device)
    row, column = index.unsqueeze(-1), index
    matrix = torch.sin(2**0.5 * (row * row + column * column) + 3**0.5 * row * column)
    matrix = matrix + matrix.mT  # equal entries to the last bit, which vectorised sines are not
    return (matrix / torch.linalg.vector_norm(matrix)).to(like.dtype)


def two_term(
    p: Float[Tensor, "*q i i"],
    q: Float[Tensor, "*q o o"],
    r2: Float[Tensor, "*q i i"],
    s2: Float[Tensor, "*q o o"],
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """K₁ [..., i, i], K₂ [..., o, o] and D [..., o, i] with (Q ⊗ P + S₂ ⊗ R₂)⁻¹ vec(V) = vec(K₂ [(K₂ᵀ V K₁) ⊘ D] K₁ᵀ).

        K₁ᵀ P K₁ = I,  K₁ᵀ R₂ K₁ = diag(s₁)        K₂ᵀ Q K₂ = I,  K₂ᵀ S₂ K₂ = diag(s₂)        D = max(1 + s₂ s₁ᵀ, floor)

    P and Q are symmetric positive definite, dampings included; R₂ and S₂ are symmetric, and the floor > 0 keeps the
    inverse positive definite where their term outweighs the first. NaN where P or Q is not definite in this precision.
    """
    k1, s1 = _congruence(p, r2)
    k2, s2 = _congruence(q, s2)
    return k1, k2, (1 + s2.unsqueeze(-1) * s1.unsqueeze(-2)).clamp(min=floor)


def _congruence(definite: Tensor, symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """K = L⁻ᵀE and s, with definite = LLᵀ and L⁻¹ · symmetric · L⁻ᵀ = E diag(s) Eᵀ."""
    lower, info = torch.linalg.cholesky_ex(definite)
    half = torch.linalg.solve_triangular(lower, symmetric, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    valid = (info == 0) & whitened.isfinite().all(-1).all(-1)
    # eigh raises for matrices that are not finite
    values, vectors = torch.linalg.eigh(torch.where(_over(valid, whitened), whitened, 0.0))
    k = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    return torch.where(_over(valid, k), k, torch.nan), torch.where(valid.unsqueeze(-1), values, torch.nan)


def _over(scalars: Tensor, matrices: Tensor) -> Tensor:
    """[...] or [..., 1, 1], to broadcast over [...] or [..., d, d]."""
    return scalars if scalars.ndim == matrices.ndim else scalars[..., None, None]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((-2, -1))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1))


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norm [...] and direction, (0, 0) for zero; scaled first, since the squares of small entries underflow."""
    scale = x.detach().abs().amax((-2, -1))
    x = x / _over(torch.where(scale > 0, scale, 1.0), x)
    norm = _norm(x)
    return scale * norm, x / _over(torch.where(norm > 0, norm, 1.0), x)


def _orthogonal(x: Tensor, basis: list[Tensor]) -> Tensor:
    """x less its components along the orthonormal `basis`; the second pass removes the rounding errors of the first."""
    for _ in range(2 if basis else 0):
        every = torch.stack(basis, -3)
        x = x - torch.einsum("...jab,...j->...ab", every, torch.einsum("...jab,...ab->...j", every, x))
    return x


def _kept(keep: Tensor, value: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(keep, value, 0.0), torch.where(_over(keep, vector), vector, 0.0)


def _signed(triplet: Triplet) -> Triplet:
    trace = triplet.left.diagonal(dim1=-2, dim2=-1).sum(-1)
    sign = _over(torch.where(trace < 0, -1.0, 1.0).to(trace.dtype), triplet.left)
    return Triplet(triplet.sigma, sign * triplet.left, sign * triplet.right)
