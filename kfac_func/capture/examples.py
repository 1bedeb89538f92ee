"""Where the examples of a batch are, and how to take some of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, explain
from kfac_func._tracing import plain
from kfac_func.blocks import Where
from kfac_func.layers import Found, own_sizes


class Cut(NamedTuple):
    """The dimension of every leaf of the inputs that counts the examples; None for a leaf that goes along whole.

    >>> cut = Cut((0, None))
    >>> x, table = torch.arange(4), torch.ones(4)
    >>> cut.count((x, table)), cut.part((x, table), 1, 3)[0]
    (4, tensor([1, 2]))
    """

    dims: tuple[int | None, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is cut: the examples are those of the outputs."""
        return all(dim is None for dim in self.dims)

    def count(self, inputs: Any) -> int:
        """N. Raises BatchError when the inputs do not agree about it."""
        sizes = {
            leaf.path or "inputs": leaf.value.shape[dim]
            for leaf, dim in zip(_tree.leaves_with_paths(inputs), self.dims, strict=True)
            if dim is not None
        }
        found = set(sizes.values())
        if len(found) != 1:
            raise BatchError(
                explain(
                    "the inputs do not have the same number of examples.",
                    got=", ".join(f"{path!r}: {size}" for path, size in sizes.items()),
                    options="kf.batched(fn, shared=...) names inputs without examples, in_dims= other dimensions",
                )
            )
        return found.pop()

    def part(self, inputs: Any, start: int, stop: int) -> Any:
        """The examples start … stop − 1."""
        return self._each(inputs, lambda leaf, dim: leaf[(slice(None),) * dim + (slice(start, stop),)])

    def take(self, inputs: Any, order: Sequence[int]) -> Any:
        """The examples with these numbers."""
        return self._each(
            inputs, lambda leaf, dim: leaf.index_select(dim, torch.tensor(order, device=leaf.device)), None
        )

    def pick(self, inputs: Any, places: Sequence[tuple[int, int]], moved: bool = True) -> Any:
        """The examples at some places, as copies: (n, k) is example n, and for k > 0 another one that is like it."""

        def picked(leaf: Tensor, dim: int) -> Tensor:
            return _laid_out(torch.stack([_varied(leaf.select(dim, n), k, moved) for n, k in places], dim), leaf)

        return self._each(inputs, picked, torch.clone)

    def _each(
        self, inputs: Any, fn: Callable[[Tensor, int], Tensor], other: Callable[[Tensor], Tensor] | None = None
    ) -> Any:
        def one(leaf: Any, dim: int | None) -> Any:
            if dim is not None:
                return fn(leaf, dim)
            return other(leaf) if other is not None and isinstance(leaf, Tensor) else leaf

        leaves = _tree.leaves(inputs)
        return _tree.with_leaves(inputs, [one(*each) for each in zip(leaves, self.dims, strict=True)])


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """The numbers of x in the order in which `like` has its dimensions in memory (channels last, transposed): a view in
    the model is then a view, and a copy a copy.
    """
    order = sorted(range(x.ndim), key=lambda dim: -like.stride(dim))
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])


def _varied(x: Tensor, k: int, moved: bool) -> Tensor:
    """Another example in the range of this one: its entries moved on by k places, floating ones a little smaller; or
    every entry smaller in its own place, where columns have ranges of their own (codes).
    """
    if k == 0:
        return x
    if moved:
        x = x.flatten().roll(k).reshape(x.shape)
    if x.is_floating_point():
        return x * (1 - k / 16)
    return x if moved or x.dtype == torch.bool else x // (k + 1)


class Drawn(NamedTuple):
    """A few examples of a batch: two, three, and three of which the last is another one."""

    two: Any
    three: Any
    other: Any


