"""A model whose runs within one step of training draw the same random numbers: one dropout mask for the loss, its
curvature, the quadratic model and the loss after the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kfac_func import _tree
from kfac_func._typing import Model, PyTree
from kfac_func.capture.batched import rules_of
from kfac_func.capture.draws import Generators


@dataclass(eq=False)
class Steady:
    """The model; inside of `step`, the generators as all of its runs find them, and as the largest run left them."""

    fn: Callable[[PyTree, Any], Any]
    before: Generators | None = None
    after: Generators | None = None
    largest: int = -1

    def __call__(self, params: PyTree, inputs: Any) -> Any:
        if self.before is None:
            return self.fn(params, inputs)
        self.before.restore()
        found = self.fn(params, inputs)
        size = sum(leaf.numel() for leaf in _tree.leaves(found) if isinstance(leaf, Tensor))
        if size > self.largest:  # plans and models of a part of the batch draw less
            self.after, self.largest = self.before.again(), size
        return found

    @contextlib.contextmanager
    def step(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """All runs inside draw the same numbers, from the generators of the CPU and of the tensors' devices.

        >>> model, steady = steadied(lambda p, x: torch.rand(1))
        >>> with steady.step([]):
        ...     bool(model({}, None) == model({}, None))
        True
        >>> bool(model({}, None) == model({}, None))
        False
        """
        self.before, self.after, self.largest = Generators.of(tensors), None, -1
        try:
            yield
        finally:
            if self.after is not None:
                self.after.restore()
            self.before = None


def steadied(fn: Model) -> tuple[Model, Steady]:
    """The same model, and the handle by which its runs are held together."""
    rules = rules_of(fn)
    steady = Steady(rules.fn)
    return replace(rules, fn=steady), steady
