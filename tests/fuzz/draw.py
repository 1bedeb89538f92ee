"""Everything random of a case comes from one integer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Shape = tuple[int, ...]
Params = dict[str, Any]
Extras = dict[str, Tensor]


class Draw:
    """Two generators with one seed. `n` is the number of examples, for constructs whose size depends on it."""

    def __init__(self, seed: int, n: int = 1):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.n = n

    def pick(self, *options: T) -> T:
        return self.random.choice(options)

    def weighted(self, options: dict[T, float]) -> T:
        return self.random.choices(list(options), list(options.values()))[0]

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def size(self, low: int = 1, high: int = 4) -> int:
        return self.random.randint(low, high)

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return self.random.sample(list(options), len(options))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def weight(self, *shape: int) -> Tensor:
        """A parameter, so scaled that signals keep their size."""
        fan = max(1, torch.Size(shape[1:]).numel())
        return 1.2 * self.normal(*shape) / fan**0.5

    def bias(self, size: int, chance: float = 0.7) -> Params:
        return {"b": 0.5 * self.normal(size)} if self.chance(chance) else {}


class Piece(NamedTuple):
    """One step of a model.

    apply     (params, x [N, *shape before], extras) -> [N, *shape]
    extras    further inputs of the model that it reads; names in `whole` have no examples
    traits    "random" (dropout), "rough" (half precision inside), "mixing" (examples see each other)
    """

    params: Params
    apply: Callable[[Params, Tensor, Extras], Tensor]
    shape: Shape
    extras: Extras = {}  # noqa: RUF012  never written
    whole: frozenset[str] = frozenset()
    traits: frozenset[str] = frozenset()


class Maker(NamedTuple):
    """How to draw a piece: (draw, shape of one example) -> Piece or None where it does not fit; `ranks` it takes."""

    make: Callable[[Draw, Shape], Piece | None]
    ranks: tuple[int, ...] = (1, 2)
    often: float = 1.0


def simple(fn: Callable[[Tensor], Tensor]) -> Callable[[Draw, Shape], Piece]:
    """A piece without parameters that keeps the shape."""
    return lambda d, s: Piece({}, lambda p, x, e: fn(x), s)


def like(constant: Tensor, x: Tensor) -> Tensor:
    """A constant in the dtype of the model."""
    return constant.to(x.dtype) if constant.is_floating_point() else constant
