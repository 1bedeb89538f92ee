"""The global random numbers of a model (dropout): the same ones in several runs, and none of them taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Again: TypeAlias = Callable[[Callable[[], Any]], Any]
"""Calls a function with the global generators as they were in the beginning."""


class Generators(NamedTuple):
    """What the global generators of the CPU (None) and of some devices will draw."""

    states: dict[int | None, Tensor]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Generators:
        """Those of the CPU and of the devices of the tensors, as they are now."""
        devices = sorted({x.device.index or 0 for x in tensors if x.device.type == "cuda"})
        return cls({None: torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in devices})

    @property
    def devices(self) -> list[int]:
        """The devices that are no CPU."""
        return [device for device in self.states if device is not None]

    def again(self) -> Generators:
        """The same generators as they are now."""
        return Generators(
            {None: torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in self.devices}
        )

    def equal(self, other: Generators) -> bool:
        """Whether nothing was drawn between the two."""
        return all(torch.equal(state, other.states[device]) for device, state in self.states.items())

    def restore(self) -> None:
        """Let them draw these numbers."""
        for device, state in self.states.items():
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def same_draws(tensors: Iterable[Tensor]) -> Iterator[Again]:
    """Runs that draw the same numbers on the CPU and on the devices of the tensors; afterwards the generators are as
    they were.

    >>> with same_draws([]) as again:
    ...     bool(again(lambda: torch.rand(1)) == again(lambda: torch.rand(1)))
    True
    """
    before = Generators.of(tensors)
    with torch.random.fork_rng(devices=before.devices):

        def again(run: Callable[[], Any]) -> Any:
            before.restore()
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
            first.append(Generators.of(tensors))
            return run()
        with torch.random.fork_rng(devices=first[0].devices):
            first[0].restore()
            return run()

    return again
