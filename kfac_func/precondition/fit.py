"""The curvature of a whole data set, for those who do not train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, StateError, explain
from kfac_func._tracing import readable, settled, without_autocast
from kfac_func._tree import Static
from kfac_func._typing import Model, Progress, PyTree, shown
from kfac_func.blocks import Block
from kfac_func.capture import Unclaimed, rereadable
from kfac_func.curvature import Batch, Curvature, Structure, eigen
from kfac_func.curvature.base import Question
from kfac_func.damping import Split
from kfac_func.estimators import Estimator, exact, forward_only, value_grad_and_stats
from kfac_func.estimators.statistics import Step
from kfac_func.estimators.stats import Sharing
from kfac_func.linalg.gram import Window
from kfac_func.losses import Loss, checked_loss
from kfac_func.losses.means import same_mean
from kfac_func.precondition.averages import factorized, refreshed
from kfac_func.precondition.batch import Observed
from kfac_func.precondition.notices import wide
from kfac_func.precondition.rules import curvature_of, met
from kfac_func.precondition.settings import link
from kfac_func.precondition.transform import Damping
from kfac_func.state import KFacState

Measure = Callable[[dict[str, Block]], Any]
BUDGET = 2**22, 8
"""What the vectors of one chunk may hold at all layers: bytes, or so many times the bytes of the parameters."""


@without_autocast
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
    estimator          default `exact()`; those that draw need a `generator`. One chunk of its vectors is held at a
                       time, of an `exact()` without `chunk_size` about as many as 4 MB or eight times the parameters
                       can hold. But all of a batch are held for what needs them together: sums of Kronecker products
                       (`kpsvd` and its relatives), rows (`block_diagonal`, `full`, coarse spaces that move) and
                       `centred` factors
    damping, split     as in `kf.kfac`, for `kf.precondition`. The damping is no part of the averages
    progress           wraps the batches, e.g. `tqdm.tqdm`

    Every mean is over all examples, whatever the sizes of the batches, and F̂ = (1/N) Σ_n J_nᵀ Λ_n J_n also for a loss
    with reduction "sum": the curvature of the sum over all data is N F̂. The state goes into `kf.precondition`,
    `kf.describe`, `kf.linear_operator`; `kf.observe` goes on averaging.
    Raises BatchError when there is no batch, StateError for a batch whose statistics are not finite and
    for structures that keep rows of fewer batches than there are (`block_diagonal`, `full`),
    HyperparameterError for values without meaning, for a "mean" that depends on how the data are cut into batches
    (ignored targets, class weights), and for an iterator or another first batch where two passes are needed; and what
    `value_grad_and_stats` raises.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.zeros(3, 2)), (torch.ones(2, 3), torch.zeros(2, 2))]
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, batches)
        >>> print(kf.describe(state).splitlines()[1].split())
        ['block', 'kind', 'V', 'memory', 'leaves']
    """
    params = _tree.tree_map(settled, params)
    state = link(eigen() if curvature is None else curvature, damping=damping, split=split).init(params)
    own = curvature_of(state)
    if own.scales:
        batches = rereadable(batches, f"{own.name} measures its scalings in a second pass (kronecker() needs one)")
    loss, source = _by_example(checked_loss(loss), exact() if estimator is None else estimator)
    step = _stepper(fn, loss, params, source, own, sharing=sharing, strict=strict, unclaimed=unclaimed)

    def looks(name: str, measure: Measure) -> Iterator[tuple[Observed, Tensor]]:
        """Every batch with its part of all examples so far; where that is enough, what is measured of it alone."""
        total, run = 0, None
        for index, batch in enumerate(shown(batches, progress)):
            run = step(batch, measure) if run is None else run
            _, _, stats = run(params, batch, generator=generator)
            assert stats is not None
            seen = Observed(state, stats)
            total += seen.rules.examples
            share = torch.tensor(seen.rules.examples / total, dtype=torch.float64, device=state.weight.device)
            yield _finite(seen, f"{name} of batch {index}"), share

    for seen, share in looks("the statistics", lambda blocks: own.measure(own.prepare(blocks))):
        state = _met(state, seen)._replace(
            curvature=own.absorb(state.curvature, seen.batch, share),
            observed=state.observed + 1,
            weight=state.weight + 1,
        )
        _whole(state, own.name)
    if state.curvature == ():
        raise BatchError(explain("there is no batch.", options="pass at least one (inputs, targets)"))
    wide(state)
    state = refreshed(state)
    if own.scales:
        for seen, share in looks("the scalings", partial(_answers, own, state.curvature)):
            state = state._replace(
                curvature=own.scale(state.curvature, _replayed(seen.batch) if own.summable else seen.batch, share),
                scaled=state.scaled + 1,
                scale_weight=state.scale_weight + 1,
            )
    return factorized(state)


