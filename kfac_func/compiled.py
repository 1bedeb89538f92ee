"""A whole training step as one graph: pass, statistics, averages, solve, the rest of the chain, new parameters."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._typing import Model, PyTree
from kfac_func.estimators import Estimator, monte_carlo, value_grad_and_stats
from kfac_func.estimators.statistics import Step
from kfac_func.estimators.vectors import uniform
from kfac_func.losses import Loss
from kfac_func.precondition.periods import refresh_due, scale_due
from kfac_func.precondition.rules import curvature_of
from kfac_func.state import KFacState
from kfac_func.transforms import GradientTransformation, apply_updates

Train = Callable[..., tuple[Tensor, PyTree, PyTree]]


def compile_step(
    fn: Model,
    loss: Loss,
    tx: GradientTransformation,
    *,
    estimator: Estimator | None = None,
    statistics: bool = True,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    **options: Any,
) -> Train:
    r"""Make `train(params, state, batch) -> (value, params, state)`: one step of training under `torch.compile`.

        value, grads, stats = step(params, batch);   updates, state = tx.update(grads, state, params, stats=stats)
        params = apply_updates(params, updates)

    fn, loss, estimator    as in `value_grad_and_stats`; `sharing`, `strict` and `unclaimed` in `options` go there
    tx                     a chain with `kfac()`, or any transformation
    statistics             whether steps with statistics are compiled too. Better not with convolutions on a CPU: what
                           is written out for their patches compiles for minutes and runs slower than it did before
    backend, mode          as in `torch.compile`

    The same numbers as without a compiler, but for rounding. `train` takes further

    generator    for the draws, the same ones as in `value_grad_and_stats`
    stats        whether this step takes statistics
    refresh      as in the update of `kfac`; None: by its period
    **extra      for `tx.update`

    A step without a refresh is one graph, in which gradients that only K-FAC reads are never summed up (`rows`). A
    step with one runs in two parts: a compiled pass, and the update as it is, whose factorisations are done side by
    side, one core each. The first step with batches of a shape, and that after loading a state from a file, is not
    compiled at all: it makes the plan, and gives the state its shape. So there are up to three graphs, made when first
    needed (with statistics, without, and the pass), and no others as long as the shapes of a batch stay: leave out a
    smaller last batch. Raises what its parts raise.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> tx = kf.chain(kf.kfac(), kf.sgd(0.1))
        >>> train = kf.compile_step(fn, kf.losses.mse(), tx, backend="eager")
        >>> batch, generator = (torch.eye(3), torch.ones(3, 2)), torch.Generator().manual_seed(0)
        >>> state = tx.init(params)
        >>> value, params, state = train(params, state, batch, generator=generator)
    """
    source = monte_carlo() if estimator is None else estimator
    step = value_grad_and_stats(fn, loss, estimator=source, rows=True, **options)
    shape_of = _noise_shapes(fn, loss, source)
    settings = {"backend": backend, "mode": mode, "fullgraph": True, "dynamic": False}
    move, look = (torch.compile(_own(part), **settings) for part in (_moved(step, tx), _looked(step)))
    met: set[Any] = set()

    def train(params, state, batch, *, generator=None, stats=True, refresh=None, **extra):
        kind = _kind(batch[0])
        noise = _drawn(source, shape_of, params, batch[0], generator) if stats else None
        inner = _tree.nodes(state, KFacState)
        new = kind not in met or any(one.curvature == () or one.rules.value.curvature is None for one in inner)
        met.add(kind)  # its plan is made outside of any graph
        eager = new or (stats and not statistics)
        if not eager and not _due(inner, refresh):
            return move(params, state, batch, noise, stats, stats and _scales(inner), extra)
        if stats and not eager:
            value, grads, found = look(params, batch, noise)
        else:
            value, grads, found = step(params, batch, noise=noise, stats=stats)
        told = {"refresh": refresh} if inner else {}
        updates, state = tx.update(grads, state, params, stats=found, **told, **extra)
        return value, apply_updates(params, updates), state

    return train


def _moved(step: Step, tx: GradientTransformation) -> Train:
    """A whole step without a refresh."""

    def move(params, state, batch, noise, stats, scale, extra):
        value, grads, found = step(params, batch, noise=noise, stats=stats)
        told = {"refresh": False, "scale": scale} if _tree.nodes(state, KFacState) else {}
        updates, state = tx.update(grads, state, params, stats=found, **told, **extra)
        return value, apply_updates(params, updates), state

    return move


def _looked(step: Step) -> Callable[..., Any]:
    """The pass alone."""

    def look(params, batch, noise):
        return step(params, batch, noise=noise)

    return look


def _own(fn: Any) -> Any:
    """The same function with a code object of its own: torch counts graphs by code, and gives up at eight."""
    return FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


def _drawn(
    source: Estimator,
    shape_of: Callable[[PyTree, Any], tuple[int, ...] | None],
    params: PyTree,
    inputs: Any,
    generator: torch.Generator | None,
) -> Tensor | None:
    """The noise of a step, drawn outside of the graph; None for estimators that do not draw."""
    shape = shape_of(params, inputs)
    return None if shape is None else uniform(shape, _tree.leaves(params)[0].device, generator, source.name)


def _kind(inputs: Any) -> tuple[Any, ...]:
    """The shapes of a batch."""
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in _tree.leaves(inputs))


def _noise_shapes(fn: Model, loss: Loss, source: Estimator) -> Callable[[PyTree, Any], tuple[int, ...] | None]:
    """What `source.noise` says of the outputs; the model runs once per shape of a batch to see them."""
    known: dict[Any, tuple[int, ...] | None] = {}

    def shape_of(params: PyTree, inputs: Any) -> tuple[int, ...] | None:
        key = _kind(inputs)
        if key not in known:
            with torch.no_grad():
                known[key] = source.noise(loss, fn(params, inputs))
        return known[key]

    return shape_of


def _due(states: list[KFacState], refresh: bool | None) -> bool:
    return any(bool(refresh_due(state, refresh)) for state in states)


def _scales(states: list[KFacState]) -> bool:
    return any(curvature_of(state).scales and scale_due(state, None) for state in states)
