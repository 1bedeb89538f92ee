"""Curvature in the regimes where it is exact, against the dense Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from tests.fuzz.looking import Look, Pointless, agree, exact, fair, taken
from tests.fuzz.oracles import joined
from tests.fuzz.trees import flat

DAMPING = 0.3


class Taken(NamedTuple):
    """A step with exact vectors.

    paths       of every block, in the spelling of the oracles
    estimated   paths whose curvature is only estimated: policies, and uses that all examples share
    moved       the update of a recipe, and the gradient and F it must be made of
    """

    stats: Any
    paths: dict[str, list[str]]
    estimated: set[str]
    moved: dict[str, Tensor]
    gradient: dict[str, Tensor]
    curvature: Tensor


def _taken(look: Look, tx: Any) -> Taken:
    fair(look)
    _, grads, stats = taken(look, exact(look))
    params, plan = look.truth.params, stats.rules.value.plan
    spelling = {id(leaf): path for path, leaf in look.truth.leaves.items()}
    ours = {path: spelling[id(leaf)] for path, leaf in _tree.unique_paths(params).items()}
    paths = {block.layout.name: [ours[p] for p in block.layout.leaves] for block in plan.blocks}
    shared = [block.layout.name for block in plan.blocks if any(plan.taps[k].where is None for k, _ in block.uses)]
    estimated = {ours[path] for path, _ in plan.unclaimed} | {path for name in shared for path in paths[name]}
    moved, _ = tx.update(grads, tx.init(params), params, stats=stats)
    return Taken(stats, paths, estimated, flat(moved), look.truth.value_and_gradient[1], look.truth.ggn)


def _solved(look: Look, one: Taken, paths: list[str]) -> Tensor:
    """(F + λ)⁻¹ g for some leaves."""
    at = torch.cat([torch.arange(len(one.curvature))[look.truth.places(path)] for path in paths])
    damped = one.curvature[at][:, at] + DAMPING * torch.eye(len(at), dtype=one.curvature.dtype)
    return torch.linalg.solve(damped, joined({path: one.gradient[path] for path in paths}))


def _blocks_solved(look: Look, one: Taken, what: str, names: list[str]) -> None:
    for name in names:
        paths = one.paths[name]
        if not one.estimated & set(paths):
            got = joined({path: one.moved[path] for path in paths})
            agree(f"{what} of block {name!r}", got, _solved(look, one, paths), look.tolerance, joined(one.gradient))


def diagonal(look: Look) -> None:
    """(F + λ)⁻¹ g entry by entry, F the diagonal of the dense GGN."""
    one = _taken(look, kf.kfac(kf.curvature.diagonal(), damping=DAMPING))
    for path, g in one.gradient.items():
        if path not in one.estimated:
            wanted = g / (one.curvature.diagonal()[look.truth.places(path)].reshape(g.shape) + DAMPING)
            agree(f"diagonal of {path!r}", one.moved[path], wanted, look.tolerance, joined(one.gradient))


def natural(look: Look) -> None:
    """(F + λ)⁻¹ g with all of F."""
    one = _taken(look, kf.exact_natural_gradient(damping=DAMPING))
    if one.estimated:
        raise Pointless
    wanted = _solved(look, one, list(one.gradient))
    agree("exact natural gradient", joined(one.moved), wanted, look.tolerance, joined(one.gradient))


def natural_by_block(look: Look) -> None:
    """(F_b + λ)⁻¹ g_b for every block."""
    one = _taken(look, kf.exact_natural_gradient(True, damping=DAMPING))
    _blocks_solved(look, one, "natural gradient", list(one.paths))


def kronecker(look: Look) -> None:
    """One example and one position: G ⊗ A is the block itself."""
    if look.case.examples > 1 or "sharing" in look.case.options:
        raise Pointless
    one = _taken(look, kf.kfac(damping=DAMPING, split="exact"))
    single = [name for name, block in one.stats.blocks().items() if block.layout.matrix and block.positions == 1]
    _blocks_solved(look, one, "K-FAC", [name for name in single if name in one.paths])


STRUCTURES: dict[str, Any] = {"diagonal": kf.curvature.diagonal, "eigen": kf.curvature.eigen}


def fitted(look: Look) -> None:
    """The trace of F̂ is that of F for EKFAC and the diagonal, whatever the batch; its diagonal for the diagonal."""
    problem, truth = look.case.problem, look.truth
    name, one = look.draw.pick(*STRUCTURES), _taken(look, kf.identity())
    if one.estimated or (name == "eigen" and one.stats.rules.value.plan.mixing):  # EKFAC drops what examples share
        raise Pointless
    state = kf.fit_curvature(
        problem.fn, problem.loss, problem.params, [problem.batch], curvature=STRUCTURES[name](),
        estimator=exact(look), generator=look.generator(), **look.case.options,
    )  # fmt: skip
    operator = kf.linear_operator(state, truth.params, damping=0.0)
    f = truth.ggn / (look.case.examples if problem.loss.reduction == "sum" else 1)
    agree(f"trace of {name}", operator.trace(), f.trace(), look.tolerance, f.trace().abs())
    if name == "diagonal":
        order = torch.cat([torch.arange(len(f))[truth.places(p)] for p in _spelled(look)])
        agree("fitted diagonal", operator.to_dense().diagonal(), f.diagonal()[order], look.tolerance)


def _spelled(look: Look) -> list[str]:
    """Our paths in the library's order of the leaves."""
    spelling = {id(leaf): path for path, leaf in look.truth.leaves.items()}
    return [spelling[id(leaf)] for leaf in _tree.leaves(look.truth.params)]
