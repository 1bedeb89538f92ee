"""Recipes: the settings of the house put together, for reading and copying.

Every recipe is `kfac` with a curvature. They share its settings, which are keyword arguments of the same names and
defaults unless said otherwise: `damping`, `decay`, `average`, `refresh_every`, and `split` where the damping can be
factored.
"""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack

import torch

from kfac_func import curvature as structures
from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func._typing import ScalarOrSchedule
from kfac_func.curvature import Curvature, Structure
from kfac_func.curvature.coarse import CoarseSpace, Form, Resample, Space
from kfac_func.curvature.eigen import Basis, Scalings
from kfac_func.curvature.inverse_free import Structured
from kfac_func.damping import Split
from kfac_func.linalg import Solver
from kfac_func.linalg.gram import Rule
from kfac_func.precondition import preconditioner
from kfac_func.state import Average, Options
from kfac_func.transforms import GradientTransformation


class Periods(TypedDict, total=False):
    """The settings of `kfac` that every recipe takes."""

    damping: ScalarOrSchedule
    decay: float
    average: Average
    refresh_every: int


class Settings(Periods, total=False):
    """Those of recipes whose damping can be factored."""

    split: Split


def kfac(
    curvature: Structure | Curvature | None = None,
    *,
    damping: ScalarOrSchedule = 1e-3,
    split: Split = "pi",
    decay: float = 0.95,
    refresh_every: int = 10,
    average: Average = "debiased",
) -> GradientTransformation:
    r"""Precondition gradients by the damped inverse of a curvature approximation: v = (F̂ + λ)⁻¹ g.

    The update returns a direction, not yet scaled by a learning rate: `chain(kfac(), sgd(0.1, momentum=0.9))`.
    Statistics are passed as `stats=` (None on steps that skip them); before the first ones the gradients pass
    unchanged.

    curvature      a structure for matrix blocks (scale-and-shift and unclaimed blocks get `diagonal()`), or a whole
                   Curvature; default `kronecker()`
    damping        λ ≥ 0 in units of the curvature of the loss: a number, a 0-dim tensor (gradients flow through it)
                   or a schedule of the update count
    split          "pi": factored damping with π; "none": factored with π = 1; "exact": Tikhonov in the eigenbasis.
                   Structures whose damping is of one kind only say so
    decay          β in [0, 1), the weight of the OLD average
    average        "debiased": W ← βW + 1, X ← X + (x − X)/W; "warmup": the old weight is min(1 − 1/k, β) at the k-th
                   statistics
    refresh_every  k: refresh and factorise at the first statistics and then every k updates. Young averages change
                   fast, so the interval grows: 1 during the first k updates, 2 during the next k, …
                   `update(..., refresh=...)` decides otherwise

    State: `KFacState`, a NamedTuple of tensors. Under vmap and torch.compile pass `refresh=` explicitly, or use
    refresh_every=1. Raises HyperparameterError for values without meaning. Source: Martens & Grosse 2015 (1503.05671).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse())
        >>> tx = kf.chain(kf.kfac(damping=1e-3), kf.sgd(0.1, momentum=0.9))
        >>> batch, generator = (torch.randn(5, 3), torch.randn(5, 2)), torch.Generator().manual_seed(0)
        >>> value, grads, stats = step(params, batch, generator=generator)
        >>> updates, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> params = kf.apply_updates(params, updates)
    """
    chosen = structures.kronecker() if curvature is None else curvature
    return _link(chosen, damping=damping, split=split, decay=decay, refresh_every=refresh_every, average=average)


def ekfac(
    scalings: Scalings = "per_example",
    *,
    scale_every: int = 1,
    basis: Basis = "eigh",
    sweeps: int = 1,
    share: float = 0.2,
    sua: bool = False,
    **settings: Unpack[Periods],
) -> GradientTransformation:
    r"""EKFAC: the exact diagonal in the eigenbasis of K-FAC, `kf.curvature.eigen` with three periods.

    v = U_G [ (U_Gᵀ V U_A) ⊘ (S + λ) ] U_Aᵀ

    scalings, basis, sweeps, share, sua    as in `kf.curvature.eigen`
    scale_every    k: scalings at every k-th update that has statistics (growing like `refresh_every`;
                   `update(..., scale=...)` decides otherwise). A and G are averaged at every batch, the bases move
                   every `refresh_every`
    settings       damping (always exact), decay, average, refresh_every of `kfac`

    Raises HyperparameterError for values without meaning. Source: George et al. 2018 (1806.03884).

        >>> tx = kf.chain(kf.ekfac(damping=1e-3, scale_every=2), kf.sgd(0.1))
        >>> tx.init({"w": torch.ones(2)})[0].rules.value.options.scale_every
        2
    """
    structure = structures.eigen(scalings, basis=basis, sweeps=sweeps, share=share, sua=sua)
    return _link(structure, scale_every=scale_every, **settings)


def kpsvd(
    solver: Solver = "cholesky",
    *,
    iterations: int = 10,
    tolerance: float = 1e-3,
    radius: int | None = None,
    **settings: Unpack[Settings],
) -> GradientTransformation:
    """The nearest Kronecker product to the exact block, `kf.curvature.kpsvd`, with the settings of `kfac`.

    >>> tx = kf.chain(kf.kpsvd(damping=1e-2, split="exact"), kf.sgd(0.1))
    """
    return _link(structures.kpsvd(solver, iterations=iterations, tolerance=tolerance, radius=radius), **settings)


