r"""The exact diagonal of a block, from per-example gradients.

    D = (1/N) Σ_{v,n} V_{v,n} ∘ V_{v,n}          v = V ⊘ (D + λ)

Every example's gradient is summed over its positions BEFORE it is squared. Source: mathematics of Kunstner et al.
2019 (1905.12558), §2.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kfac_func._tree import storable
from kfac_func.blocks import Block, apart, squares
from kfac_func.curvature.base import Structure
from kfac_func.linalg import Spectral, elementwise


class DiagonalState(NamedTuple):
    """D, with the shape of V."""

    squares: Tensor


class DiagonalFactored(NamedTuple):
    """1/(D + λ)."""

    inverse: Tensor


storable(DiagonalState, DiagonalFactored)


def diagonal(*, crossed: bool = False) -> Structure:
    r"""The diagonal of F. `split` has no meaning here: the damping is always exact.

        v = V ⊘ (D + λ),        D = (1/N) Σ_{v,n} V_{v,n}²

    crossed   take blocks of examples that see each other too (batch statistics): D is then right in expectation, for
              vectors of mean zero. Without it they are refused with StateError, as D is promised to be exact

    >>> d = kf.curvature.diagonal()
    >>> d.solve(d.factorize(kf.curvature.DiagonalState(torch.ones(2)), torch.tensor(1.0), "pi"), torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    def measure(block: Block) -> DiagonalState:
        return DiagonalState(squares(block if crossed else apart(block, "diagonal()")))

    def factorize(state: DiagonalState, damping: Tensor, split: str) -> DiagonalFactored:
        del split
        return DiagonalFactored(1 / (state.squares + damping.to(state.squares.dtype)))

    def solve(factored: DiagonalFactored, v: Tensor) -> Tensor:
        return v * factored.inverse

    def dense(state: DiagonalState) -> Tensor:
        return state.squares.flatten().diag()

    def spectrum(state: DiagonalState, damping: Tensor, split: str) -> Spectral:
        del split
        return elementwise(state.squares + damping.to(state.squares.dtype))

    return Structure("diagonal", measure, factorize, solve, dense, spectrum=spectrum, summable=True)