# ------------------------------------------------------------------ a few vectors at a time


def _stepper(
    fn: Model, loss: Loss, params: PyTree, source: Estimator, own: Curvature, **options: Any
) -> Callable[[Any, Measure], Step]:
    """(the first batch, measure) -> the step of a pass, which measures chunk by chunk where that is enough."""
    chosen: list[Estimator] = []

    def made(batch: Any, measure: Measure) -> Step:
        if not chosen:
            chosen.append(_bounded(source, own, params, partial(_numbers, fn, loss, params, batch, options)))
        few = measure if own.summable else None
        return value_grad_and_stats(fn, loss, estimator=chosen[0], measure=few, **options)

    return made


def _bounded(source: Estimator, own: Curvature, params: PyTree, numbers: Callable[[], int]) -> Estimator:
    """`exact()` with as many vectors at a time as the budget holds, of so many numbers per example; others as they
    are.
    """
    if source.name != "exact" or not own.summable:
        return source
    each, (least, times) = max(1, numbers()), BUDGET
    budget = max(least, times * sum(leaf.nbytes for leaf in _tree.leaves(params)))

    def sized(loss: Loss, z: Tensor) -> Estimator:
        whole = source.chunks(loss, z) == 1
        return exact(max(1, budget // (each * len(z) * z.itemsize))) if whole and len(z) else source

    return source._replace(
        vectors=lambda loss, z, *more: sized(loss, z).vectors(loss, z, *more),
        chunks=lambda loss, z: sized(loss, z).chunks(loss, z),
    )


def _numbers(fn: Model, loss: Loss, params: PyTree, batch: Any, options: dict[str, Any]) -> int:
    """The inputs and outputs of all layers for one example: about what one vector pulls back to."""

    def count(blocks: dict[str, Block]) -> Tensor:
        uses = [(block, use) for block in blocks.values() for use in block.uses]
        inputs = [use.inputs.numel() // block.examples for block, use in uses]
        outputs = [block.layout.groups * use.rule.positions * use.rule.width for block, use in uses]
        return torch.tensor(sum(inputs) + sum(outputs))

    _, _, stats = value_grad_and_stats(fn, loss, estimator=forward_only(), measure=count, **options)(params, batch)
    assert stats is not None
    return int(stats.moments)


def _answers(own: Curvature, state: Any, blocks: dict[str, Block]) -> list[Any]:
    """What a batch answers to all that `scale` asks, in that order."""
    prepared, found = own.prepare(blocks), []

    def ask(question: Question) -> Any:
        found.append(question(prepared))
        return found[-1]

    own.scale(state, Batch((), ask), torch.ones((), dtype=torch.float64))
    return found


def _replayed(batch: Batch) -> Batch:
    """A batch that has been asked: its answers, in the same order."""
    answers = iter(batch.first)
    return Batch((), lambda question: next(answers))


# ------------------------------------------------------------------ normalisation and checks


def _by_example(loss: Loss, estimator: Estimator) -> tuple[Loss, Estimator]:
    """The same loss and vectors, normalised by the number of examples; in every batch alike."""
    if loss.reduction != "sum":
        return same_mean(loss), estimator
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
