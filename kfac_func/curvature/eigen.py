r"""EKFAC: the eigenbasis of K-FAC with the exact diagonal of F in it.

    A = U_A Λ_A U_Aᵀ     G = U_G Λ_G U_Gᵀ     S* = (1/N) Σ_{v,n} (U_Gᵀ V_{v,n} U_A)∘²

    v = U_G [ (U_Gᵀ V U_A) ⊘ (S + λ) ] U_Aᵀ

S* is the best diagonal in that basis, ‖F − F_EKFAC‖ ≤ ‖F − F_KFAC‖, and it keeps the trace of F. Source: George et al.
2018 (1806.03884).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func._tree import storable
from kfac_func.blocks import (
    Block,
    Diagonal,
    Factor,
    KroneckerState,
    Oversize,
    kronecker_state,
    mapped,
    mean_squares,
    merged,
    pattern,
    squares,
    transpose,
)
from kfac_func.curvature.base import Batch, Structure, average
from kfac_func.damping import EigenFactored, solve_product
from kfac_func.linalg import Spectral, eigenbasis, refreshed_basis, times

Scalings = Literal["per_example", "intra_batch", "mean_gradient"]
Basis = Literal["eigh", "iteration"]


class Bases(NamedTuple):
    """The eigenbases U_A [(q), i, i] and U_G [(q), o, o]: the frame in which scalings are measured."""

    a: Factor
    g: Factor


class EigenState(NamedTuple):
    """The averages of A and G, the bases of the last refresh, and the average of S [(q), o, i] in them; () at first."""

    factors: KroneckerState
    bases: Any
    scalings: Any


storable(Bases, EigenState)


def eigen(
    scalings: Scalings = "per_example",
    *,
    basis: Basis = "eigh",
    sweeps: int = 1,
    share: float = 0.2,
    sua: bool = False,
    max_dim: int | None = None,
    oversize: Oversize = "blocks",
    centred: bool = False,
) -> Structure:
    r"""The EKFAC block. The gradient that is preconditioned is the one given; the damping is always exact (`split` has
    no meaning here).

    scalings   "per_example": the moving average of S* of every batch; "intra_batch": S* of the newest batch alone;
               "mean_gradient": the moving average of N (U_Gᵀ V̄ U_A)², V̄ the mean of the batch's gradients for each
               output vector ("EKFAC-ra"): cheaper, noisier, right only for vectors of mean zero. It is no mean over
               examples: micro-batches average it with their own N
    basis      how a refresh finds the new bases: "eigh", or "iteration": `sweeps` warm-started steps for the part
               `share` of the columns that has the largest eigenvalues, while the others only stay orthogonal to them.
               Any orthogonal basis gives a valid S, but one that lags behind a fast stream is a worse one. Factors
               below 64 rows are decomposed all the same
    sua, max_dim, oversize, centred    as in `kronecker`; they decide about A and G, hence about the bases, as does the
               sharing of the statistics: S is that of the examples' gradients under either

    At a refresh the old scalings are re-expressed in the new bases, S ← (R_G∘R_G)ᵀ S (R_A∘R_A) with R = U_oldᵀ U_new;
    then the batch at hand, if any, is seen in them. Three periods: A and G at every batch, bases every
    `refresh_every`, scalings every `scale_every` (see `kf.ekfac`). Raises HyperparameterError for unknown values.
    Source: George et al. 2018 (1806.03884).

        >>> tx = kf.kfac(kf.curvature.eigen(), damping=1e-2)
        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> state.curvature.matrix["weight"].scalings.shape
        torch.Size([2, 4])
    """
    _check(scalings, basis, sweeps, share)
    kept = pattern(sua=sua, sides="both", max_dim=max_dim, oversize=oversize, centred=centred)
    follow = None if basis == "eigh" else partial(refreshed_basis, sweeps=sweeps, share=share)
    diagonal = mean_squares if scalings == "mean_gradient" else squares

    def measure(block: Block) -> KroneckerState:
        return kronecker_state(block, kept)

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> EigenState:
        factors = average(() if state == () else state.factors, batch.first, fraction)
        return EigenState(factors, (), ()) if state == () else state._replace(factors=factors)

    def refresh(state: EigenState, damping: Tensor, split: str) -> EigenState:
        del damping, split
        a, g, _ = merged(state.factors)
        if state.bases == ():
            return state._replace(bases=Bases(eigenbasis(a)[1], eigenbasis(g)[1]))
        bases = Bases(*(_moved(x, u, follow) for x, u in zip((a, g), state.bases, strict=True)))
        return EigenState(state.factors, bases, reexpressed(state.scalings, state.bases, bases))

    def scale(state: EigenState, batch: Batch, fraction: Tensor) -> EigenState:
        seen = batch.ask(lambda block: diagonal(block, state.bases.a, state.bases.g))
        weight = (fraction > 0).to(fraction.dtype) if scalings == "intra_batch" else fraction
        return state._replace(scalings=average(state.scalings, seen, weight))

    def factorize(state: EigenState, damping: Tensor, split: str) -> EigenFactored:
        a, g, values = _spectrum(state, damping, split)
        return EigenFactored(a, g, 1 / values)

    own = f"{scalings}, {basis}{kept.name}"
    return Structure(
        f"eigen[{own}]",
        measure,
        factorize,
        solve_product,
        _dense,
        matrix=True,
        absorb=absorb,
        refresh=refresh,
        scale=scale,
        thin=True,
        spectrum=_spectrum,
        summable=not centred,
    )


def _check(scalings: str, basis: str, sweeps: int, share: float) -> None:
    for name, value, choices in (("scalings", scalings, get_args(Scalings)), ("basis", basis, get_args(Basis))):
        if value not in choices:
            raise HyperparameterError(
                explain(f"unknown {name}.", got=repr(value), wanted=" or ".join(map(repr, choices)))
            )
    at_least(1, sweeps=sweeps)
    if not 0 < share <= 1:
        raise HyperparameterError(explain("share is a part of the columns.", got=share, wanted="a number in (0, 1]"))


def _spectrum(state: EigenState, damping: Tensor, split: str) -> Spectral:
    del split
    return Spectral(state.bases.a, state.bases.g, state.scalings + damping.to(state.scalings.dtype))


def _dense(state: EigenState) -> Tensor:
    return Spectral(state.bases.a, state.bases.g, state.scalings).dense()


def _moved(factor: Factor, old: Factor, follow: Callable[[Tensor, Tensor], Tensor] | None) -> Factor:
    """The new basis of a factor, from scratch or by following it from the old one."""
    if follow is None or isinstance(factor, Diagonal):
        return eigenbasis(factor)[1]
    return mapped(lambda block, u: follow(block, u) if block.shape[-1] else u, factor, old)


def reexpressed(scalings: Tensor, old: Bases, new: Bases) -> Tensor:
    """(R_G∘R_G)ᵀ S (R_A∘R_A): the diagonal, in the new bases, of what is diagonal in the old ones."""
    a, g = (_squared_rotation(x, y) for x, y in zip(old, new, strict=True))
    return times(transpose(g), scalings, a)


def _squared_rotation(old: Factor, new: Factor) -> Factor:
    if isinstance(old, Diagonal):
        return old
    return mapped(lambda u, w: (u.mT @ w).square(), old, new)