def drawn(cut: Cut, inputs: Any, moved: bool = True) -> Drawn:
    """The examples that plans are made with. They are never in the order of the batch, nor sorted by anything in both
    `two` and `three`: what a model does with the order of its examples shows.
    """
    if cut.whole:
        return Drawn(*[cut.pick(inputs, ())] * 3)
    count = cut.count(inputs)
    if count == 1:
        places = [(0, 0), (0, 1), (0, 2), (0, 3)]
    elif count == 2:
        places = [(0, 0), (1, 0), (1, 1), (0, 1)]
    else:
        low, middle, high = _spread(cut, inputs, count)
        rest = next((n for n in range(count) if n not in (low, middle, high)), None)
        places = [(low, 0), (middle, 0), (high, 0), (low, 1) if rest is None else (rest, 0)]
    low, middle, high, other = places
    taken = (low, middle), (middle, low, high), (middle, low, other)
    return Drawn(*(cut.pick(inputs, each, moved) for each in taken))


def _spread(cut: Cut, inputs: Any, count: int) -> tuple[int, int, int]:
    """Three places that differ in how much there is of an example (a length, tokens that are not 0), if any does."""
    for leaf, dim in zip(_tree.leaves(inputs), cut.dims, strict=True):
        if dim is None or leaf.is_floating_point():
            continue
        rows = plain(leaf.movedim(dim, 0)).reshape(count, -1)
        amount = rows.sum(1) if rows.shape[1] == 1 else (rows != 0).sum(1)
        order = amount.argsort().tolist()
        if int(amount[order[0]]) != int(amount[order[-1]]):
            return order[0], order[count // 2], order[-1]
    first, second, third = sorted(random.Random(0).sample(range(count), 3))  # not torch's: vmap may be around
    return first, second, third


def not_empty(inputs: Any) -> None:
    """Raise BatchError for inputs without a tensor that could hold examples, and for a batch of none."""
    tensors = [leaf for leaf in _tree.leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    empty = [list(leaf.shape) for leaf in tensors if leaf.shape[0] == 0]
    if not tensors or empty:
        raise BatchError(
            explain(
                "the batch has no examples.",
                got=f"inputs {empty[0]}" if empty else "inputs without a tensor of one dimension or more",
                wanted="tensors with the examples in the first dimension, at least one",
                options=None if empty else "kf.batched(fn, whole=True) for a model whose inputs are not cut",
            )
        )


def check_examples(outputs: Tensor, count: int) -> None:
    """Raise BatchError unless the outputs have the examples in the first dimension."""
    if outputs.ndim == 0 or outputs.shape[0] != count:
        raise BatchError(
            explain(
                "the model's outputs do not have the examples in the first dimension.",
                got=f"outputs {list(outputs.shape)} for {count} examples",
                options="return [N, positions, classes] instead of rows that mix examples and positions",
            )
        )


CHANGED = "of what is the same for all examples: a weight that is changed before a layer reads it"


def repeated(found: Found, dim: int) -> bool:
    """Whether a scale or a shift is repeated along a dimension, and along none before it that could be meant."""
    sizes = found.options[0]
    return sizes[dim] == 1 and sizes[:dim] + sizes[dim + 1 :] == own_sizes(sizes)


def where_examples(two: Found, three: Found) -> Where | str | None:
    """Where the examples are in the output of a use, None for a use without them; or in words why they are nowhere."""
    a, b = two.output.shape, three.output.shape
    if two.positions == 0 or three.positions == 0:
        return "on no rows at all of the examples that the plan was made with"
    grown = [d for d in range(len(a)) if len(a) == len(b) and a[d] != b[d]]
    if two.kind.name in ("scale", "shift"):
        if not grown:
            return CHANGED
        if not repeated(two, grown[0]):
            return "whose examples are not in the first dimension along which it is repeated"
    if len(a) == len(b) and not grown:
        if two.kind.name in ("group_norm", "batch_norm"):
            return "whose input is the same for all examples: its channels and its examples cannot be told apart"
        return None
    if len(grown) == 1 and a[grown[0]] % 2 == 0 and 2 * b[grown[0]] == 3 * a[grown[0]]:
        return Where(grown[0], a[grown[0]] // 2)
    return f"whose examples cannot be found: {list(a)} for two examples, {list(b)} for three"
