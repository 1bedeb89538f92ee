"""How every training example moves every query."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kfac_func._tracing import without_autocast
from kfac_func._typing import Model, Progress, PyTree, Scalar, shown
from kfac_func.blocks import Pairs, chunks
from kfac_func.capture import rereadable
from kfac_func.influence.gradients import Read, Score, arrays, prepared, some
from kfac_func.linalg import Spectral
from kfac_func.losses import Loss, checked_loss
from kfac_func.losses.means import same_mean
from kfac_func.products.routes import Route

Measurement: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(z, targets) -> [Q], a number for every query: a margin, a logit, a loss."""


def scores(
    fn: Model,
    loss: Loss,
    params: PyTree,
    state: PyTree,
    train_batches: Iterable[Any],
    query_batches: Iterable[Any],
    *,
    damping: Scalar | None = None,
    query_loss: Loss | Measurement | None = None,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""The influence [Q, N] of every training example n on every query q.

        score[q, n] = ∇m_qᵀ (F̂ + λ)⁻¹ ∇l_n

    with l_n the training loss of example n and m_q the loss of the query. In the optimum of (1/N) Σ_n l_n the score is
    −dm_q/dε for the loss (1/N) Σ l + ε l_n: score/N is the change of m_q, to first order, when example n is left out.
    Positive: the example helps, and without it the query's loss rises. Scores are linear in n and q: that of a group
    is the sum over the group.

    fn, loss, params   as in `value_grad_and_stats`; l_n is the example's own loss
    state              a K-FAC state at params, of `kf.fit_curvature` for example; any curvature with an eigenbasis
    train_batches      (inputs, targets), gone through once for every query batch: a list, or a loader that does not
                       shuffle
    query_batches      (inputs, targets), gone through once. The gradients of one query batch are held, Q_batch times
                       the size of the parameters; those of training examples are not
    damping            λ > 0 of all blocks, in units of F̂; None: that of the state. 0.1 tr F̂/P is usual; with the l2
                       coefficient of the training loss the first order is exact where F̂ is the Hessian
    query_loss         another loss, or a function (z, targets) -> [Q] of the outputs, in place of `loss`
    route, chunk_size  as in `kf.products.per_example_grads`; chunk_size bounds the memory of a training batch
    only               patterns of block names (`fnmatch`); the others count as constant: ["head*"] is the head alone
    progress           wraps the training batches, once for every query batch, e.g. `tqdm.tqdm`

    The units are those of m, for F̂ the mean over examples in units of l, which `kf.fit_curvature` makes for every
    reduction. Where the network is not at an optimum, or the loss not convex, the score is the proximal Bregman
    response: how the net moves when it is tuned without the example but held near its present outputs and weights
    (Bae et al. 2022). Training anew can give something else.

    Raises BatchError for no batch, an empty batch and NaN, HyperparameterError where F̂ + λ has no inverse, for an
    iterator, a loader that shuffles, patterns without a block, and a "mean" that depends on the batches (ignored
    targets, class weights); StateError for a state without statistics, eigenbasis or the blocks of this model,
    TreeMismatchError for other parameters, CaptureError for examples that see each other, and where an explicit route
    has no rows for them.
    Source: Koh & Liang 2017 (1703.04730), §2; with EKFAC Grosse et al. 2023 (2308.03296), §3; Bae et al. 2022
    (2209.05364).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> train = [(torch.eye(3), torch.zeros(3, 2)), (torch.ones(2, 3), torch.zeros(2, 2))]
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, train)
        >>> query = [(torch.ones(4, 3), torch.zeros(4, 2))]
        >>> kf.influence.scores(fn, kf.losses.mse(), params, state, train, query, damping=0.1).shape
        torch.Size([4, 5])
    """
    loss = checked_loss(loss)
    own, asked = same_mean(loss), loss if query_loss is None else query_loss
    score = score_of(same_mean(asked) if isinstance(asked, Loss) else asked)
    train_batches = rereadable(train_batches, "every batch of queries needs all of the training examples")
    spectra, read = prepared(fn, params, state, damping, route, chunk_size, only)
    found = []
    for queries in query_batches:
        directions = _solved(spectra, read, score, queries)
        seen = shown(train_batches, progress)
        met = [_met(directions, rows) for batch in seen for rows in read(own.score, batch)]
        found.append(torch.cat(some(met, "training examples"), dim=1))
    return torch.cat(some(found, "queries"))


def score_of(measured: Loss | Measurement) -> Score:
    """The derivative of the number of every example in its outputs."""
    if isinstance(measured, Loss):
        return measured.score
    return torch.func.grad(lambda z, targets: measured(z, targets).sum())


def _solved(spectra: dict[str, Spectral], read: Read, score: Score, queries: Any) -> dict[str, Tensor]:
    """(F̂ + λ)⁻¹ ∇m_q of all queries, by block."""
    parts = list(read(score, queries))
    return {name: torch.cat([_solve(spectra[name], arrays(part[name])) for part in parts]) for name in parts[0]}


@without_autocast
def _solve(spectral: Spectral, v: Tensor) -> Tensor:
    return torch.func.vmap(lambda one: spectral.applied(torch.reciprocal, one))(v)


@without_autocast
def _met(directions: dict[str, Tensor], rows: dict[str, Pairs]) -> Tensor:
    """Σ_blocks ⟨X_q, V_n⟩, [Q, B]."""
    return torch.stack([_inner(directions[name], one) for name, one in rows.items()]).sum(0)


def _inner(x: Tensor, rows: Pairs) -> Tensor:
    """⟨X_q, V_n⟩ [Q, B]: from the rows themselves at a single position, else from a few V_n at a time."""
    positions, outputs = rows.left.shape[2], rows.left.shape[3:].numel()
    x = x.reshape(len(x), *rows.left.shape[3:], rows.right.shape[-1])
    if positions > 1:
        return torch.cat([x.flatten(1) @ arrays(part).flatten(1).mT for part in chunks(rows)], dim=1)
    parts = []
    for part in chunks(rows, len(x) * outputs):
        left, right = (side[0].squeeze(1) for side in part)
        parts.append(torch.einsum("qb...o,b...o->qb", torch.einsum("q...oi,b...i->qb...o", x, right), left))
    return torch.cat(parts, dim=1)
