"""Recipes: the settings of the house put together, for reading and copying.

Every recipe is `kfac` with a curvature. They share its settings, which are keyword arguments of the same names and
defaults unless said otherwise, `split` only where the damping can be factored.
"""

from __future__ import annotations

from typing import Unpack

import torch

from kfac_func import curvature as structures
from kfac_func._typing import ScalarOrSchedule
from kfac_func.curvature import Curvature, Structure
from kfac_func.curvature.coarse import CoarseSpace, Form, Resample, Space
from kfac_func.curvature.eigen import Basis, Scalings
from kfac_func.curvature.inverse_free import Structured
from kfac_func.damping import Split
from kfac_func.linalg import Solver
from kfac_func.linalg.gram import Rule
from kfac_func.precondition.settings import Periods, Settings, link
from kfac_func.precondition.transform import Damping
from kfac_func.state import Average
from kfac_func.transforms import GradientTransformation
from kfac_func.transforms.masks import Mask


def kfac(
    curvature: Structure | Curvature | None = None,
    *,
    damping: Damping = 1e-3,
    split: Split = "pi",
    decay: ScalarOrSchedule = 0.95,
    refresh_every: int = 10,
    average: Average = "debiased",
    burn_in: int = 0,
    scale_every: int = 1,
    growing: bool = True,
    stagger: bool = False,
    l2: float = 0.0,
    l2_mask: Mask | None = None,
) -> GradientTransformation:
    r"""Precondition gradients by the damped inverse of a curvature approximation: v = (F̂ + λ)⁻¹ g.

    The update returns a direction, not yet scaled by a learning rate: `chain(kfac(), sgd(0.1, momentum=0.9))`.
    Statistics are passed as `stats=`: those of a batch, a sequence of those of its micro-batches (which count as one
    batch: means over all their examples), or None on steps that skip them; how often is the first period, T_cov.
    Before the first ones the gradients pass unchanged.

    curvature      a structure for matrix blocks (scale-and-shift and unclaimed blocks get `diagonal()`), or a whole
                   Curvature; default `kronecker()`
    damping        λ ≥ 0 in units of the curvature of the loss: a number, a 0-dim tensor (gradients flow through it)
                   or a schedule of the update count; or these by path, {"head.*": 1e-2, "**": 1e-3}, where the first
                   pattern (as in `fnmatch`) that matches the path of a block's weight decides. It acts at refreshes
    split          "pi": factored damping with π; "none": factored with π = 1; "exact": Tikhonov in the eigenbasis.
                   Structures whose damping is of one kind only say so
    decay          β in [0, 1), the weight of the OLD average: a number, a 0-dim tensor (gradients flow through it; its
                   value is never checked) or a schedule of the update count
    average        X at the k-th statistics x. "debiased": W ← βW + 1, X ← X + (x − X)/W; "warmup": X ← βₖX + (1 − βₖ)x
                   with βₖ = min(1 − 1/k, β); "constant": X ← βX + (1 − β)x from X = x at the first, which keeps the
                   weight β^(k−1) for long
    burn_in        b: the first b batches only feed the averages; gradients pass unchanged until more have been absorbed
    refresh_every  k, T_inv: refresh and factorise at the first statistics and then every k updates (t mod k = 0, with
                   or without statistics). `update(..., refresh=...)` decides otherwise
    scale_every    k, T_scal, for curvatures with scalings (`eigen`): scalings every k updates, or with the next
                   statistics where an update that is due has none. `update(..., scale=...)` decides otherwise
    growing        young averages change fast, so both intervals grow: 1 during the first k updates, 2 during the next
                   k, … up to k. False: k from the start
    stagger        False: a refresh does all blocks. True: every update refreshes only the blocks whose turn it is, so
                   that no update pays for all; in k updates all have been done once. The first statistics and
                   refresh=True do all. For curvatures made by `blockwise` and `by_path`
    l2             γ ≥ 0 of an objective L + γ/2 ‖θ‖²: its curvature γI joins the damping, λ_l + γ. The gradient is NOT
                   touched: that of the objective must hold γθ already, or `add_decayed_weights(γ)` goes before `kfac`
    l2_mask        whose weights that term covers: patterns, a tree of bools, or a function of the parameters (None:
                   all). A block is covered when its weight is; its bias comes along

    State: `KFacState`, a NamedTuple of tensors. Under vmap and torch.compile pass `refresh=` explicitly, or use
    refresh_every=1. Raises HyperparameterError for values without meaning, and when statistics come for a block that no
    pattern matches and a pattern that matches no block. Source: Martens & Grosse 2015 (1503.05671).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse())
        >>> tx = kf.chain(kf.kfac(damping=1e-3), kf.sgd(0.1, momentum=0.9))
        >>> batch, generator = (torch.randn(5, 3), torch.randn(5, 2)), torch.Generator().manual_seed(0)
        >>> value, grads, stats = step(params, batch, generator=generator)
        >>> updates, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> params = kf.apply_updates(params, updates)
    """
    chosen = structures.kronecker() if curvature is None else curvature
    return link(
        chosen,
        damping=damping,
        split=split,
        decay=decay,
        refresh_every=refresh_every,
        average=average,
        burn_in=burn_in,
        scale_every=scale_every,
        growing=growing,
        stagger=stagger,
        l2=l2,
        l2_mask=l2_mask,
    )


