r"""Two-level curvature: what a blockwise inverse M⁻¹ misses between blocks, put right in a small coarse space.

    residual    v = ζ + ω₂ R₀ᵀ F_c⁻¹ R₀ (g − F_λ ζ)        ζ = ω₁ M⁻¹ g,    F_λ = F + Λ,   Λ = λ_l on block l
    additive    v = ζ + ω₂ R₀ᵀ F_c⁻¹ R₀ g                  F_c = R₀ F_λ R₀ᵀ

Sources: Tselepidis et al. 2020 (2011.00573), additive; Koroko et al. 2023 (2303.18083), residual.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import storable
from kfac_func.blocks import Block, crossed, map_sizes, pairs_by_example
from kfac_func.curvature.base import Batch, Curvature, Structure, average
from kfac_func.curvature.blockwise import Blockwise, blockwise
from kfac_func.curvature.coarse import (
    CoarseSpace,
    Form,
    Level,
    Resample,
    Space,
    checked,
    enriched,
    normalised,
    spanned,
    spectral,
)
from kfac_func.linalg.galerkin import (
    Coarse,
    Vectors,
    coarse_matrix,
    hits,
    inverse,
    measured,
    prolonged,
    restricted,
    seen,
    weighed,
)
from kfac_func.linalg.gram import combined, joined, shifted


class TwoLevelMoments(NamedTuple):
    """Those of the inner curvature, the vectors of the space (() while they are not known), and what F does to them."""

    inner: Any
    vectors: Any
    coarse: Any


class TwoLevelState(NamedTuple):
    """The inner state; the vectors and the averages of `Coarse` or `CrossFactors`; or, for vectors that move, the rows
    of the newest batch (`Window`).
    """

    inner: Any
    vectors: Any
    coarse: Any
    rows: Any


class TwoLevelFactored(NamedTuple):
    """The inner factors, λ_l, the vectors, F_c⁻¹ [K, K], and R₀F: as it is (`products`), or by rows and u [K, V, B]."""

    inner: Any
    damping: dict[str, Tensor]
    vectors: Any
    inverse: Any
    products: Any
    rows: Any
    u: Any


storable(TwoLevelMoments, TwoLevelState, TwoLevelFactored)


class _Prepared(NamedTuple):
    inner: Any
    rows: dict[str, Any]
    vectors: Any
    sizes: dict[str, tuple[int, ...]]


def two_level(
    inner: Curvature | Structure,
    coarse: CoarseSpace | Space = "nicolaides",
    *,
    form: Form = "residual",
    weights: tuple[float, float] = (1.0, 1.0),
    krylov: bool = False,
    resample: Resample = "nearest",
) -> Curvature:
    r"""A second, coarse level over the blocks of `inner`.

        residual    v = ζ + ω₂ R₀ᵀ F_c⁻¹ R₀ (g − F_λ ζ)        ζ = ω₁ M⁻¹ g,    F_λ = F + λI
        additive    v = ζ + ω₂ R₀ᵀ F_c⁻¹ R₀ g                  F_c = R₀ F_λ R₀ᵀ

    inner      M: a block-diagonal curvature; a structure is lifted by `blockwise`
    coarse     the rows z of R₀, one per block, each scaled to largest entry 1:
               "nicolaides"    z = 1
               "residual"      z = M⁻¹ r with r = g − F_λ ζ, made anew from every gradient: the map is homogeneous then,
                               not linear
               "spectral"      the eigenvector of the smallest eigenvalue of G ⊗ A, or of a diagonal
               "tselepidis"    z = 1, with R₀FR₀ᵀ from Kronecker factors between blocks, sum(A_lm) · sum(G_lm) · S_lm
                               over S_lm matched positions; only "additive"
               a function      ones -> vectors: gets an array like V for every block, filled with 1; returns one
                               vector of that shape, or several with a dimension in front, for any of the blocks
    form       "residual" corrects what ζ leaves over: it never raises ‖ζ − F_λ⁻¹g‖ in the norm of F_λ, and
               R₀(g − F_λ v) = 0 where ω₂ = 1. "additive" adds the coarse solution of g itself
    weights    (ω₁, ω₂); (1, 0) is the inner curvature bit for bit. In a deep net the M⁻¹g of all blocks together may
               overshoot, which one rate cannot mend for both parts: ω₁ < 1 can
    krylov     {z, M⁻¹z} in place of z; for "nicolaides" and "residual"
    resample   "tselepidis", maps of different size: "nearest" spreads the smaller one, "area" averages the larger

    F is exact: that of the output vectors of the estimator, over all blocks. Where z is fixed (nicolaides, tselepidis,
    a function) R₀FR₀ᵀ [K, K] and, for "residual", R₀F [K times the parameters] are MEANS over examples and moving
    averages like all moments. Where z moves with M or g, F is that of the newest batch, whose rows the state keeps. The
    damping enters as λ_l⟨z, z'⟩ for vectors of block l. F_c is inverted by Cholesky; where vectors depend on one
    another, by its pseudo-inverse. `dense` gives the blocks of the inner curvature.

    Raises HyperparameterError for values without meaning or that contradict one another; StateError for blocks without
    rows per example, for vectors that do not fit, and where "spectral" finds no factors. Sources: Tselepidis et al.
    2020 (2011.00573); Koroko et al. 2023 (2303.18083).

        >>> tx = kf.kfac(kf.curvature.two_level(kf.curvature.kronecker()), damping=1e-2)
        >>> fn, params = kf.make_functional(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> state.curvature.coarse.matrix.shape
        torch.Size([2, 2])
    """
    tree = blockwise(inner) if isinstance(inner, Structure) else inner
    level = checked(Level(coarse, form, weights, krylov, resample))

    def prepare(blocks: dict[str, Block]) -> _Prepared:
        rows = pairs_by_example(blocks, "two_level()", of_factors=level.space == "tselepidis")
        vectors = () if level.base is None else spanned(level.base, rows, blocks)
        return _Prepared(tree.prepare(blocks), rows, vectors, map_sizes(rows, blocks))

    def measure(prepared: Any) -> TwoLevelMoments:
        prepared = prepared if isinstance(prepared, _Prepared) else prepare(prepared)
        return TwoLevelMoments(tree.measure(prepared.inner), prepared.vectors, _coarse(level, prepared))

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> TwoLevelState:
        first, old = batch.first, TwoLevelState((), (), (), ()) if state == () else state
        own = tree.absorb(old.inner, batch.of(_inner), fraction)
        vectors, coarse = average(old.vectors, first.vectors, fraction), average(old.coarse, first.coarse, fraction)
        rows = () if level.fixed else shifted(old.rows, batch.ask(lambda prepared: prepared.rows), fraction, 1)
        return TwoLevelState(own, vectors, coarse, rows)

    def refresh(state: TwoLevelState, damping: dict[str, Tensor], split: str) -> TwoLevelState:
        return state._replace(inner=tree.refresh(state.inner, damping, split))

    def scale(state: TwoLevelState, batch: Batch, fraction: Tensor) -> TwoLevelState:
        return state._replace(inner=tree.scale(state.inner, batch.of(_inner), fraction))

    def factorize(state: TwoLevelState, damping: dict[str, Tensor], split: str, kept: Any = ()) -> TwoLevelFactored:
        own = tree.factorize(state.inner, damping, split, () if kept == () else kept.inner)
        return _factored(level, tree, state, own, damping)

    def solve(factored: TwoLevelFactored, vs: Vectors) -> Vectors:
        return _solved(level, tree, factored, vs)

    def dense(state: TwoLevelState) -> Vectors:
        return tree.dense(state.inner)

    space = coarse if isinstance(coarse, str) else getattr(coarse, "__name__", "function")
    name = f"two_level({tree.name}, {space}{', krylov' * krylov}, {form})"
    every = prepare, measure, absorb, refresh, scale, factorize, solve, dense
    return Curvature(name, *every, scales=tree.scales, summable=level.fixed and tree.summable)


def _inner(things: Any) -> Any:
    return things.inner


def _coarse(level: Level, prepared: _Prepared) -> Any:
    """What a batch says at first of fixed vectors."""
    if not level.fixed:
        return ()
    if level.space == "tselepidis":
        return crossed(prepared.rows, prepared.sizes, level.resample)
    return measured(prepared.rows, prepared.vectors, level.form == "residual")


def _factored(
    level: Level, tree: Curvature, state: TwoLevelState, own: Any, damping: dict[str, Tensor]
) -> TwoLevelFactored:
    if level.fixed:
        matrix = coarse_matrix(state.coarse, state.vectors, damping)
        products = state.coarse.products if level.form == "residual" else ()
        return TwoLevelFactored(own, damping, state.vectors, inverse(matrix), products, (), ())
    rows = {name: joined(part, state.rows.weights) for name, part in state.rows.rows.items()}
    if level.space == "residual":
        return TwoLevelFactored(own, damping, (), (), (), rows, ())
    vectors = state.vectors if level.base is not None else normalised(spectral(_by_block(state.inner)))
    return _galerkin(level, tree, TwoLevelFactored(own, damping, vectors, (), (), rows, ()))


def _galerkin(level: Level, tree: Curvature, factored: TwoLevelFactored) -> TwoLevelFactored:
    """The same with F_c⁻¹ and u for its vectors, enriched if wanted, by rows."""
    vectors = factored.vectors
    if level.krylov:
        vectors = enriched(vectors, lambda vs: tree.solve(factored.inner, vs))
    u = seen(factored.rows, vectors)
    matrix = coarse_matrix(Coarse(torch.einsum("kvb,lvb->kl", u, u)), vectors, factored.damping)
    return factored._replace(vectors=vectors, inverse=inverse(matrix), u=u)


def _solved(level: Level, tree: Curvature, factored: TwoLevelFactored, vs: Vectors) -> Vectors:
    one, two = level.weights
    zeta = {name: one * z for name, z in tree.solve(factored.inner, vs).items()}
    if two == 0:
        return zeta
    g = {name: v.to(zeta[name].dtype) for name, v in vs.items()}
    if level.space == "residual":
        w = hits(factored.rows, zeta)
        image = {name: combined(factored.rows[name], w).reshape(v.shape) for name, v in g.items()}
        r = {name: v - image[name] - factored.damping[name].to(v.dtype) * zeta[name] for name, v in g.items()}
        z = {name: v.unsqueeze(0) for name, v in tree.solve(factored.inner, r).items()}
        factored = _galerkin(level, tree, factored._replace(vectors=normalised(z)))
        wanted = restricted(factored.vectors, r if level.form == "residual" else g)
    elif level.form == "residual":
        rest = {name: v - factored.damping[name].to(v.dtype) * zeta[name] for name, v in g.items()}
        wanted = restricted(factored.vectors, rest) - _image(factored, zeta)
    else:
        wanted = restricted(factored.vectors, g)
    correction = prolonged(factored.vectors, factored.inverse @ wanted)
    return {name: z + two * correction[name] if name in correction else z for name, z in zeta.items()}


def _image(factored: TwoLevelFactored, zeta: Vectors) -> Tensor:
    """R₀ F ζ [K], from R₀F or by rows."""
    if factored.products != ():
        return weighed(factored.products, zeta)
    return torch.einsum("kvb,vb->k", factored.u, hits(factored.rows, zeta))


def _by_block(state: Any) -> dict[str, Any]:
    if isinstance(state, Blockwise):
        return state.matrix | state.vector
    raise HyperparameterError(
        explain(
            "coarse='spectral' needs the eigenvalues of every block.",
            got=type(state).__name__,
            options="an inner curvature made by blockwise() or by_path(); or another coarse space",
        )
    )
