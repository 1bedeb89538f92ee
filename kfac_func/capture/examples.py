"""Where the examples of a batch are: in the inputs, and in the output of every use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, CaptureError, HyperparameterError, explain
from kfac_func._tracing import readable
from kfac_func.blocks import Where
from kfac_func.capture.grouping import owner
from kfac_func.layers import Found


def batch_size(inputs: Any) -> int:
    """N: the first dimension of the first tensor of the inputs. Raises BatchError when there is none or it is 0."""
    tensors = [leaf for leaf in _tree.leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].ndim == 0 or tensors[0].shape[0] == 0:
        raise BatchError(
            explain(
                "the batch has no examples.",
                got=f"inputs {list(tensors[0].shape)}" if tensors else "inputs without a tensor",
                wanted="tensors with the examples in the first dimension, at least one",
            )
        )
    return tensors[0].shape[0]


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


def rereadable(batches: Iterable[Any], why: str) -> None:
    """Raise HyperparameterError for batches that can be gone through only once.

    >>> rereadable([(torch.ones(2, 3), torch.ones(2))], "every product goes through all of them")
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


def examples(inputs: Any, count: int, wanted: int) -> Any:
    """The first example of a batch, or the first two (the first one twice in a batch of one)."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != count:
            return leaf
        return leaf[:wanted].clone() if count >= wanted else torch.cat([leaf[:1]] * wanted)

    return _tree.tree_map(take, inputs)


def where_examples(one: Found, two: Found) -> Where | None:
    a, b = one.output.shape, two.output.shape
    grown = [d for d in range(len(a)) if a[d] != b[d]]
    if not grown:
        if one.kind.name in ("group_norm", "batch_norm"):
            raise CaptureError(
                explain(
                    f"the input of {one.kind.name} with {owner(one)!r} is the same for all examples.",
                    why="its channels and its examples cannot be told apart",
                    options=f"unclaimed={{{owner(one)!r}: 'diagonal'}}",
                )
            )
        return None
    if len(a) == len(b) and len(grown) == 1 and b[grown[0]] == 2 * a[grown[0]]:
        if _interleaved(one.inputs, two.inputs, grown[0], a[grown[0]]):
            raise CaptureError(
                explain(
                    f"the examples are interleaved in the input of {one.kind.name} with {owner(one)!r}.",
                    got="consecutive rows belong to different examples (positions first, then examples)",
                    wanted="a dimension of their own for the examples, or all rows of one example together",
                    options="flatten [examples, positions, ...], not [positions, examples, ...]; or do not flatten",
                )
            )
        return Where(grown[0], a[grown[0]])
    raise CaptureError(
        explain(
            f"the examples cannot be found in the output of {one.kind.name} with {owner(one)!r}.",
            got=f"{list(a)} for one example, {list(b)} for two",
            wanted="one dimension that is proportional to the number of examples",
            options="keep the examples in one dimension; or leave the parameter unclaimed",
        )
    )


def _interleaved(one: Tensor, two: Tensor, dim: int, fold: int) -> bool:
    """Whether the rows of the first example lie apart in a batch of two. Not asked of traced tensors.

    `one` and `two` are a use's inputs for one and two examples. The rows of an example are together in (2, f), apart
    in (r, 2, f/r) for any r > 1 that divides f; whichever is nearest to the rows for one example is what happened.
    """
    if fold == 1 or one.shape[dim] != fold or not readable(two):
        return False
    own, both = one.movedim(dim, 0).double(), two.movedim(dim, 0).double()

    def distance(r: int) -> Tensor:
        return (both.unflatten(0, (r, 2, fold // r))[:, 0].flatten(0, 1) - own).norm()

    together = distance(1)
    return any(bool(distance(r) < together) for r in range(2, fold + 1) if fold % r == 0)
