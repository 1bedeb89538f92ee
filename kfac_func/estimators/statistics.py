r"""Loss, gradient and curvature statistics of a batch in one forward pass; the only place that decides normalisation.

    L = (1/N) Σ_n l_n  ("mean", "batchmean")   or   L = Σ_n l_n  ("sum"),        F = ∂²-like curvature of that same L

    c    vectors of every example's own loss, times √N for "sum", because F of a sum is N times that of the mean
    g    = ∂(cᵀ z_n)/∂s: the pullback of c, without any 1/N
    N    examples: the first dimension of the inputs and outputs
    T    positions: the sum of S over all uses of a block ("expand"), the number of its uses ("reduce")

A loss that averages over d outputs has its 1/d inside Λ and c already, because c belongs to that same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func._tree import Static
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import Block, KroneckerState, Use, gradients, pays, thin
from kfac_func.capture import (
    Plan,
    Record,
    Unclaimed,
    as_pair,
    examples_of,
    not_empty,
    planner,
    record,
    rules_of,
    tensor_of,
)
from kfac_func.estimators.counting import counted
from kfac_func.estimators.history import settling
from kfac_func.estimators.stats import Gradient, Sharing, Stats, StatsRules, layouts_of
from kfac_func.estimators.vectors import Estimator, monte_carlo, noise_for, uniform
from kfac_func.losses import Loss, checked_loss, example_weight

Step = Callable[..., tuple[Tensor, PyTree, Stats | None]]


def value_grad_and_stats(
    fn: Model,
    loss: Loss,
    *,
    estimator: Estimator | None = None,
    sharing: Sharing = "expand",
    strict: bool = True,
    unclaimed: Unclaimed | None = None,
    measure: Callable[[dict[str, Block]], Any] | None = None,
    rows: bool = False,
) -> Step:
    r"""Make `step(params, (inputs, targets)) -> (value, grads, stats)`: ONE forward pass for all three.

    fn         pure function (params, inputs) -> outputs [N, *out]; examples are in the first dimension of inputs and
               outputs
    loss       from `kf.losses`; `value` is its value, `grads` the gradient of that value, a tree like `params`
    estimator  where output vectors come from; default `monte_carlo()`, one draw from the model per example
    sharing    of A and G. "expand": every shared position (token, pixel) is a row. "reduce": inputs are averaged and
               gradients summed over positions. What is exact (diagonals, scalings, exact blocks) takes the gradients of
               examples under either
    strict     raise UncapturedParameterError when a parameter is used where no layer kind can see it
    unclaimed  "diagonal" or "identity" for such parameters, for all or by path pattern, e.g. {"head.*": "diagonal"}
    measure    reduce the statistics to moments at once (`blockwise(kronecker(), diagonal()).measure`): with
               `exact(chunk_size)` only one chunk of vectors is ever held
    rows       hand on the gradient of layers that are wider than the batch is long as rows too, a gᵀ before the sum:
               the preconditioner that is given these very gradients solves for the rows, which is cheaper (not less
               exact: only the rounding differs)

    The step takes further:

    generator  a torch.Generator for estimators that draw; the global generator is never touched. Same seed, same
               statistics
    noise      the uniform noise in [0, 1) itself, in place of a generator (under vmap and torch.compile)
    plan       an explicit `kf.make_plan(...)`; otherwise one is made per signature of params and inputs, by some runs
               on two and three examples
    stats      False: value and gradient alone, and None (with `rows`, statistics that only carry the gradient)

    Weight gradients of captured layers are computed from (a, g), not by autograd; they are the same numbers. Nothing
    is mutated. A use shared by all examples (a position embedding of `arange(T)`) and diagonals of unclaimed leaves
    need vectors of mean zero: for `exact` and `empirical` every example's vectors then get a random sign, which
    leaves all other statistics as they are. Raises the errors of `make_plan`, BatchError, TargetError;
    HyperparameterError when a draw has neither generator nor noise. Source: Martens & Grosse 2015 (1503.05671);
    expand and reduce: Eschenhagen et al. 2023 (2311.00636).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse())
        >>> batch = torch.ones(5, 3), torch.zeros(5, 2)
        >>> value, grads, stats = step(params, batch, generator=torch.Generator().manual_seed(0))
        >>> grads["weight"].shape, stats.grads[0].shape
        (torch.Size([2, 3]), torch.Size([1, 5, 2]))
    """
    if sharing not in ("expand", "reduce"):
        raise HyperparameterError(explain("unknown sharing.", got=repr(sharing), wanted="'expand' or 'reduce'"))
    loss = checked_loss(loss)
    source = monte_carlo() if estimator is None else estimator
    settle = settling()
    planned = planner(fn, strict=strict, unclaimed=unclaimed)

    def step(
        params: PyTree,
        batch: Any,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        plan: Plan | None = None,
        stats: bool = True,
    ) -> tuple[Tensor, PyTree, Stats | None]:
        inputs, targets = as_pair(batch)
        params = settle(params)
        if not stats and not rows:
            return *_value_and_grad(fn, loss, params, inputs, targets), None
        plan = planned(params, inputs) if plan is None else plan
        kept = _wide(plan, examples_of(plan, inputs)) if rows and not plan.cut.whole else frozenset()
        if not stats and not kept:
            return *_value_and_grad(fn, loss, params, inputs, targets), None
        run = record(fn, plan, params, inputs)
        cotangent, value = torch.func.grad_and_value(loss.value)(run.outputs, targets)
        own, rest = run.pullback(cotangent)
        grads, known = _gradients(plan, run, own, rest, params, kept)
        rules = StatsRules(plan, layouts_of(plan, run.rest), run.examples, sharing, silent=not stats)
        if rules.silent:
            return value, grads, Stats((), (), {}, (), known, Static(rules))
        kept = counted(loss, run.outputs, targets, plan, own)
        mine = Chunk(own, rest) if source.own else None
        del own, rest  # as large as all activations
        chunks = _chunks(source, loss, run, targets, mine, generator, noise, plan)
        gather = partial(_gathered, run, Static(rules), kept)
        if measure is not None:
            found = _measured(measure, chunks, source.chunks(loss, run.outputs), gather)
        else:
            found = gather(list(chunks))
        return value, grads, found._replace(gradient=known)

    return step


class Chunk(NamedTuple):
    """The pulled-back vectors of one chunk."""

    taps: tuple[Tensor, ...]
    rest: dict[str, Tensor]


def _value_and_grad(fn: Model, loss: Loss, params: PyTree, inputs: Any, targets: Tensor) -> tuple[Tensor, PyTree]:
    if not rules_of(fn).whole:
        not_empty(inputs)

    def total(leaves: list[Tensor]) -> Tensor:
        return loss.value(tensor_of(fn(_tree.with_leaves(params, leaves), inputs)), targets)

    grads, value = torch.func.grad_and_value(total)(_tree.leaves(params))
    return value, _tree.with_leaves(params, grads)


def _gradients(
    plan: Plan, run: Record, own: tuple[Tensor, ...], rest: dict[str, Tensor], params: PyTree, kept: frozenset[str]
) -> tuple[PyTree, dict[str, Gradient]]:
    """The gradient of the loss: claimed leaves from (a, g), all others from autograd. And what is worth keeping as
    rows.
    """
    leaves = dict(zip(plan.paths, _tree.leaves(params), strict=True))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    found = dict(rest)
    rows = {}
    for layout, uses in plan.blocks:
        mine = tuple(Use(run.inputs[k], own[k].unsqueeze(0), rule) for k, rule in uses)
        found |= gradients(layout, mine, shapes)
        if layout.name in kept:
            rows[layout] = thin(layout, mine)
    found = {path: found[path].to(leaf.dtype) for path, leaf in leaves.items()}
    known = {at.name: Gradient(one, tuple(found[path] for path in at.leaves)) for at, one in rows.items()}
    return _tree.with_leaves(params, list(found.values())), known


def _wide(plan: Plan, examples: int) -> frozenset[str]:
    """The blocks that are wider than the batch is long."""
    rules = {layout: [rule for _, rule in uses] for layout, uses in plan.blocks}
    return frozenset(layout.name for layout, mine in rules.items() if pays(layout, mine, examples))


def _chunks(
    source: Estimator,
    loss: Loss,
    run: Record,
    targets: Tensor,
    own: Chunk | None,
    generator: torch.Generator | None,
    noise: Tensor | None,
    plan: Plan,
) -> Iterator[Chunk]:
    z, n = run.outputs, run.examples
    total = (n * example_weight(loss, n)) ** 0.5  # F of a sum is N times that of the mean
    flip = plan.shared and not source.zero_mean
    if own is not None and not flip:
        scale = total / example_weight(loss, n)  # from ∂L/∂z to the gradient of every example's own loss
        taps, rest = own
        yield Chunk(
            tuple((scale * g).unsqueeze(0) for g in taps), {p: (scale * g).unsqueeze(0) for p, g in rest.items()}
        )
        return
    noise = noise_for(source, loss, z, generator, noise)
    signs: Tensor | float = 1.0
    if flip:
        u = uniform(
            (n,),
            z.device,
            generator,
            f"{source.name} with shared uses, unclaimed diagonals or where examples see each other",
        )
        signs = torch.where(u < 0.5, -1.0, 1.0).to(z.dtype).reshape(n, *[1] * (z.ndim - 1))
    for c in source.vectors(loss, z, targets, noise):
        c = (c * (signs * total)).to(z.dtype)
        yield Chunk(*run.pulled(c))


def _gathered(run: Record, rules: Static[StatsRules], kept: dict[str, Tensor], chunks: list[Chunk]) -> Stats:
    plan = rules.value.plan
    diagonal = [path for path, policy in plan.unclaimed if policy == "diagonal"]
    if not chunks:
        none = {path: run.rest[path].new_zeros(0, *run.rest[path].shape) for path in diagonal}
        return Stats(run.inputs, (), none, (), {}, rules, kept)
    taps = tuple(_joined([chunk.taps[k] for chunk in chunks]) for k in range(len(plan.taps)))
    rest = {path: _joined([chunk.rest[path] for chunk in chunks]) for path in diagonal}
    return Stats(run.inputs, taps, rest, (), {}, rules, kept)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _measured(
    measure: Callable[..., Any], chunks: Iterator[Chunk], k: int, gather: Callable[[list[Chunk]], Stats]
) -> Stats:
    """Moments are means, so k chunks whose vectors are scaled by √k average to the moments of all vectors."""
    moments, rules = None, None
    if k == 0:
        stats = gather([])
        return Stats((), (), {}, measure(stats.blocks()), {}, stats.rules)
    for chunk in chunks:
        larger = Chunk(tuple(k**0.5 * g for g in chunk.taps), {path: k**0.5 * g for path, g in chunk.rest.items()})
        stats = gather([larger])
        rules, part = stats.rules, measure(stats.blocks())
        if k > 1 and any(isinstance(m.g_mean, Tensor) for m in _tree.nodes(part, KroneckerState)):
            raise HyperparameterError(
                explain(
                    "centred statistics cannot be reduced chunk by chunk.",
                    why="the mean rows of different output vectors would be averaged",
                    options="leave `measure=` or `chunk_size` out; or centred=False",
                )
            )
        part = _tree.tree_map(lambda m: m / k, part)
        moments = part if moments is None else _tree.tree_map(torch.add, moments, part)
    assert rules is not None
    return Stats((), (), {}, moments, {}, rules)
