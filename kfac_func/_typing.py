"""Names for the shapes of things that have no better type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

PyTree: TypeAlias = Any
"""Any nesting of dict, list, tuple and NamedTuple with tensors (or None) at the leaves."""

Scalar: TypeAlias = float | int | torch.Tensor
"""A Python number or a 0-dim tensor."""

Schedule: TypeAlias = Callable[[Any], Any]
"""A function from the step count (a 0-dim integer tensor, or an int) to a value."""

ScalarOrSchedule: TypeAlias = Scalar | Schedule

Model: TypeAlias = Callable[[PyTree, Any], torch.Tensor]
"""A pure function (params, inputs) -> outputs with the examples in the first dimension."""

Progress: TypeAlias = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps what a loop goes through and shows how far it is: `tqdm.tqdm`, for example."""


def shown(items: Iterable[Any], progress: Progress | None) -> Iterable[Any]:
    """The items of a loop, under a progress bar when there is one.

    >>> list(shown([1, 2], None))
    [1, 2]
    """
    return items if progress is None else progress(items)
