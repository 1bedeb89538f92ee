r"""Deflation: the best sum of r Kronecker products, one after the other.

    min ‖F − Σ_k S_k ⊗ R_k‖        term k is the nearest product to F − Σ_{l<k} S_l ⊗ R_l

Source: Koroko et al. 2022 (2201.10285), §3.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_func._errors import at_least
from kfac_func.blocks import Block
from kfac_func.blocks.rearranged import output_moment, rearranged
from kfac_func.curvature.base import Batch, Structure
from kfac_func.damping import damped_sum
from kfac_func.linalg.krylov import Triplet, deflated, power, start_matrix
from kfac_func.linalg.sums import (
    SumFactored,
    Terms,
    averaged,
    changed,
    densified,
    solve_sum,
    terms_of,
    warm,
)


def deflation(rank: int = 2, *, iterations: int = 10, tolerance: float = 1e-3, radius: int | None = None) -> Structure:
    r"""`rank` terms by power iteration on the deflated operator; ‖F − F̂‖² = Σ_{k>rank} σ_k².

        Z V̂ − Σ_{l<k} ⟨S_l, V̂⟩ R_l        (S₁ + λ_g I) ⊗ (R₁ + λ_a I) + Σ_{k≥2} S_k ⊗ R_k

    rank         terms; one is `kpsvd`
    iterations, tolerance, radius        for each term, as in `kpsvd`

    R_k and S_k are symmetric; antisymmetric pairs, which F may have where positions are shared, are not looked for.
    The damping goes to the first term ("pi" or "none"). The sum need not be positive definite: its eigenvalues relative
    to the damped first term are floored at 0.1 (two terms), and terms beyond the second are scaled down together where
    their certified size exceeds 0.9 of that. The state is the best sum for (1 − fraction) · F̂ + fraction · F. Raises
    HyperparameterError for values without meaning, and for split="exact" when it is factorised. Source: Koroko et al.
    2022 (2201.10285), §3.2.

        >>> tx = kf.kfac(kf.curvature.deflation(), damping=1e-2)
        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> state.curvature.matrix["weight"].r.shape
        torch.Size([2, 4, 4])
    """
    at_least(1, rank=rank, iterations=iterations)
    at_least(0, radius=radius)
    name = f"deflation[{rank}]" if radius is None else f"deflation[{rank}, radius={radius}]"

    def prepare(block: Block) -> Any:
        return rearranged(block, radius)

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> Terms:
        g, products = batch.first, averaged(state, batch.ask, fraction)
        found: list[Triplet] = []
        for k in range(rank):
            fresh = start_matrix(g.shape[-1], g).expand_as(g) if k else g
            start = warm(None if state == () else state.s[k], fresh)
            found.append(power(*deflated(*products, found), start, iterations, tolerance))
        return changed(state, terms_of(found), fraction)

    def factorize(state: Terms, damping: Tensor, split: str) -> SumFactored:
        return damped_sum(state, damping, split, name)

    return Structure(name, output_moment, factorize, solve_sum, densified, matrix=True, prepare=prepare, absorb=absorb)
