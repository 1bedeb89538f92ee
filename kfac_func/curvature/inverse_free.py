r"""Inverse-free K-FAC: Kronecker roots of the inverse factors, moved by matrix products (INGD, SINGD, IKFAC).

    v = (1/T) C Cᵀ V K Kᵀ        K ← K (I − β L̄_K),   L_K = Π(½ (Kᵀ (A + λ_a I) K − I)),   likewise C from G + λ_g I

The fixed point KᵀA'K = I is K Kᵀ = A'⁻¹ within the structure of K: no inverse and no decomposition is ever taken.
Source: Lin et al. 2023 (2312.05705).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import storable
from kfac_func.blocks import (
    Block,
    Factor,
    KroneckerState,
    add,
    densify,
    diagonal_of,
    kronecker_state,
    mean_eigenvalue,
    merged,
    pattern,
    scaled,
    transpose,
)
from kfac_func.curvature.base import Batch, Structure, average
from kfac_func.damping import Split, pi_split, product_spectrum
from kfac_func.linalg import Spectral, kron, times
from kfac_func.linalg.roots import excess, mean_within, moved, multiple

Structured = Literal["dense", "diagonal", "block_diagonal", "lower_triangular"]
DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)


class Options(NamedTuple):
    """The options of `inverse_free`."""

    structure: str = "dense"
    block_size: int | None = None
    adaptive: bool = False
    step: float = 1.0
    steps: int = 1
    warm_steps: int = 20
    momentum: float = 0.0
    dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The structure, and what differs from the defaults."""
        usual = Options(self.structure)._asdict()
        return self.structure + "".join(f", {k}={v}" for k, v in self._asdict().items() if v != usual[k])


class Roots(NamedTuple):
    """Something for K [(q), i, i] and for C [(q), o, o], in the form of A and G: the roots, or their momenta."""

    k: Factor
    c: Factor


class InverseFreeState(NamedTuple):
    """The averages of A and G as far as the structure sees them; the roots and their momenta, () before the first
    refresh (momenta: without momentum).
    """

    factors: KroneckerState
    roots: Any
    momenta: Any


class RootFactored(NamedTuple):
    """1/T, what an unobserved block is multiplied with (0 once it is observed), and the roots."""

    scale: Tensor
    unseen: Tensor
    roots: Roots


storable(Roots, InverseFreeState, RootFactored)


