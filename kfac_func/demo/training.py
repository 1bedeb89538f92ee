"""One training run of the demo: the same loop for every method, so that only the optimiser differs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._typing import PyTree
from kfac_func.demo.models import autoencoder
from kfac_func.diagnostics.plots import History

MOMENTUM, RADIUS = 0.9, 10.0


class Method(NamedTuple):
    """An optimiser, "K-FAC", "Adam" or "SGD", and its one tuned number."""

    name: str
    rate: float


class Problem(NamedTuple):
    """A data set [N, D] of intensities, the widths of its autoencoder, and how it is trained."""

    name: str
    images: Tensor
    sizes: tuple[int, ...]
    batch: int
    steps: int


class Budget(NamedTuple):
    """Training goes on until both `steps` and `seconds` (of training) are reached, then to its next evaluation."""

    steps: int
    seconds: float = 0.0


def transformation(method: Method) -> kf.GradientTransformation:
    """The optimiser as a chain of the library. All options that are not written here are defaults.

    All three methods are clipped to the same norm: K-FAC its direction, the others their gradient.

    >>> params = {"w": torch.ones(2)}
    >>> tx = transformation(Method("SGD", 0.5))
    >>> updates, _ = tx.update({"w": torch.ones(2)}, tx.init(params), params)
    >>> updates["w"].tolist()
    [-0.5, -0.5]
    """
    clip = kf.clip_by_global_norm(RADIUS)
    if method.name == "K-FAC":
        return kf.chain(kf.kfac(), clip, kf.sgd(method.rate))
    if method.name == "Adam":
        return kf.chain(clip, kf.adam(method.rate))
    return kf.chain(clip, kf.sgd(method.rate, momentum=MOMENTUM))


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices [size] of endless batches: every example once per epoch, in an order that depends on the seed only.

    >>> first, second = (sorted(next(batches(4, 4, seed=0)).tolist()) for _ in range(2))
    >>> first == second == [0, 1, 2, 3]
    True
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def train(
    problem: Problem,
    method: Method,
    budget: Budget,
    *,
    seed: int = 0,
    device: str = "cpu",
    every: int = 10,
    progress: Callable[[int, float], object] = lambda step, loss: None,
) -> History:
    """Train the problem's autoencoder and record its loss on the whole training set every `every` steps.

    Weights, batches and draws depend on the seed only: all methods start at the same point and see the same batches.
    The seconds are those of training alone (gradient, statistics, update), without the evaluations; K-FAC's include
    its first step, which makes the capture plan. All methods take their gradient from the same `value_grad_and_stats`,
    the baselines with `stats=False`: plain reverse mode without capture. A run stops when its loss is not finite.
    """
    target = torch.device(device)
    images = problem.images.to(target)
    fn, params = kf.make_functional(autoencoder(problem.sizes, seed).to(target))
    loss = kf.losses.bce_with_logits(reduction="batchmean")
    step = kf.value_grad_and_stats(fn, loss, estimator=kf.estimators.monte_carlo())
    tx = transformation(method)
    state = tx.init(params)
    draws = torch.Generator(target).manual_seed(seed)
    order = batches(len(images), problem.batch, seed)

    def advance(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        batch = images[next(order).to(target)]
        if method.name == "K-FAC":
            _, grads, stats = step(params, (batch, batch), generator=draws)
        else:
            _, grads, stats = step(params, (batch, batch), stats=False)
        updates, state = tx.update(grads, state, params, stats=stats)
        return kf.apply_updates(params, updates), state

    def evaluate(params: PyTree) -> float:
        with torch.no_grad():
            value = float(loss.value(fn(params, images), images))
        return value if math.isfinite(value) else math.inf

    step(params, (images[:2], images[:2]), stats=False)  # torch loads its compiler at the first differentiation
    history = History([0], [0.0], [evaluate(params)])
    done, seconds = 0, 0.0
    while math.isfinite(history.losses[-1]):
        start = _now(target)
        params, state = advance(params, state)
        seconds += _now(target) - start
        done += 1
        if done % every == 0 or done == budget.steps:
            history.steps.append(done)
            history.seconds.append(seconds)
            history.losses.append(evaluate(params))
            if done >= budget.steps and seconds >= budget.seconds:
                break
        progress(done, history.losses[-1])
    return history


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
