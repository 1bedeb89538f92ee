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
    devices = _devices(tensors)
    with torch.random.fork_rng(devices=devices):
        states = _states(devices)

        def again(run: Callable[[], Any]) -> Any:
            _restore(states)
            return run()

        yield again


def repeatable(tensors: Iterable[Tensor]) -> Again:
    """Calls that draw the numbers of the first one again. The first moves the generators on, as its function alone
    does; the others leave them as they are.

    >>> again = repeatable([])
    >>> bool(again(lambda: torch.rand(1)) == again(lambda: torch.rand(1)))
    True
    """
    tensors, first = list(tensors), []

    def again(run: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling():
            return run()
        if not first:
            first.append(_states(_devices(tensors)))
            return run()
        with torch.random.fork_rng(devices=_devices(tensors)):
            _restore(first[0])
            return run()

    return again


def _devices(tensors: Iterable[Tensor]) -> list[int]:
    return sorted({x.device.index or 0 for x in tensors if x.device.type == "cuda"})


def _states(devices: list[int]) -> dict[int | None, Tensor]:
    """By device, None for the CPU."""
    return {None: torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in devices}


def _restore(states: dict[int | None, Tensor]) -> None:
    for device, state in states.items():
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
