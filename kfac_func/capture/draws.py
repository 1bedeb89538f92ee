"""The global random numbers of a model (dropout): the same ones in several runs, and none of them taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

Again: TypeAlias = Callable[[Callable[[], Any]], Any]
"""Calls a function with the global generators as they were in the beginning."""


@contextlib.contextmanager
def same_draws(tensors: Iterable[Tensor]) -> Iterator[Again]:
    """Runs that draw the same numbers on the CPU and on the devices of the tensors; afterwards the generators are as
    they were.

    >>> with same_draws([]) as again:
    ...     bool(again(lambda: torch.rand(1)) == again(lambda: torch.rand(1)))
    True
    """
    devices = sorted({x.device.index or 0 for x in tensors if x.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        state, others = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

        def again(run: Callable[[], Any]) -> Any:
            torch.set_rng_state(state)
            for device, other in zip(devices, others, strict=True):
                torch.cuda.set_rng_state(other, device)
            return run()

        yield again
