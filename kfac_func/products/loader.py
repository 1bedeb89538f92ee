"""Products over all the data: one linear map from the maps of the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from kfac_func import _tree
from kfac_func._errors import BatchError, explain
from kfac_func._typing import Progress, PyTree, shown
from kfac_func.capture import as_pair, repeatable, rereadable
from kfac_func.losses import Loss, checked_loss, example_weight
from kfac_func.products.curvature import Product


def accumulate(
    made: Callable[..., Product],
    params: PyTree,
    batches: Iterable[Any],
    *,
    loss: Loss,
    generator: torch.Generator | None = None,
    cache: bool = False,
    progress: Progress | None = None,
) -> Product:
    r"""One product for the batches of a loader: v ↦ M v, with M the matrix of all their examples together.

        M = Σ_b (N_b / N) M_b,     N = Σ_b N_b             M = Σ_b M_b for a loss with reduction "sum"

    made       `hvp(fn, loss)`, `ggn_vp(fn, loss)`, `fisher_vp(fn, loss, estimator)`, or any function (params, batch)
               -> product that is a mean over the examples of the batch, or a sum as the loss is
    batches    of (inputs, targets), read from the start for every product: a list or a DataLoader, no iterator
    loss       the loss of the products; says how they add up
    generator  for estimators that draw. One seed is taken from it now, and every pass draws the same numbers from it
    cache      read the batches once, now, and keep the linearised model of each: no later product runs the model
    progress   wraps what a pass goes through; tqdm.tqdm fits

    A pass draws what the first one drew, in a model with dropout too. A mean that is not over examples (class weights,
    ignored targets) is that of each batch. Raises, without `cache`, HyperparameterError for batches that can be read
    only once or are shuffled in every pass; BatchError when there are none, and what the products raise.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> loss = kf.losses.mse()
        >>> batches = [(torch.ones(5, 3), torch.zeros(5, 2)), (torch.zeros(3, 3), torch.zeros(3, 2))]
        >>> product = kf.products.accumulate(kf.products.ggn_vp(fn, loss), params, batches, loss=loss)
        >>> product({"weight": torch.ones(2, 3), "bias": None})["weight"][0]
        tensor([1.8750, 1.8750, 1.8750])
    """
    loss = checked_loss(loss)
    if not cache:
        batches = rereadable(batches, "every product goes through all of them")
    again = repeatable(_tree.leaves(params))
    seed = None if generator is None else _seed(generator)

    def passed() -> Iterator[tuple[int, Product]]:
        drawn = {} if seed is None else {"generator": torch.Generator(seed.device).manual_seed(int(seed))}
        for batch in shown(batches, progress):
            yield len(as_pair(batch)[1]), made(params, batch, **drawn)

    kept = list(passed()) if cache else None

    def product(vector: PyTree) -> PyTree:
        return again(lambda: summed(vector))

    def summed(vector: PyTree) -> PyTree:
        total, count = None, 0
        for n, one in passed() if kept is None else shown(kept, progress):
            part = _scaled(one(vector), 1 / example_weight(loss, n))
            total = part if total is None else _tree.tree_map(torch.add, total, part)
            count += n
        if count == 0:
            raise BatchError(explain("there are no batches.", wanted="at least one batch (inputs, targets)"))
        return _scaled(total, example_weight(loss, count))

    return product


def _scaled(tree: PyTree, factor: float) -> PyTree:
    return _tree.tree_map(lambda x: factor * x, tree)


def _seed(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
