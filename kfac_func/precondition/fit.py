"""The curvature of a whole data set, for those who do not train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, StateError, explain
from kfac_func._tracing import readable
from kfac_func._tree import Static
from kfac_func._typing import Model, Progress, PyTree, shown
from kfac_func.capture import Unclaimed, rereadable
from kfac_func.curvature import Curvature, Structure, eigen
from kfac_func.damping import Split
from kfac_func.estimators import Estimator, exact, value_grad_and_stats
from kfac_func.estimators.stats import Sharing
from kfac_func.linalg.gram import Window
from kfac_func.losses import Loss
from kfac_func.precondition.averages import factorized, refreshed
from kfac_func.precondition.batch import Observed
from kfac_func.precondition.rules import curvature_of, met
from kfac_func.precondition.settings import link
from kfac_func.precondition.transform import Damping
from kfac_func.state import KFacState


def fit_curvature(
    fn: Model,
    loss: Loss,
    params: PyTree,
    batches: Iterable[Any],
    *,
    curvature: Structure | Curvature | None = None,
    estimator: Estimator | None = None,
    damping: Damping = 1e-3,
    split: Split = "exact",
    sharing: Sharing = "expand",
    strict: bool = True,
    unclaimed: Unclaimed | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> KFacState:
    r"""The curvature F̂ of the loss over all batches, at one point θ: a K-FAC state that was never trained with.

        A = Σ_b (N_b/N) A_b,   G = Σ_b (N_b/N) G_b,   S = Σ_b (N_b/N) S_b        N = Σ_b N_b

    fn, loss, params   as in `value_grad_and_stats`
    batches            (inputs, targets), to be gone through once; twice for `eigen`, whose scalings are measured in
                       the basis of all batches: a list or a loader, no iterator
    curvature          default `eigen()`: EKFAC
    estimator          default `exact()`; those that draw need a `generator`
    damping, split     as in `kf.kfac`, for `kf.precondition`. The damping is no part of the averages
    progress           wraps the batches, e.g. `tqdm.tqdm`

    Every mean is over all examples, whatever the sizes of the batches, and F̂ = (1/N) Σ_n J_nᵀ Λ_n J_n also for a loss
    with reduction "sum": the curvature of the sum over all data is N F̂. The state goes into `kf.precondition`,
    `kf.describe`, `kf.linear_operator`; `kf.observe` goes on averaging.
    Raises BatchError when there is no batch, StateError for a batch whose statistics are not finite and
    for structures that keep rows of fewer batches than there are (`block_diagonal`, `full`),
    HyperparameterError for values without meaning and for an iterator where two passes are needed; and what
    `value_grad_and_stats` raises.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.zeros(3, 2)), (torch.ones(2, 3), torch.zeros(2, 2))]
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, batches)
        >>> print(kf.describe(state).splitlines()[1].split())
        ['block', 'kind', 'V', 'memory', 'leaves']
    """
    state = link(eigen() if curvature is None else curvature, damping=damping, split=split).init(params)
    own = curvature_of(state)
    if own.scales:
        rereadable(batches, f"{own.name} measures its scalings in a second pass (kronecker() needs one)")
    loss, source = _by_example(loss, exact() if estimator is None else estimator)
    run = value_grad_and_stats(fn, loss, estimator=source, sharing=sharing, strict=strict, unclaimed=unclaimed)

    def looks(name: str) -> Iterator[tuple[Observed, Tensor]]:
        """Every batch with its part of all examples so far."""
        total = 0
        for index, batch in enumerate(shown(batches, progress)):
            _, _, stats = run(params, batch, generator=generator)
            assert stats is not None
            seen = Observed(state, stats)
            total += seen.rules.examples
            yield (
                _finite(seen, f"{name} of batch {index}"),
                torch.tensor(seen.rules.examples / total, dtype=torch.float64),
            )

    for seen, share in looks("the statistics"):
        state = _met(state, seen)._replace(
            curvature=own.absorb(state.curvature, seen.batch, share.to(state.weight.device)),
            observed=state.observed + 1,
            weight=state.weight + 1,
        )
        _whole(state, own.name)
    if state.curvature == ():
        raise BatchError(explain("there is no batch.", options="pass at least one (inputs, targets)"))
    state = refreshed(state)
    if own.scales:
        for seen, share in looks("the scalings"):
            state = state._replace(
                curvature=own.scale(state.curvature, seen.batch, share.to(state.weight.device)),
                scaled=state.scaled + 1,
                scale_weight=state.scale_weight + 1,
            )
    return factorized(state)


def _by_example(loss: Loss, estimator: Estimator) -> tuple[Loss, Estimator]:
    """The same loss and vectors, normalised by the number of examples."""
    if loss.reduction != "sum":
        return loss, estimator
    return loss._replace(reduction="batchmean"), estimator._replace(own=False)


def _met(state: KFacState, seen: Observed) -> KFacState:
    return state._replace(rules=Static(met(state.rules.value, seen.rules)))


def _whole(state: KFacState, name: str) -> None:
    """Structures that keep the rows themselves keep those of a few batches."""
    kept = [len(window.weights) for window in _tree.nodes(state.curvature, Window)]
    if kept and int(state.observed) > min(kept):
        raise StateError(
            explain(
                f"{name} forgets all but the last {min(kept)} batch(es).",
                why="it keeps rows of examples, no averages",
                options="window= as long as there are batches, all of one size; or one batch of all examples",
            )
        )


def _finite(seen: Observed, name: str) -> Observed:
    if readable(seen.finite) and not seen.finite:
        raise StateError(
            explain(
                f"{name} are not finite.",
                why="the inputs, the parameters or the outputs have NaN or infinities",
                options="leave such examples out; in training kf.observe counts such batches and goes on",
            )
        )
    return seen
