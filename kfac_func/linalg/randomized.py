r"""Trace and diagonal of an operator on rows, [K, P] -> [K, P], from its products with random vectors.

Every function returns samples whose mean is the estimate. Rows are probes: random signs, or standard normal ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_func._tree import storable
from kfac_func._typing import PyTree
from kfac_func.linalg.inner import inner, orthonormal
from kfac_func.linalg.tridiagonal import Rows


class Estimate(NamedTuple):
    """An estimate and its standard error, of the same shape (or trees of the same structure)."""

    value: PyTree
    error: PyTree


storable(Estimate)


def estimate(samples: Float[Tensor, " n"]) -> Estimate:
    """Mean and standard error s/√n, with s² = Σ (t_i − t̄)²/(n − 1), for n ≥ 2.

    >>> estimate(torch.tensor([1.0, 3.0]))
    Estimate(value=tensor(2.), error=tensor(1.))
    """
    return Estimate(samples.mean(), samples.std() / len(samples) ** 0.5)


def quadratic_forms(products: Rows, probes: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
    """ωᵀ A ω, whose mean is Hutchinson's estimate of the trace."""
    return (probes * products(probes)).sum(-1)


def hutch_pp(products: Rows, sketch: Float[Tensor, "s p"], probes: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
    r"""The trace on the range of a sketch exactly, the rest by Hutchinson: 2s + k products.

        Q = orth(A Sᵀ)        t_i = tr(QᵀAQ) + g_iᵀ (I − QQᵀ) A (I − QQᵀ) g_i

    Source: Meyer, Musco, Musco & Woodruff 2021 (2010.09649), Algorithm 1.
    """
    q, _ = orthonormal(products(sketch))
    rest = probes - inner(probes, q) @ q
    return quadratic_forms(products, q).sum() + quadratic_forms(products, rest)


def xtrace(products: Rows, probes: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
    r"""The exchangeable estimator: every probe once tests what the sketch by all others leaves, at 2k products, k ≤ P.

        t_i = tr(Q_iᵀAQ_i) + (P − k + 1) r_iᵀ A r_i / ‖r_i‖²    r_i = (I − Q_iQ_iᵀ) ω_i,   Q_i = orth(A ω_j, j ≠ i)

    by Q R = AΩ and s_i ∝ R⁻ᵀ e_i of norm 1, with which Q_i Q_iᵀ = Q (I − s_i s_iᵀ) Qᵀ. The probes are normal (or of any
    law that rotations keep): only their directions matter.
    Source: Epperly, Tropp & Webber 2024 (2301.07825), §§2.1-2.3.
    """
    k, p = probes.shape
    images = products(probes)
    q, r = orthonormal(images)
    size = r.diagonal().abs()
    floor = torch.finfo(r.dtype).eps * size.amax()
    floor = torch.where(floor > 0, floor, 1.0)
    r = r + torch.diag(torch.where(size > floor, 0.0, floor))  # an operator of low rank leaves zeros there
    s = torch.linalg.solve_triangular(r.mT, torch.eye(k, dtype=r.dtype, device=r.device), upper=False)
    s = (s / torch.linalg.vector_norm(s, dim=0)).mT
    z = products(q)
    h, w = inner(q, z), inner(probes, q)
    u = w - (s * w).sum(-1, keepdim=True) * s
    rest = probes - u @ q
    quotient = (rest * (images - u @ z)).sum(-1) / rest.square().sum(-1)
    return h.trace() - (s @ h * s).sum(-1) + (p - k + 1) * quotient
