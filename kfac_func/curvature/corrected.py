r"""K-FAC and the Kronecker product that is nearest to what it misses.

    F ≈ T · (G ⊗ A) + S ⊗ R,        min over R, S of ‖F − T · (G ⊗ A) − S ⊗ R‖

Source: Koroko et al. 2022 (2201.10285), §3.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import at_least
from kfac_func._tree import storable
from kfac_func.blocks import Block, KroneckerState, densify, kronecker_state, merged
from kfac_func.blocks.rearranged import Rearranged, rearranged
from kfac_func.curvature.base import Batch, Structure, average
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


class CorrectedState(NamedTuple):
    """The averages of A and G, and the one further term."""

    kronecker: KroneckerState
    correction: Terms


class CorrectedPrepared(NamedTuple):
    """The factors of a batch, and its exact block."""

    kronecker: KroneckerState
    exact: Rearranged


storable(CorrectedState, CorrectedPrepared)


def corrected(*, iterations: int = 10, tolerance: float = 1e-3, radius: int | None = None) -> Structure:
    r"""K-FAC as the first of two terms, R₁ = T · A and S₁ = G; the second by power iteration on what it misses.

        Z V̂ − ⟨G, V̂⟩ T · A        (G + λ_g I) ⊗ (T · A + λ_a I) + S ⊗ R

    iterations, tolerance, radius        as in `kpsvd`; K-FAC is not changed by the radius

    A and G are averaged as in `kronecker`; the correction is the best one for (1 − fraction) · F̂ + fraction · F, with
    the F̂ of before. Damping and floor are those of `deflation`. Raises HyperparameterError for values without meaning,
    and for split="exact" when it is factorised. Source: Koroko et al. 2022 (2201.10285), §3.3.

        >>> tx = kf.kfac(kf.curvature.corrected(), damping=1e-2)
        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> state.curvature.matrix["weight"].correction.r.shape
        torch.Size([1, 4, 4])
    """
    at_least(1, iterations=iterations)
    at_least(0, radius=radius)
    name = "corrected" if radius is None else f"corrected[radius={radius}]"

    def prepare(block: Block) -> CorrectedPrepared:
        return CorrectedPrepared(kronecker_state(block), rearranged(block, radius))

    def measure(prepared: CorrectedPrepared) -> KroneckerState:
        return prepared.kronecker

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> CorrectedState:
        old, before, terms = ((), (), ()) if state == () else (*state, _terms(state))
        kronecker = average(old, batch.first, fraction)
        r, s = _first(kronecker)
        missed = deflated(*averaged(terms, batch.about(_exact), fraction), [Triplet(r.new_ones(r.shape[:-2]), r, s)])
        start = warm(None if state == () else state.correction.s[0], start_matrix(s.shape[-1], s).expand_as(s))
        found = power(*missed, start, iterations, tolerance)
        return CorrectedState(kronecker, changed(before, terms_of([found]), fraction))

    def factorize(state: CorrectedState, damping: Tensor, split: str) -> SumFactored:
        return damped_sum(_terms(state), damping, split, name)

    def dense(state: CorrectedState) -> Tensor:
        return densified(_terms(state))

    return Structure(name, measure, factorize, solve_sum, dense, matrix=True, prepare=prepare, absorb=absorb)


def _exact(prepared: CorrectedPrepared) -> Rearranged:
    return prepared.exact


def _first(kronecker: KroneckerState) -> tuple[Tensor, Tensor]:
    a, g, t = merged(kronecker)
    return t * densify(a), densify(g)


def _terms(state: CorrectedState) -> Terms:
    first = Terms(*_first(state.kronecker))
    return Terms(*(torch.cat([x.unsqueeze(0), y]) for x, y in zip(first, state.correction, strict=True)))
