r"""Kernels between examples: inner products of their gradients and Jacobians, from thin factors.

    K[n, m] = ⟨V_n, V'_m⟩ = Σ_blocks Σ_{t,t'} (a_{n,t}·a'_{m,t'}) (g_{n,t}·g'_{m,t'}),        V_n = Σ_t g_{n,t} a_{n,t}ᵀ

For one position a block is the entrywise product of two small Gram matrices; for many positions the matrices V_n of a
few rows at a time are multiplied, whichever costs less (`linalg.gram`). No gradient of the whole net is ever formed on
the tape. With a chunk_size the rows of two chunks of examples are in memory at a time, and made again for every pair
of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import Model, Progress, PyTree, shown
from kfac_func.blocks import Pairs
from kfac_func.capture import as_pair
from kfac_func.linalg.gram import gram, summed_gram
from kfac_func.losses import Loss, checked_loss
from kfac_func.products.routes import Route
from kfac_func.products.rows import ExampleRows, Pass, reader, whole
from kfac_func.products.sources import once, own_scores, unit_vectors

Batch: TypeAlias = tuple[Any, Tensor] | list[Any]
"""(inputs, targets)."""

Kernel: TypeAlias = Callable[[Pairs, Pairs], Tensor]
"""The part of one block in the kernel of some examples and others, examples in the first two dimensions."""


def per_example_gram(
    fn: Model,
    loss: Loss,
    *,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Callable[..., Tensor]:
    r"""Make `(params, batch, other=None) -> K` [N, M], inner products of the examples' gradients, never formed.

        K[n, m] = ⟨∂l_n/∂w, ∂l'_m/∂w⟩          l' the losses of `other`, a second batch; None: of the batch itself

    Units of the squared loss per squared parameter; l_n as in `per_example_grads`. diag K = `per_example_norms`², and
    the eigenvalues of K/N are those of the empirical Fisher (1/N) Σ_n V_n V_nᵀ that are not zero.

    fn, loss, and what is raised: as `per_example_grads`; route, chunk_size, only, progress: see
    `kf.products.per_example`

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.ones(5, 3), torch.zeros(5, 2)
        >>> kf.products.per_example_gram(fn, kf.losses.mse())(params, batch).shape
        torch.Size([5, 5])
    """
    loss = checked_loss(loss)
    read = reader(fn, route=route, chunk_size=chunk_size, only=only)

    def products(params: PyTree, batch: Batch, other: Batch | None = None) -> Tensor:
        parts = [
            read(params, inputs, once(own_scores(loss, targets)))
            for inputs, targets in map(as_pair, (batch,) if other is None else (batch, other))
        ]
        return _table(*parts, kernel=gram, progress=progress)

    return products


def empirical_ntk(
    fn: Model,
    outputs: Literal["full", "trace"] = "full",
    *,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Callable[..., Tensor]:
    r"""Make `(params, inputs, other=None) -> Θ`, the empirical neural tangent kernel between examples.

        Θ[n, m, c, d] = ⟨∂z_{n,c}/∂w, ∂z'_{m,d}/∂w⟩        "full": [N, M, D, D], D outputs, flattened
        Θ[n, m] = Σ_d ⟨∂z_{n,d}/∂w, ∂z'_{m,d}/∂w⟩          "trace": [N, M], the trace over outputs (not divided by D)

    other   inputs of M other examples; None: M = N, the same ones

    Units of the squared outputs per squared parameter. One backward pass per output; J is never formed on the tape.
    fn and what is raised: as `per_example_grads`, HyperparameterError for other `outputs`; route, chunk_size,
    only, progress: see `kf.products.per_example`. Source: Jacot, Gabriel & Hongler 2018 (1806.07572); Novak,
    Sohl-Dickstein & Schoenholz 2022 (2206.08720).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> x = torch.ones(5, 3)
        >>> kf.products.empirical_ntk(fn)(params, x).shape, kf.products.empirical_ntk(fn, "trace")(params, x, x[:4])[0]
        (torch.Size([5, 5, 2, 2]), tensor([8., 8., 8., 8.]))
    """
    if outputs not in ("full", "trace"):
        raise HyperparameterError(explain("unknown outputs.", got=repr(outputs), wanted="'full' or 'trace'"))
    kernel = _by_outputs if outputs == "full" else summed_gram
    read = reader(fn, route=route, chunk_size=chunk_size, only=only)

    def theta(params: PyTree, inputs: Any, other: Any = None) -> Tensor:
        parts = [read(params, x, once(unit_vectors)) for x in ((inputs,) if other is None else (inputs, other))]
        return _table(*parts, kernel=kernel, progress=progress)

    return theta


def _by_outputs(one: Pairs, two: Pairs) -> Tensor:
    """[n, m, D, D]."""
    (d, n), (e, m) = one.left.shape[:2], two.left.shape[:2]
    return gram(one, two).reshape(d, n, e, m).permute(1, 3, 0, 2)


def _table(parts: list[Pass], others: list[Pass] | None = None, *, kernel: Kernel, progress: Progress | None) -> Tensor:
    """The kernel of all examples with all others, chunk by chunk; half of it when both are the same."""
    table: dict[tuple[int, int], Tensor] = {}
    for i, part in enumerate(shown(parts, progress)):
        mine = whole(part)
        for j, other in enumerate(parts[:i] if others is None else others):
            table[i, j] = _summed(kernel, mine, whole(other))
        if others is None:
            table |= {(j, i): _turned(table[i, j]) for j in range(i)}
            table[i, i] = _summed(kernel, mine, mine)
    width = range(len(parts if others is None else others))
    return torch.cat([torch.cat([table[i, j] for j in width], dim=1) for i in range(len(parts))])


def _turned(found: Tensor) -> Tensor:
    """[n, m] or [n, m, D, D] of the pairs (m, n)."""
    return found.mT if found.ndim == 2 else found.permute(1, 0, 3, 2)


def _summed(kernel: Kernel, one: ExampleRows, two: ExampleRows) -> Tensor:
    """The sum over blocks."""
    return reduce(torch.add, (kernel(rows, two.pairs[name]) for name, rows in one.pairs.items()))
