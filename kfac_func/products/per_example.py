r"""Per-example quantities: gradients of every example's own loss, their norms, Jacobians, Fisher diagonals and traces.

    V_n = ∂l_n/∂w                      L = (1/N) Σ_n l_n, or Σ_n l_n for the reduction "sum"
    F_n = J_nᵀ Λ_n J_n                 F = (1/N) Σ_n F_n

On the tape nothing is mapped over the model: one forward pass, one backward pass per output vector, and V_n in two thin
factors (`products.rows`). All functions here compose with torch.func, and none touches a global generator.

route       "auto": the tape; where it cannot, a vmap over examples; where that cannot, a loop over them, with a warning
            that says so, once. "tape", "vmap" or "loop": this one or an error (`products.routes`); equal numbers
chunk_size  examples at a time (None: all): bounds memory, at the price of two more forward passes
            (the second, with the examples in other chunks, shows whether they see each other)
only        patterns of parameter paths (`fnmatch`): all of this for the model as a function of these leaves, the others
            being constants; trees have None in their place. None: all leaves
progress    wraps the list of chunks, e.g. tqdm.tqdm
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._tracing import without_autocast
from kfac_func._typing import Model, Progress, PyTree, shown
from kfac_func.blocks import matrices, squares_of, unpack
from kfac_func.capture import as_pair, chosen_leaves
from kfac_func.estimators import Estimator, exact
from kfac_func.linalg.gram import squared_norms
from kfac_func.losses import Loss, checked_loss, example_weight
from kfac_func.products.routes import Route
from kfac_func.products.rows import ExampleRows, joined, reader, whole
from kfac_func.products.sources import estimated, once, own_scores, unit_vectors
from kfac_func.transforms.base import safe_sqrt

Batch: TypeAlias = tuple[Any, Tensor] | list[Any]
"""(inputs, targets)."""


def per_example_grads(
    fn: Model,
    loss: Loss,
    *,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
) -> Callable[[PyTree, Batch], PyTree]:
    r"""Make `(params, (inputs, targets)) -> grads`, the gradient of every example's own loss.

        V_n = ∂l_n/∂w,        mean_n V_n = ∂L/∂w  ("mean", "batchmean"),      Σ_n V_n = ∂L/∂w  ("sum")

    Returns a tree like `params` with leaves [N, *shape], in units of the loss per parameter. N times as large as the
    parameters: `per_example_norms` and `per_example_gram` never form it. Parameters that the model never reads have
    gradient zero. Weights of classes that the loss normalises over the batch stay so normalised.

    fn      pure function (params, inputs) -> z [N, *out]; examples must not see each other
    loss    from `kf.losses`
    route, chunk_size, only: see `kf.products.per_example`

    Raises CaptureError where an explicit route has no gradient of its own for every example, and for models whose
    examples see each other; BatchError for an empty batch or NaN, TargetError, HyperparameterError for wrong options.
    Source: Goodfellow 2015 (1510.01799).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> grads = kf.products.per_example_grads(fn, kf.losses.mse())(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> grads["weight"].shape
        torch.Size([5, 2, 3])
    """
    loss = checked_loss(loss)
    read = reader(fn, route=route, chunk_size=chunk_size, only=only)

    def grads(params: PyTree, batch: Batch) -> PyTree:
        inputs, targets = as_pair(batch)
        rows = joined([whole(part) for part in read(params, inputs, once(own_scores(loss, targets)))])
        return _some(params, only, {path: leaf[0] for path, leaf in _arrays(rows, params, only, 1).items()})

    return grads


def per_example_norms(
    fn: Model,
    loss: Loss,
    *,
    by_block: bool = False,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Callable[[PyTree, Batch], Any]:
    r"""Make `(params, (inputs, targets)) -> norms` [N], the Euclidean norms of the examples' gradients, never formed.

        ‖V_n‖² = Σ_blocks |a_n|² |g_n|²                              one position
        ‖V_n‖² = Σ_blocks Σ_{t,t'} (a_{n,t}·a_{n,t'}) (g_{n,t}·g_{n,t'})        several; or from the matrix of a few
                                                                      examples at a time, whichever costs less

    by_block    return a dictionary of norms [N] by block name (a weight and its bias on the tape, a leaf on the other
                routes)
    fn, loss, and what is raised: as `per_example_grads`; route, chunk_size, only, progress: see
    `kf.products.per_example`

    Units of the loss per parameter, for V_n = ∂l_n/∂w. Source: Goodfellow 2015 (1510.01799); several positions:
    Rochette et al. 2019 (1912.06015).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> kf.products.per_example_norms(fn, kf.losses.mse())(params, (torch.ones(5, 3), torch.zeros(5, 2))).shape
        torch.Size([5])
    """
    loss = checked_loss(loss)
    read = reader(fn, route=route, chunk_size=chunk_size, only=only)

    def norms(params: PyTree, batch: Batch) -> Any:
        inputs, targets = as_pair(batch)
        parts = read(params, inputs, once(own_scores(loss, targets)))
        found = [_squared(whole(part)) for part in shown(parts, progress)]
        if by_block:
            return {name: safe_sqrt(torch.cat([one[name] for _, one in found])) for name in found[0][1]}
        return safe_sqrt(torch.cat([total for total, _ in found]))

    return norms


def _squared(rows: ExampleRows) -> tuple[Tensor, dict[str, Tensor]]:
    """‖V_n‖² over all blocks [n], and by block."""
    found = {name: squared_norms(pair).sum(0) for name, pair in rows.pairs.items()}
    return torch.stack(list(found.values())).sum(0), found


def jacobian(
    fn: Model, *, route: Route = "auto", chunk_size: int | None = None, only: Sequence[str] | None = None
) -> Callable[[PyTree, Any], PyTree]:
    r"""Make `(params, inputs) -> J`, the derivatives of every output of every example.

        J_n = ∂z_n/∂w

    Returns a tree like `params` with leaves [N, *out, *shape], in units of the outputs per parameter: D = prod(out)
    times as large as `per_example_grads`. Parameters that the model never reads have derivative zero.

    fn and what is raised: as `per_example_grads`; route, chunk_size, only: see `kf.products.per_example`

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> kf.products.jacobian(fn)(params, torch.ones(5, 3))["weight"].shape
        torch.Size([5, 2, 2, 3])
    """

    read = reader(fn, route=route, chunk_size=chunk_size, only=only)

    def derivative(params: PyTree, inputs: Any) -> PyTree:
        rows = joined([whole(part) for part in read(params, inputs, once(unit_vectors))])
        n, *out = rows.outputs.shape
        arrays = _arrays(rows, params, only, prod(out))
        found = {path: x.movedim(0, 1).reshape(n, *out, *x.shape[2:]) for path, x in arrays.items()}
        return _some(params, only, found)

    return derivative


def _some(params: PyTree, only: Sequence[str] | None, found: dict[str, Tensor]) -> PyTree:
    """A tree like the parameters, with None for the leaves that are constants."""
    paths = _tree.unique_paths(params)
    return _tree.with_leaves(params, [found[path] for path in paths] if only is None else list(map(found.get, paths)))


@without_autocast
def _arrays(rows: ExampleRows, params: PyTree, only: Sequence[str] | None, vectors: int) -> dict[str, Tensor]:
    """V_{v,n} as leaves [V, N, *shape], in the dtypes of the parameters."""
    leaves = _tree.unique_paths(params)
    shapes, lead = {path: leaf.shape for path, leaf in leaves.items()}, (vectors, len(rows.outputs))
    silent = set(chosen_leaves(params, only)) - _owned(rows)
    found = {path: leaves[path].new_zeros(*lead, *leaves[path].shape) for path in silent}
    for name, pair in rows.pairs.items():
        layout = rows.layouts[name]
        v = matrices(pair) if layout.matrix else matrices(pair).squeeze(-1)
        found |= torch.func.vmap(torch.func.vmap(lambda one, layout=layout: unpack(layout, one, shapes)))(v)
    return {path: x.to(leaves[path]) for path, x in found.items()}


def _owned(rows: ExampleRows) -> set[str]:
    return {path for layout in rows.layouts.values() for path in layout.leaves}


def fisher_diagonal(
    fn: Model,
    loss: Loss,
    estimator: Estimator | None = None,
    *,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Callable[..., PyTree]:
    r"""Make `(params, (inputs, targets), *, generator=None, noise=None) -> diag F`, a tree like `params`.

        diag F = (1/N) Σ_n Σ_v (J_nᵀ c_{v,n})∘²,    F = (1/N) Σ_n J_nᵀ Λ_n J_n,    Σ_v c_v c_vᵀ = Λ_n (or an estimate)

    F is the curvature of the loss as it is: N times as large for the reduction "sum". The squares are those of whole
    examples: gradients are summed over the positions of an example first. Units of curvature, the loss per squared
    parameter; leaves in at least float32, in which the squares of half-precision gradients are.

    estimator   `exact()` (default): the GGN, which is the Fisher of the losses here; `monte_carlo(m)`,
                `curvature_prop(m)`: unbiased draws; `empirical()`: the empirical Fisher. `exact(chunk_size=k)` holds k
                output vectors at a time
    generator   a torch.Generator for estimators that draw; or `noise`, the uniform numbers themselves
    fn, loss, and what is raised: as `per_example_grads`; route, chunk_size, only, progress: see
    `kf.products.per_example`

    Source: Martens 2020 (1412.1193), §11 on what such diagonals estimate.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> diagonal = kf.products.fisher_diagonal(fn, kf.losses.mse(reduction="batchmean", scale=0.5))
        >>> diagonal(params, (torch.ones(5, 3), torch.zeros(5, 2)))["bias"]
        tensor([1., 1.])
    """
    loss = checked_loss(loss)
    source = exact() if estimator is None else estimator
    read = reader(fn, route=route, chunk_size=chunk_size, only=only)

    def diagonal(
        params: PyTree, batch: Batch, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> PyTree:
        inputs, targets = as_pair(batch)
        parts = read(params, inputs, estimated(loss, source, targets, generator, noise))
        total: dict[str, Tensor] = {}
        count = 0
        for part in shown(parts, progress):
            rows = None
            for rows in part():
                for path, square in _squares(rows, params).items():
                    total[path] = total[path] + square if path in total else square
            count += 0 if rows is None else len(rows.outputs)
        leaves, weight = _tree.unique_paths(params), example_weight(loss, count)
        silent = {path: torch.zeros_like(leaves[path]) for path in chosen_leaves(params, only) if path not in total}
        found = {path: weight * square for path, square in total.items()} | silent
        wide = {path: torch.promote_types(leaf.dtype, torch.float32) for path, leaf in leaves.items()}
        return _some(params, only, {path: x.to(leaves[path].device, wide[path]) for path, x in found.items()})

    return diagonal


@without_autocast
def _squares(rows: ExampleRows, params: PyTree) -> dict[str, Tensor]:
    """Σ_v Σ_n V_{v,n}∘² by path."""
    shapes, found = {path: leaf.shape for path, leaf in _tree.unique_paths(params).items()}, {}
    for name, pair in rows.pairs.items():
        layout, square = rows.layouts[name], squares_of(pair)
        found |= unpack(layout, square if layout.matrix else square.squeeze(-1), shapes)
    return found


def per_example_traces(
    fn: Model,
    loss: Loss,
    estimator: Estimator | None = None,
    *,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Callable[..., Tensor]:
    r"""Make `(params, (inputs, targets), *, generator=None, noise=None) -> tr F_n` [N], how much every example says.

        tr F_n = Σ_v ‖J_nᵀ c_{v,n}‖²,      F_n = J_nᵀ Λ_n J_n,      F = (1/N) Σ_n F_n,      mean_n tr F_n = tr F

    From thin factors, as `per_example_norms`: no J_n is formed. Scaled as the loss is: for the reduction "sum", F_n is
    N times as large. Units, estimators, generator, noise, what is raised: as `fisher_diagonal`.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> traces = kf.products.per_example_traces(fn, kf.losses.mse(reduction="batchmean", scale=0.5))
        >>> traces(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        tensor([8., 8., 8., 8., 8.])
    """
    loss = checked_loss(loss)
    source = exact() if estimator is None else estimator
    read = reader(fn, route=route, chunk_size=chunk_size, only=only)

    def traces(
        params: PyTree, batch: Batch, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        inputs, targets = as_pair(batch)
        parts = read(params, inputs, estimated(loss, source, targets, generator, noise))
        found = torch.cat(
            [reduce(torch.add, (_squared(rows)[0] for rows in part())) for part in shown(parts, progress)]
        )
        return len(found) * example_weight(loss, len(found)) * found

    return traces
