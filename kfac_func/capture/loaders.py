"""Batches that are gone through several times: the same ones every time, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func._tracing import readable

SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
NUMBERS = 4096  # of every tensor of the first batch that are compared


class Rereadable:
    """Batches that know what their first one was."""

    def __init__(self, batches: Iterable[Any], why: str):
        self.batches, self.why = batches, why
        self.first: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.batches)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            if index == 0:
                self._same(batch)
            yield batch

    def _same(self, batch: Any) -> None:
        seen = _look(batch)
        self.first = seen if self.first is None else self.first
        if seen != self.first:
            raise HyperparameterError(_other("another first batch in a later pass", self.why))


def rereadable(batches: Iterable[Any], why: str) -> Iterable[Any]:
    """The batches, for several passes. Raises HyperparameterError for what can be gone through only once, for a loader
    that shuffles, and, when a later pass begins, for a first batch that is another one.

    >>> len(rereadable([(torch.ones(2, 3), torch.ones(2))], "every product goes through all of them"))
    1
    """
    if isinstance(batches, Iterator):
        raise HyperparameterError(
            explain(
                "the batches can be gone through only once.",
                got=type(batches).__name__,
                why=why,
                options="pass a list or a loader: list(batches), say",
            )
        )
    if isinstance(batches, DataLoader):
        sampler = getattr(batches.batch_sampler, "sampler", batches.sampler)
        if isinstance(sampler, SHUFFLING):
            raise HyperparameterError(_other(f"a loader with a {type(sampler).__name__} (shuffle=True)", why))
    return batches if isinstance(batches, Rereadable) else Rereadable(batches, why)


def _other(got: str, why: str) -> str:
    return explain(
        "the batches are others in every pass.",
        got=got,
        why=why,
        options="a loader with shuffle=False and without random augmentations; or a list: list(loader)",
    )


def _look(batch: Any) -> list[Any]:
    """What tells a batch from another one; nothing of tensors that cannot be read."""
    _tree.know(batch)
    return [_numbers(leaf) if isinstance(leaf, Tensor) else type(leaf) for leaf in _tree.leaves(batch)]


def _numbers(x: Tensor) -> Any:
    seen = None
    if readable(x) and x.numel():
        some = x.detach().flatten()[:: -(-x.numel() // NUMBERS)]
        some = some.to(torch.complex128 if x.is_complex() else torch.float64)
        places = torch.arange(1, len(some) + 1, device=x.device, dtype=torch.float64)
        seen = str((some * places.sin()).nan_to_num(0, 1, 2).sum().item())
    return tuple(x.shape), x.dtype, seen
