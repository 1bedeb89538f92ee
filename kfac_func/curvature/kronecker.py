r"""K-FAC: one Kronecker product per block.

    F ≈ T · (G ⊗ A),     A = 1/(N T) Σ ā āᵀ     G = 1/(N T) Σ g gᵀ

Source: Martens & Grosse 2015 (1503.05671); convolutions: Grosse & Martens 2016 (1602.01407); shared weights:
Eschenhagen et al. 2023 (2311.00636).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func.blocks import Block, KroneckerState, Oversize, Side, densify, kronecker_state, merged, pattern
from kfac_func.curvature.base import Structure
from kfac_func.damping import damped_product, product_spectrum, solve_product
from kfac_func.linalg import Solver, Spectral, kron


def kronecker(
    solver: Solver = "cholesky",
    *,
    sua: bool = False,
    sides: Side = "both",
    max_dim: int | None = None,
    oversize: Oversize = "blocks",
    centred: bool = False,
) -> Structure:
    r"""The K-FAC block, damped as `split` says:

        "pi", "none"   v = (1/T) (G + √λ'/π I)⁻¹ V (A + π√λ' I)⁻¹,        λ' = λ/T, π from the traces, or 1
        "exact"        v = U_G [ (U_Gᵀ V U_A) ⊘ (T λ_G λ_Aᵀ + λ) ] U_Aᵀ     (always by eigh)

    solver    how factors of "pi" and "none" are inverted: "cholesky" (fast) or "eigh" (negative eigenvalues are cut
              at 0)
    sua       spatially uncorrelated activations: entries of A between different kernel offsets of a convolution are
              left out, so A is one C x C matrix per offset, of the input positions which that offset sees; the
              homogeneous 1 is a block of its own
    sides     "input": A alone, G becomes the identity times its mean eigenvalue (one-sided); "output": G alone
    max_dim   a factor with more rows is not dense: it keeps "blocks" of at most max_dim rows along its diagonal, or
              its "diagonal", as `oversize` says. A is never formed, so that heads of 50 000 rows are affordable
    centred   covariances in place of second moments: A − m mᵀ with the mean row m, likewise G for every output vector
              (the 1 of the bias is not centred). For sampled vectors, whose mean is zero: the mean of an `exact`
              column is most of it. Not with statistics that were reduced chunk by chunk

    V [o, i + 1], row-major vec(V) pairs with G ⊗ A; grouped layers have a Kronecker product per group. An embedding
    has a diagonal A. Raises HyperparameterError for unknown values. Sources: Martens & Grosse 2015 (1503.05671), §6.3;
    sua: Grosse & Martens 2016 (1602.01407), §4; sides="input": Benzing 2022 (2201.12250).

        >>> k = kf.curvature.kronecker()
        >>> state = kf.curvature.KroneckerState(torch.eye(3) * 4, torch.eye(2), torch.tensor(1.0), torch.tensor(1.0))
        >>> k.solve(k.factorize(state, torch.tensor(0.0), "pi"), torch.ones(2, 3))
        tensor([[0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500]])
    """
    if solver not in ("cholesky", "eigh"):
        raise HyperparameterError(explain("unknown solver.", got=repr(solver), wanted="'cholesky' or 'eigh'"))
    kept = pattern(sua=sua, sides=sides, max_dim=max_dim, oversize=oversize, centred=centred)

    def measure(block: Block) -> KroneckerState:
        return kronecker_state(block, kept)

    def factorize(state: KroneckerState, damping: Tensor, split: str) -> Any:
        return damped_product(*merged(state), damping, split, solver)

    def dense(state: KroneckerState) -> Tensor:
        a, g, t = merged(state)
        return t * kron(densify(g), densify(a))

    def spectrum(state: KroneckerState, damping: Tensor, split: str) -> Spectral:
        return product_spectrum(*merged(state), damping, split)

    name = f"kronecker[{solver}{kept.name}]"
    every = measure, factorize, solve_product, dense
    return Structure(name, *every, matrix=True, thin=True, spectrum=spectrum, summable=not centred)