def ekfac(
    scalings: Scalings = "per_example",
    *,
    basis: Basis = "eigh",
    sweeps: int = 1,
    share: float = 0.2,
    sua: bool = False,
    **settings: Unpack[Periods],
) -> GradientTransformation:
    r"""EKFAC: the exact diagonal in the eigenbasis of K-FAC, `kf.curvature.eigen` with three periods.

    v = U_G [ (U_Gᵀ V U_A) ⊘ (S + λ) ] U_Aᵀ

    scalings, basis, sweeps, share, sua    as in `kf.curvature.eigen`
    settings       those of `kfac` without split: the damping is always exact. A and G are averaged at every batch, the
                   bases move every `refresh_every`, the scalings every `scale_every`

    Raises HyperparameterError for values without meaning. Source: George et al. 2018 (1806.03884).

        >>> tx = kf.chain(kf.ekfac(damping=1e-3, scale_every=2), kf.sgd(0.1))
        >>> tx.init({"w": torch.ones(2)})[0].rules.value.options.scale_every
        2
    """
    structure = structures.eigen(scalings, basis=basis, sweeps=sweeps, share=share, sua=sua)
    return link(structure, **settings)


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
    return link(structures.kpsvd(solver, iterations=iterations, tolerance=tolerance, radius=radius), **settings)


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
    return link(structures.deflation(rank, iterations=iterations, tolerance=tolerance, radius=radius), **settings)


def corrected(
    *, iterations: int = 10, tolerance: float = 1e-3, radius: int | None = None, **settings: Unpack[Settings]
) -> GradientTransformation:
    """K-FAC and the product nearest to what it misses, `kf.curvature.corrected`, with the settings of `kfac` (split
    "pi" or "none").

    >>> tx = kf.chain(kf.corrected(damping=1e-2), kf.sgd(0.1))
    """
    return link(structures.corrected(iterations=iterations, tolerance=tolerance, radius=radius), **settings)


def lanczos(
    rank: int = 2, *, steps: int = 8, radius: int | None = None, **settings: Unpack[Settings]
) -> GradientTransformation:
    """`rank` Kronecker products at once by bidiagonalisation, `kf.curvature.lanczos`, with the settings of `kfac`
    (split "pi" or "none").

    >>> tx = kf.chain(kf.lanczos(damping=1e-2), kf.sgd(0.1))
    """
    return link(structures.lanczos(rank, steps=steps, radius=radius), **settings)


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
    return link(chosen, **settings)


def exact_natural_gradient(
    block_diagonal: bool = False, *, rule: Rule = "standard", window: int = 1, **settings: Unpack[Periods]
) -> GradientTransformation:
    """The natural gradient itself, (F + λI)⁻¹ g without ever forming F: `kf.curvature.full` over all layers together,
    or `kf.curvature.block_diagonal` layer by layer, with the settings of `kfac`. `refresh_every` is 1 unless given; the
    averages reach over the last `window` batches.

    >>> tx = kf.chain(kf.exact_natural_gradient(damping=1e-2), kf.sgd(1.0))
    """
    settings.setdefault("refresh_every", 1)
    return link(_exact(block_diagonal, rule, window), **settings)


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
    return link(chosen, **settings)


def _exact(blocks: bool, rule: Rule, window: int) -> Curvature:
    if not blocks:
        return structures.full(rule=rule, window=window)
    own = structures.block_diagonal(rule=rule, window=window)
    return structures.blockwise(own, own)
