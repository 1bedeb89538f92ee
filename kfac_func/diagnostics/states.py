r"""What a K-FAC state says about the curvature: eigenvalues, condition numbers, π, λ, dead units, the gain of EKFAC.

Everything is a pure function of the state, tensors in and tensors out by block, and none belongs into a training step:
eigenvalues cost about what a refresh costs. Over stacked states (an ensemble) use `torch.vmap`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func._errors import StateError, explain
from kfac_func._tree import storable
from kfac_func._typing import PyTree
from kfac_func.blocks import Factor, KroneckerState, diagonal_of, merged, within
from kfac_func.curvature.blockwise import Blockwise
from kfac_func.curvature.corrected import CorrectedState
from kfac_func.curvature.eigen import EigenState
from kfac_func.curvature.inverse_free import InverseFreeState
from kfac_func.damping import pi_split
from kfac_func.linalg import eigenbasis
from kfac_func.linalg.sums import Terms
from kfac_func.precondition.rules import block_damping, curvature_of
from kfac_func.state import KFacState, observed_one


class Factors(NamedTuple):
    """F ≈ scale · (G ⊗ A): A [(q), i, i] and G [(q), o, o] in any form of a factor, scale 0-dim (T, say)."""

    a: Factor
    g: Factor
    scale: Tensor


class Spectrum(NamedTuple):
    """Eigenvalues, ascending: of A [(q), i] and G [(q), o], () for a block without factors; of the block F̂, [p]."""

    a: Any
    g: Any
    block: Tensor


class Condition(NamedTuple):
    """λ_max/λ_min of a block, 0-dim: of F̂ with its damping, and of F̂ alone (infinite where λ_min is 0)."""

    damped: Tensor
    undamped: Tensor


class Dead(NamedTuple):
    """How many inputs and outputs of a block were zero in all statistics, 0-dim int64, over all groups."""

    inputs: Tensor
    outputs: Tensor


storable(Factors, Spectrum, Condition, Dead)


def coupled(state: KFacState) -> bool:
    """Whether the curvature is one between blocks, so that no block has a spectrum of its own."""
    return not isinstance(state.curvature, Blockwise)


def _blocks(state: PyTree) -> dict[str, Any]:
    """What the curvature keeps of every block, in the order of the network."""
    one = observed_one(state)
    if coupled(one):
        raise StateError(
            explain(
                "the curvature couples the blocks, so no block has a spectrum or factors of its own.",
                got=type(one.curvature).__name__,
                options="a curvature made by blockwise() or by_path(), e.g. eigen(); or kf.spectra on kf.products",
            )
        )
    kept = one.curvature.matrix | one.curvature.vector
    return {layout.name: kept[layout.name] for layout in one.rules.value.layouts}


def factors(state: PyTree) -> dict[str, Factors]:
    """The Kronecker factors of every block that has some: A and G, the R and S of `kpsvd`, or those of the first term
    of a sum. A and G are as they are averaged, without damping.

    Raises StateError before the first statistics, for several K-FAC states, and for `full` and `two_level`.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.eye(3), torch.zeros(3, 2)
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [batch])
        >>> kf.diagnostics.factors(state)["weight"].a.shape
        torch.Size([4, 4])
    """
    found = {name: _factors(own) for name, own in _blocks(state).items()}
    return {name: sides for name, sides in found.items() if sides is not None}


def _factors(own: Any) -> Factors | None:
    match own:
        case KroneckerState():
            return Factors(*merged(own))
        case EigenState() | InverseFreeState():
            return Factors(*merged(own.factors))
        case CorrectedState():
            return Factors(*merged(own.kronecker))
        case Terms():
            return Factors(own.r[0], own.s[0], own.r.new_ones(()))
    return None


def spectra(state: PyTree) -> dict[str, Spectrum]:
    r"""The eigenvalues of every block without damping, and of its Kronecker factors: λ_A, λ_G, and

        kronecker, kpsvd      λ(F̂) = scale · λ_G λ_Aᵀ          eigen      S          diagonal      D

    in units of the curvature (scale · λ_A λ_G has them; how they are shared between A and G does not matter). Negative
    eigenvalues, which only rounding and the sums of `deflation` and `corrected` have, count as 0.

    Raises what `factors` raises, and StateError for a state from a file that has not met its transformation.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2, bias=False))
        >>> batch = torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.zeros(3, 2)
        >>> state = kf.fit_curvature(fn, kf.losses.mse("sum", scale=0.5), params, [batch])
        >>> found = kf.diagnostics.spectra(state)["weight"]
        >>> (3 * found.a).round(decimals=3), (3 * found.block).round(decimals=3)
        (tensor([1., 4., 9.]), tensor([1., 1., 4., 4., 9., 9.]))
    """
    sides, values = factors(state), eigenvalues(state, damped=False)
    none = dict.fromkeys(values.keys() - sides.keys(), ((), ()))
    own = {name: (_ascending(one.a), _ascending(one.g)) for name, one in sides.items()} | none
    return {name: Spectrum(*own[name], block.sort().values) for name, block in values.items()}


def _ascending(factor: Factor) -> Tensor:
    return eigenbasis(factor)[0].sort(dim=-1).values


def eigenvalues(state: PyTree, damped: bool) -> dict[str, Tensor]:
    """The eigenvalues of every block, [p], in no order. Raises what `factors` raises."""
    names, one = list(_blocks(state)), observed_one(state)
    own, damping, split = curvature_of(one).spectra, block_damping(one), one.rules.value.options.split
    assert own is not None  # `_blocks` has refused what has none
    if not damped:
        damping, split = {name: torch.zeros_like(value) for name, value in damping.items()}, "exact"
    found = own(one.curvature, damping, split)
    return {name: found[name].values.flatten() for name in names}


def traces(state: PyTree) -> dict[str, Tensor]:
    """tr F̂ of every block, without damping, float64: the sum of its eigenvalues.

    Raises what `spectra` raises.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.eye(3), torch.zeros(3, 2))])
        >>> round(kf.diagnostics.traces(state)["weight"].item(), 3)
        4.0
    """
    return {name: values.double().sum() for name, values in eigenvalues(state, damped=False).items()}


def condition_numbers(state: PyTree) -> dict[str, Condition]:
    r"""κ = λ_max/λ_min of every block, of what is inverted and of F̂ alone:

        damped      of F̂ with the λ_l in force, which enters as the state's `split` says
        undamped    of F̂; infinite, or what rounding makes of that, where F̂ is singular

    1 is the best; steps lose about log10 κ digits to it. Raises what `spectra` raises.

        >>> fn, params = kf.make_functional(torch.nn.Linear(2, 2, bias=False))
        >>> batch = torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2, 2)
        >>> state = kf.fit_curvature(fn, kf.losses.mse("batchmean", scale=0.5), params, [batch], damping=0.5)
        >>> [round(x.item(), 3) for x in kf.diagnostics.condition_numbers(state)["weight"]]
        [5.0, 9.0]
    """
    damped, undamped = (eigenvalues(state, damped=on) for on in (True, False))
    return {name: Condition(condition(damped[name]), condition(undamped[name])) for name in damped}


def condition(values: Tensor) -> Tensor:
    """λ_max/λ_min, infinite where λ_min is 0."""
    low, high = values.aminmax()
    return torch.where(low > 0, high / torch.where(low > 0, low, 1.0), torch.inf)


def pi(state: PyTree) -> dict[str, Tensor]:
    r"""π of every block that has factors: how split "pi" shares the damping. Other splits, and `eigen`, do not use it.

        π² = (tr A / dim A) / (tr G / dim G)        A + π√λ' I,    G + (√λ'/π) I

    0-dim, or [q] for a grouped layer; 1 where a factor is zero. Raises what `factors` raises.
    Source: Martens & Grosse 2015 (1503.05671), §6.3.

        >>> fn, params = kf.make_functional(torch.nn.Linear(2, 2, bias=False))
        >>> batch = 2 * torch.ones(1, 2), torch.zeros(1, 2)
        >>> kf.diagnostics.pi(kf.fit_curvature(fn, kf.losses.mse("sum", scale=0.5), params, [batch]))
        {'weight': tensor(2.)}
    """
    return {name: pi_split(one.a, one.g, torch.ones_like(one.scale), "pi")[0] for name, one in factors(state).items()}


def damping(state: PyTree) -> dict[str, Tensor]:
    """λ_l of every block, 0-dim float64, in units of F̂: that of the state or of the block's pattern, with the l2 term
    where it covers the block. It acts at the next refresh.

    Raises StateError before the first statistics and for several K-FAC states.

        >>> fn, params = kf.make_functional(torch.nn.Linear(2, 2))
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.ones(1, 2), torch.zeros(1, 2))], damping=0.5)
        >>> kf.diagnostics.damping(state)
        {'weight': tensor(0.5000, dtype=torch.float64)}
    """
    return block_damping(observed_one(state))


def dead_units(state: PyTree) -> dict[str, Dead]:
    """How many inputs and outputs of a block were exactly zero in all statistics: zero diagonal entries of A and of G.

    Dead inputs of an embedding are tokens that never came, and its padding; dead outputs are units without a gradient,
    such as ReLUs that are off for all examples. The side that `sides` of `kronecker` leaves out has no dead units.
    Raises what `factors` raises.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1, 2)
        >>> kf.diagnostics.dead_units(kf.fit_curvature(fn, kf.losses.mse(), params, [batch]))["weight"]
        Dead(inputs=tensor(2), outputs=tensor(0))
    """
    return {name: Dead(*((diagonal_of(x) == 0).sum() for x in (one.a, one.g))) for name, one in factors(state).items()}


def ekfac_gain(state: PyTree) -> dict[str, Tensor]:
    r"""How much of the diagonal of F in the eigenbasis K-FAC gets wrong and EKFAC gets right, for every `eigen` block:

        ‖S − T d_G d_Aᵀ‖ / ‖S‖,        d_A = diag(U_Aᵀ A U_A),   d_G = diag(U_Gᵀ G U_G)

    with Frobenius norms, 0-dim. 0: K-FAC is as good; 1 is as bad as no diagonal at all; it may be more. When S and the
    bases are of the same statistics (`kf.fit_curvature`, or right after a refresh with one batch), it is a difference
    of errors of the whole block: gain² ‖S‖² = ‖F − F_KFAC‖² − ‖F − F_EKFAC‖². Infinite where S alone is 0.

    Raises StateError when there is no `eigen` block, and what `factors` raises. Source: George et al. 2018
    (1806.03884), §3.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> state = kf.fit_curvature(fn, kf.losses.cross_entropy(), params, [(torch.ones(1, 3), torch.tensor([0]))])
        >>> round(kf.diagnostics.ekfac_gain(state)["weight"].item(), 3)
        0.0
    """
    found = {name: own for name, own in _blocks(state).items() if isinstance(own, EigenState)}
    if not found:
        raise StateError(
            explain(
                "no block has the scalings of EKFAC.",
                got=curvature_of(observed_one(state)).name,
                options="kf.fit_curvature(...) with curvature=kf.curvature.eigen(), its default; or kf.ekfac()",
            )
        )
    return {name: _gain(own) for name, own in found.items()}


def _gain(own: EigenState) -> Tensor:
    a, g, t = merged(own.factors)
    d_a, d_g = within(a, own.bases.a), within(g, own.bases.g)
    missed = own.scalings - t * d_g.unsqueeze(-1) * d_a.unsqueeze(-2)
    return share(torch.linalg.vector_norm(missed), torch.linalg.vector_norm(own.scalings), 0.0)


def share(top: Tensor, bottom: Tensor, nothing: float) -> Tensor:
    """top/bottom, with `nothing` for 0/0 and infinity for a positive number over 0."""
    empty = bottom == 0
    found = torch.where(top == 0, nothing, torch.inf)
    return torch.where(empty, found, top / torch.where(empty, 1.0, bottom))
