"""Names for the shapes of things that have no better type."""

from __future__ import annotations

from collections.abc import Callable
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
