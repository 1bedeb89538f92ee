r"""What trees of gradients, updates and parameters say, in all and by leaf or block: norms and angles; tr F̂/tr F.

Sums are in float64. A NaN stays a NaN, because a log should show it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import TreeMismatchError, explain
from kfac_func._tree import storable
from kfac_func._typing import Model, Progress, PyTree, Scalar
from kfac_func.diagnostics.states import share, traces
from kfac_func.losses import Loss
from kfac_func.operators import LinearOperator, linear_operator
from kfac_func.products.per_example import fisher_diagonal
from kfac_func.products.routes import Route
from kfac_func.state import observed_one


class Parts(NamedTuple):
    """A number of the whole tree, and of its parts by the path of the leaf or the name of the block; 0-dim float64."""

    total: Tensor
    parts: dict[str, Tensor]


storable(Parts)


def norms(tree: PyTree, state: PyTree | None = None) -> Parts:
    r"""‖x‖ of a tree and of its leaves; by block with a K-FAC `state` (leaves without a block stay leaves).

        ‖x‖² = Σ_parts ‖x_part‖²

    Leaves that are None are left out. Raises TreeMismatchError for a tree without leaves, and where two leaves have the
    same path; StateError for a state without statistics.

        >>> kf.diagnostics.norms({"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}).total
        tensor(5., dtype=torch.float64)
    """
    leaves = _leaves(tree)
    return _norms({part: [leaves[path] for path in paths] for part, paths in _groups(leaves, state).items()})


def _norms(groups: dict[str, list[Tensor]]) -> Parts:
    parts = {part: _norm([torch.linalg.vector_norm(x.double()) for x in leaves]) for part, leaves in groups.items()}
    return Parts(_norm(list(parts.values())), parts)


def _norm(numbers: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(numbers))


def cosine(one: PyTree, other: PyTree, state: PyTree | None = None) -> Parts:
    r"""The cosine of the angle between two trees, of the updates and the gradients, say; in all, and by leaf or block.

        cos(x, y) = ⟨x, y⟩ / (‖x‖ ‖y‖)

    The trees are taken as they are: updates that point downhill have a negative cosine with the gradient. 0 where one
    of both is zero. `state` and errors as in `norms`; TreeMismatchError for trees that differ.

        >>> g = {"w": torch.tensor([1.0, 0.0])}
        >>> kf.diagnostics.cosine({"w": torch.tensor([-1.0, 0.0])}, g).parts
        {'w': tensor(-1., dtype=torch.float64)}
    """
    x, y = _alike(one, other)
    dots = _products(x, y, state)
    left, right = norms(one, state), norms(other, state)
    parts = {part: share(dot, left.parts[part] * right.parts[part], 0.0) for part, dot in dots.items()}
    return Parts(share(_sum(list(dots.values())), left.total * right.total, 0.0), parts)


def norm_ratio(updates: PyTree, params: PyTree, state: PyTree | None = None) -> Parts:
    r"""‖updates‖/‖parameters‖, in all, and by leaf or block: the relative size of a step (about 1e-3 is usual).

    0 where both are zero, infinite for a step away from zero. `state` and errors as in `cosine`.

        >>> kf.diagnostics.norm_ratio({"w": torch.ones(4)}, {"w": 10 * torch.ones(4)}).total
        tensor(0.1000, dtype=torch.float64)
    """
    _alike(updates, params)
    top, bottom = norms(updates, state), norms(params, state)
    parts = {part: share(size, bottom.parts[part], 0.0) for part, size in top.parts.items()}
    return Parts(share(top.total, bottom.total, 0.0), parts)


def fisher_norms(state: PyTree, params: PyTree, updates: PyTree, *, damping: Scalar | None = 0.0) -> Parts:
    r"""The length of a step in the metric of the curvature of a state, in all and by block.

        ‖u‖_F̂ = √(uᵀ (F̂ + λ) u)        ½ ‖u‖_F̂² is about the KL divergence of the step, in nats per example

    damping    λ, 0 by default: F̂ alone; None: that of the state. As in `kf.linear_operator`, and so are the errors

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2, bias=False))
        >>> loss, batch = kf.losses.mse("sum", scale=0.5), (torch.ones(1, 3), torch.zeros(1, 2))
        >>> state = kf.fit_curvature(fn, loss, params, [batch])
        >>> round(kf.diagnostics.fisher_norms(state, params, {"weight": torch.ones(2, 3)}).total.item() ** 2, 3)
        18.0
    """
    return lengths(linear_operator(state, params, damping=damping), updates, state)


def lengths(operator: LinearOperator, updates: PyTree, state: PyTree) -> Parts:
    """√(uᵀ M u), in all and by block."""
    squares = _products(_leaves(updates), _leaves(operator.matvec(updates)), state)
    parts = {part: square.clamp(min=0).sqrt() for part, square in squares.items()}
    return Parts(_sum(list(squares.values())).clamp(min=0).sqrt(), parts)


def trace_ratio(
    state: PyTree,
    fn: Model,
    loss: Loss,
    params: PyTree,
    batch: tuple[Any, Tensor],
    *,
    route: Route = "auto",
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Parts:
    r"""tr F̂/tr F, in all blocks and by block: whether the curvature of a state has the right size on a batch.

        tr F = (1/N) Σ_n Σ_v ‖J_nᵀ c_{v,n}‖²,        Σ_v c_{v,n} c_{v,n}ᵀ = Λ_n

    F is exact, from the examples of the batch; F̂ is that of the state, without damping. `eigen` and `diagonal` have 1
    on the batch that they saw with `kf.estimators.exact()`; `kronecker` has 1 where its independence assumption holds,
    with one datum, for example. A state that lags behind the parameters shows as a ratio that drifts.

    fn, loss   as in `kf.value_grad_and_stats`. For the reduction "sum" F is N times as large, as in training;
               `kf.fit_curvature` averages over examples there, so compare it with reduction="batchmean"
    route, chunk_size, progress    as in `kf.products.fisher_diagonal`

    1 where both traces are 0, infinite where only tr F is. Leaves without curvature take no part. Raises what
    `kf.diagnostics.spectra` and `kf.products.fisher_diagonal` raise; TreeMismatchError for other parameters.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]]), torch.tensor([0, 1])
        >>> state = kf.fit_curvature(fn, kf.losses.cross_entropy(), params, [batch])
        >>> round(kf.diagnostics.trace_ratio(state, fn, kf.losses.cross_entropy(), params, batch).total.item(), 4)
        1.0
    """
    top = traces(state)
    _known(_leaves(params), state)
    diagonal = fisher_diagonal(fn, loss, route=route, chunk_size=chunk_size, progress=progress)(params, batch)
    found = {path: leaf.double().sum() for path, leaf in _leaves(diagonal).items()}
    groups = _groups(found, state)
    bottom = {name: _sum([found[path] for path in groups[name]]) for name in top}
    parts = {name: share(trace, bottom[name], 1.0) for name, trace in top.items()}
    return Parts(share(_sum(list(top.values())), _sum(list(bottom.values())), 1.0), parts)


# ------------------------------------------------------------------ leaves and blocks


def _products(x: dict[str, Tensor], y: dict[str, Tensor], state: PyTree | None) -> dict[str, Tensor]:
    """⟨x, y⟩ by part."""
    dots = {path: (leaf.double() * y[path].double()).sum() for path, leaf in x.items()}
    return {part: _sum([dots[path] for path in paths]) for part, paths in _groups(x, state).items()}


def _sum(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).sum()


def _leaves(tree: PyTree) -> dict[str, Tensor]:
    found = _tree.unique_paths(tree)
    if not found:
        raise TreeMismatchError(
            explain(
                "the tree has no leaves to be measured.",
                got=type(tree).__name__,
                options="pass a tree like the parameters, with at least one leaf that is not None",
            )
        )
    return found


def _alike(one: PyTree, other: PyTree) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x, y = _leaves(one), _leaves(other)
    for path in (*x, *y):
        got, wanted = (list(side[path].shape) if path in side else "no such leaf" for side in (x, y))
        if got != wanted:
            raise TreeMismatchError(
                explain(
                    f"the trees differ at leaf {path!r}.",
                    got=got,
                    wanted=wanted,
                    options="pass trees with the same leaves, both None where one is",
                )
            )
    return x, y


def _groups(leaves: dict[str, Tensor], state: PyTree | None) -> dict[str, list[str]]:
    """Which leaves form which part: those of a block of the state together, every other one alone."""
    layouts = () if state is None else observed_one(state).rules.value.layouts
    owner = {path: layout.name for layout in layouts for path in layout.leaves}
    groups: dict[str, list[str]] = {}
    for path in (*(path for path in owner if path in leaves), *(path for path in leaves if path not in owner)):
        groups.setdefault(owner.get(path, path), []).append(path)
    return groups


def _known(leaves: dict[str, Tensor], state: PyTree) -> None:
    """Raise TreeMismatchError unless the leaves are those that the statistics of a state were taken on."""
    wanted = observed_one(state).rules.value.paths
    if set(wanted) != set(leaves):
        raise TreeMismatchError(
            explain(
                "the parameters are not those that the statistics were taken on.",
                got=", ".join(map(repr, list(leaves)[:20])),
                wanted=", ".join(map(repr, wanted[:20])),
                options="pass the tree that value_grad_and_stats was given",
            )
        )