def deflation(
    rank: int = 2,
    *,
    iterations: int = 10,
    tolerance: float = 1e-3,
    radius: int | None = None,
    **settings: Unpack[Settings],
) -> GradientTransformation:
    """`rank` Kronecker products one after the other, `kf.curvature.deflation`, with the settings of `kfac` (split "pi"
    or "none").

    >>> tx = kf.chain(kf.deflation(damping=1e-2), kf.sgd(0.1))
    """
    return _link(structures.deflation(rank, iterations=iterations, tolerance=tolerance, radius=radius), **settings)


def corrected(
    *, iterations: int = 10, tolerance: float = 1e-3, radius: int | None = None, **settings: Unpack[Settings]
) -> GradientTransformation:
    """K-FAC and the product nearest to what it misses, `kf.curvature.corrected`, with the settings of `kfac` (split
    "pi" or "none").

    >>> tx = kf.chain(kf.corrected(damping=1e-2), kf.sgd(0.1))
    """
    return _link(structures.corrected(iterations=iterations, tolerance=tolerance, radius=radius), **settings)


def lanczos(
    rank: int = 2, *, steps: int = 8, radius: int | None = None, **settings: Unpack[Settings]
) -> GradientTransformation:
    """`rank` Kronecker products at once by bidiagonalisation, `kf.curvature.lanczos`, with the settings of `kfac`
    (split "pi" or "none").

    >>> tx = kf.chain(kf.lanczos(damping=1e-2), kf.sgd(0.1))
    """
    return _link(structures.lanczos(rank, steps=steps, radius=radius), **settings)


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
    **settings: Unpack[Settings],
) -> GradientTransformation:
    """Roots of the inverse factors by matrix products alone, `kf.curvature.inverse_free`, with the settings of `kfac`;
    `refresh_every` is 1 unless given, because a refresh is one small step of the roots.

    >>> tx = kf.chain(kf.inverse_free("diagonal", damping=1e-2, dtype=torch.bfloat16), kf.sgd(0.1))
    """
    chosen = structures.inverse_free(
        structure,
        block_size=block_size,
        adaptive=adaptive,
        step=step,
        steps=steps,
        warm_steps=warm_steps,
        momentum=momentum,
        dtype=dtype,
    )
    settings.setdefault("refresh_every", 1)
    return _link(chosen, **settings)


def exact_natural_gradient(
    block_diagonal: bool = False, *, rule: Rule = "standard", window: int = 1, **settings: Unpack[Periods]
) -> GradientTransformation:
    """The natural gradient itself, (F + λI)⁻¹ g without ever forming F: `kf.curvature.full` over all layers together,
    or `kf.curvature.block_diagonal` layer by layer, with the settings of `kfac`. `refresh_every` is 1 unless given; the
    averages reach over the last `window` batches.

    >>> tx = kf.chain(kf.exact_natural_gradient(damping=1e-2), kf.sgd(1.0))
    """
    settings.setdefault("refresh_every", 1)
    return _link(_exact(block_diagonal, rule, window), **settings)


def two_level_kfac(
    coarse: CoarseSpace | Space = "nicolaides",
    *,
    form: Form = "residual",
    weights: tuple[float, float] = (1.0, 1.0),
    krylov: bool = False,
    resample: Resample = "nearest",
    curvature: Structure | Curvature | None = None,
    **settings: Unpack[Settings],
) -> GradientTransformation:
    """K-FAC with a coarse level over its blocks, `kf.curvature.two_level` of `curvature` (default `kronecker()`), with
    the settings of `kfac`.

    >>> tx = kf.chain(kf.two_level_kfac("residual", damping=1e-2), kf.sgd(0.1))
    """
    inner = structures.kronecker() if curvature is None else curvature
    chosen = structures.two_level(inner, coarse, form=form, weights=weights, krylov=krylov, resample=resample)
    return _link(chosen, **settings)


def _exact(blocks: bool, rule: Rule, window: int) -> Curvature:
    if not blocks:
        return structures.full(rule=rule, window=window)
    own = structures.block_diagonal(rule=rule, window=window)
    return structures.blockwise(own, own)


def _link(
    curvature: Structure | Curvature,
    *,
    damping: ScalarOrSchedule = 1e-3,
    split: Literal["pi", "none", "exact"] = "pi",
    decay: float = 0.95,
    refresh_every: int = 10,
    average: Average = "debiased",
    scale_every: int = 1,
) -> GradientTransformation:
    """Check the settings and make the link of the chain."""
    if isinstance(damping, (int, float)) and not 0 <= damping < float("inf"):
        raise HyperparameterError(explain("damping must be finite and not negative.", got=damping))
    if split not in ("pi", "none", "exact"):
        raise HyperparameterError(explain("unknown split.", got=repr(split), wanted="'pi', 'none' or 'exact'"))
    if average not in ("debiased", "warmup"):
        raise HyperparameterError(explain("unknown average.", got=repr(average), wanted="'debiased' or 'warmup'"))
    if not 0 <= decay < 1:
        raise HyperparameterError(explain("decay must be in [0, 1): it is the weight of the old average.", got=decay))
    at_least(1, refresh_every=refresh_every, scale_every=scale_every)
    tree = structures.blockwise(curvature) if isinstance(curvature, Structure) else curvature
    return preconditioner(tree, damping, Options(split, decay, average, refresh_every, scale_every))
