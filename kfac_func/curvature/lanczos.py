r"""Lanczos: the best sum of r Kronecker products, all of them from one Krylov space.

    Z ≈ U B Vᵀ,  B bidiagonal        S_k ⊗ R_k = σ_k V̂_k ⊗ Û_k,  (σ_k, Û_k, V̂_k) the leading triplets of U B Vᵀ

Source: Golub & Kahan 1965; for curvature: Koroko et al. 2022 (2201.10285), §3.4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_func._errors import at_least
from kfac_func.blocks import Block
from kfac_func.blocks.rearranged import output_moment, rearranged
from kfac_func.curvature.base import Batch, Structure
from kfac_func.damping import damped_sum
from kfac_func.linalg.krylov import golub_kahan
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


def lanczos(rank: int = 2, *, steps: int = 8, radius: int | None = None) -> Structure:
    r"""`rank` terms by Golub-Kahan bidiagonalisation of the rearranged F, with full re-orthogonalisation.

    rank     terms
    steps    of the bidiagonalisation, at least `rank`; each sees the batch twice. More steps than Z has rank do no harm
    radius   as in `kpsvd`

    The first batch starts at the second moment of the output gradients, later ones at Σ_k S_k. Damping, floor and
    averages are those of `deflation`. Raises HyperparameterError for values without meaning, and for split="exact" when
    it is factorised. Source: Koroko et al. 2022 (2201.10285), §3.4.

        >>> tx = kf.kfac(kf.curvature.lanczos(), damping=1e-2)
        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> state.curvature.matrix["weight"].s.shape
        torch.Size([2, 2, 2])
    """
    at_least(1, rank=rank)
    at_least(rank, steps=steps)
    at_least(0, radius=radius)
    name = f"lanczos[{rank}]" if radius is None else f"lanczos[{rank}, radius={radius}]"

    def prepare(block: Block) -> Any:
        return rearranged(block, radius)

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> Terms:
        start = warm(None if state == () else state.s.sum(0), batch.first)
        found = golub_kahan(*averaged(state, batch.ask, fraction), start, rank, steps)
        return changed(state, terms_of(found), fraction)

    def factorize(state: Terms, damping: Tensor, split: str) -> SumFactored:
        return damped_sum(state, damping, split, name)

    return Structure(name, output_moment, factorize, solve_sum, densified, matrix=True, prepare=prepare, absorb=absorb)