def inverse_free(
    structure: Structured = "dense",
    *,
    block_size: int | None = None,
    adaptive: bool = False,
    step: float = 1.0,
    steps: int = 1,
    warm_steps: int = 20,
    momentum: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Structure:
    r"""The inverse-free K-FAC block. A refresh makes `steps` multiplicative steps; `solve` is four products with roots.

        v = (1/T) C Cᵀ V K Kᵀ        K ← K (I − β L / max(1, 2‖L‖)),    L = Π(½ (Kᵀ (α A + s I) K − I))

    structure    of K and C, and so of what they converge to. "dense": K Kᵀ = (A + λ_a I)⁻¹, K-FAC itself;
                 "lower_triangular": the same inverse; "block_diagonal": the inverse of the diagonal blocks of at most
                 `block_size` rows; "diagonal": of the diagonal. A and G are kept (and measured) no further than this:
                 a diagonal costs O(i + o) memory. An embedding has a diagonal A and so a diagonal K
    adaptive     False (IKFAC): α = 1, s = λ_a of the split "pi" or "none" of λ/T. True (INGD): each side sees the
                 other, α = tr(CᵀGC)/o, s = (λ/T) tr(CᵀC)/o for K, then likewise for C with the new K; `split` has no
                 meaning, and K Kᵀ ⊗ C Cᵀ/T → (T · A ⊗ G)⁻¹ as λ → 0
    step         β in (0, 1]; 1 is Newton's step, which converges quadratically from close by
    steps        steps of a refresh; the first makes `warm_steps` from K = I/√(tr A/i + λ_a)
    momentum     μ in [0, 1): L ← μ L_old + L (Riemannian momentum; 0: none)
    dtype        in which roots and momenta are stored (None: that of the statistics); all products are made in the
                 precision of the statistics or of V, because A in bfloat16 is indefinite where damping is small

    Shapes: V [(q), o, i]. Far from the fixed point ‖KᵀA'K‖ falls to about a quarter or rises to 9/4 in a step. s is at
    least ε · tr(α A), ε of the statistics' dtype, so that roots stay finite. The damping acts at the next refresh.
    Raises HyperparameterError for values without meaning, and for split "exact" without `adaptive` when it refreshes.
    Source: Lin et al. 2023 (2312.05705).

        >>> f = kf.curvature.inverse_free()
        >>> factors = kf.curvature.KroneckerState(torch.eye(3) * 4, torch.eye(2), torch.tensor(1.0), torch.tensor(1.0))
        >>> state = f.absorb((), kf.curvature.Batch(factors, lambda question: None), torch.tensor(1.0))
        >>> state = f.refresh(state, torch.tensor(1e-8), "pi")
        >>> f.solve(f.factorize(state, torch.tensor(1e-8), "pi"), torch.ones(2, 3)).round(decimals=3)
        tensor([[0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500]])
    """
    options = Options(structure, block_size, adaptive, step, steps, warm_steps, momentum, dtype)
    _check(options)
    flat = structure == "diagonal"
    kept = pattern(sides="both", max_dim=1 if flat else block_size, oversize="diagonal" if flat else "blocks")

    def measure(block: Block) -> KroneckerState:
        return kronecker_state(block, kept)

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> InverseFreeState:
        factors = average(() if state == () else state.factors, batch.first, fraction)
        return InverseFreeState(factors, (), ()) if state == () else state._replace(factors=factors)

    def refresh(state: InverseFreeState, damping: Tensor, split: str) -> InverseFreeState:
        if split == "exact" and not adaptive:
            raise HyperparameterError(
                explain(
                    "inverse_free() has no exact damping.",
                    why="each root sees its own damped factor",
                    options="split='pi' or 'none'; inverse_free(adaptive=True); or eigen(), whose damping is exact",
                )
            )
        return _refreshed(options, state, damping, "none" if split == "none" else "pi")

    def factorize(state: InverseFreeState, damping: Tensor, split: str) -> RootFactored:
        del split
        *_, t = merged(state.factors)
        empty = state.factors.kept <= 0  # before the first statistics F̂ = 0, and roots mean nothing
        unseen = torch.where(empty, 1 / damping.to(t.dtype), 0.0)
        return RootFactored(torch.where(empty, 0.0, 1 / t), unseen, state.roots)

    def solve(factored: RootFactored, v: Tensor) -> Tensor:
        k, c = _cast(factored.roots, v.dtype)
        return times(c, times(transpose(c), v, k), transpose(k)) * factored.scale + v * factored.unseen

    def dense(state: InverseFreeState) -> Tensor:
        a, g, t = merged(state.factors)
        return t * kron(densify(g), densify(a))

    def spectrum(state: InverseFreeState, damping: Tensor, split: str) -> Spectral:
        return product_spectrum(*merged(state.factors), damping, split)

    every, more = (measure, factorize, solve, dense, True), {"absorb": absorb, "refresh": refresh}
    return Structure(f"inverse_free[{options.name}]", *every, **more, spectrum=spectrum, summable=True)


def _check(options: Options) -> None:
    size, blocks = options.block_size, options.structure == "block_diagonal"
    rules = {
        "structure": (options.structure in get_args(Structured), " or ".join(map(repr, get_args(Structured)))),
        "block_size": (
            (size is not None and size >= 1) if blocks else size is None,
            "at least 1 with structure='block_diagonal', None with the others",
        ),
        "step": (0 < options.step <= 1, "a number in (0, 1]"),
        "steps": (options.steps >= 1, "at least 1"),
        "warm_steps": (options.warm_steps >= 1, "at least 1"),
        "momentum": (0 <= options.momentum < 1, "a number in [0, 1)"),
        "dtype": (options.dtype in DTYPES, " or ".join(map(str, DTYPES))),
    }
    for name, (good, wanted) in rules.items():
        if not good:
            raise HyperparameterError(
                explain(f"{name} of inverse_free has no meaning.", got=repr(getattr(options, name)), wanted=wanted)
            )


def _refreshed(options: Options, state: InverseFreeState, damping: Tensor, split: Split) -> InverseFreeState:
    a, g, t = merged(state.factors)
    factors, damping = (a, g), (damping / t).to(t.dtype)
    shifts = pi_split(a, g, damping, split)
    first = state.roots == ()
    roots = Roots(*map(_start, factors, shifts)) if first else _cast(state.roots, t.dtype)
    momenta = _cast(state.momenta, t.dtype)
    for _ in range(options.warm_steps if first else options.steps):
        for side, other in ((0, 1), (1, 0)):
            seen = _seen(factors[other], roots[other], damping) if options.adaptive else (1.0, shifts[side])
            roots, momenta = _advanced(options, roots, momenta, side, _shifted(factors[side], *seen))
    own = t.dtype if options.dtype is None else options.dtype
    return state._replace(roots=_cast(roots, own), momenta=_cast(momenta, own))


def _advanced(options: Options, roots: Roots, momenta: Any, side: int, goal: Factor) -> tuple[Roots, Any]:
    """One step of one side towards the inverse of `goal`."""
    name, root = Roots._fields[side], roots[side]
    direction = excess(root, goal, lower=options.structure == "lower_triangular")
    if options.momentum:
        momenta = Roots(*(multiple(r, 0.0) for r in roots)) if momenta == () else momenta
        direction = add([scaled(momenta[side], options.momentum), direction])
        momenta = momenta._replace(**{name: direction})
    return roots._replace(**{name: moved(root, direction, options.step)}), momenta


def _start(factor: Factor, shift: Tensor) -> Factor:
    """I/√(mean eigenvalue + shift)."""
    tiny = torch.finfo(shift.dtype).tiny ** 0.5
    return multiple(factor, (mean_eigenvalue(factor) + shift).clamp(min=tiny).rsqrt())


def _seen(other: Factor, root: Factor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """What one side sees of the other: α = tr(CᵀGC)/o and s = λ tr(CᵀC)/o."""
    return mean_within(root, other), damping * mean_within(root)


def _shifted(factor: Factor, weight: Tensor | float, shift: Tensor) -> Factor:
    """α · factor + s · I, with s not below what the precision can tell from zero."""
    factor, info = scaled(factor, weight), torch.finfo(shift.dtype)
    floor = info.eps * diagonal_of(factor).sum(dim=-1) + info.tiny**0.5
    return add([factor, multiple(factor, torch.maximum(shift, floor))])


def _cast(roots: Any, dtype: torch.dtype) -> Any:
    return _tree.tree_map(lambda x: x.to(dtype), roots)
