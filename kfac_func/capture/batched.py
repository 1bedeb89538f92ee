"""What a model takes and gives: which inputs hold examples, and which leaf of its outputs the loss is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from kfac_func._errors import BatchError, HyperparameterError, explain
from kfac_func._typing import Model, PyTree

Output: TypeAlias = str | int | Callable[[Any], Tensor]
"""A key, an attribute or an index of what the model returns, or a function of it."""


@dataclass(frozen=True, eq=False)
class Batched:
    """A model with what is known about its batches; made by `batched`, called like the model itself."""

    fn: Callable[[PyTree, Any], Any]
    shared: tuple[str, ...] = ()
    in_dims: Any = field(default=0)
    whole: bool = False
    output: Output | None = None

    def __call__(self, params: PyTree, inputs: Any) -> Any:
        found = self.fn(params, inputs)
        return found if self.output is None else _selected(found, self.output)


def batched(
    fn: Callable[[PyTree, Any], Any],
    *,
    shared: str | Sequence[str] = (),
    in_dims: Any = 0,
    whole: bool = False,
    output: Output | None = None,
) -> Model:
    """Say where the examples of a model's batches are, and which of its outputs the loss is about. The result is a
    model again, for every function of this library.

    fn       function (params, inputs) -> outputs; outputs may be any tree when `output` says which leaf
    shared   inputs without examples (a mask [T, T], a table, an adjacency matrix, a temperature), by dotted path or by
             patterns of paths in the inputs: "mask", "1", "*.table"
    in_dims  where the examples of an input are, as torch.func.vmap writes it: a number for all of them, or a tree that
             is a prefix of the inputs; None for what has no examples. (0, 1) for (x [N, ...], state [layers, N, h])
    whole    the batch is one thing that cannot be cut (a graph): examples are dimension 0 of the outputs, whatever the
             inputs are
    output   "logits" (a key, or an attribute), 0 (an index), or a function of what the model returns

    Without it, an input is cut into examples when its first dimension is N, the model runs on some of the examples and
    an example's output does not depend on the cut parts of others. Raises HyperparameterError for options that
    contradict each other.

        >>> fn = lambda p, x: {"logits": (x[0] + x[1]) @ p["w"]}
        >>> model = kf.batched(fn, shared="1", output="logits")
        >>> step = kf.value_grad_and_stats(model, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> batch = (torch.ones(5, 3), torch.ones(3)), torch.zeros(5, 2)
        >>> step({"w": torch.ones(3, 2)}, batch)[1]["w"].shape
        torch.Size([3, 2])
    """
    patterns = (shared,) if isinstance(shared, str) else tuple(shared)
    if whole and (patterns or in_dims != 0):
        raise HyperparameterError(
            explain(
                "whole=True and where the examples of the inputs are contradict each other.",
                got=f"shared={patterns!r}, in_dims={in_dims!r}",
                options="whole=True alone, where nothing is cut; or shared= and in_dims= alone",
            )
        )
    return Batched(fn, patterns, in_dims, whole, output)


def rules_of(fn: Model) -> Batched:
    """What is known about the batches of any model."""
    return fn if isinstance(fn, Batched) else Batched(fn)


def _selected(found: Any, output: Output) -> Any:
    if callable(output):
        return output(found)
    try:
        if isinstance(found, Mapping):
            return found[output]
        if isinstance(output, int) and isinstance(found, (tuple, list)):
            return found[output]
        return getattr(found, str(output))
    except (KeyError, IndexError, AttributeError) as error:
        has = list(found) if isinstance(found, Mapping) else getattr(found, "_fields", None)
        raise BatchError(
            explain(
                f"the model's outputs have no {output!r}.",
                got=f"{type(found).__name__}" + (f" with {', '.join(map(repr, has))}" if has else ""),
                options="output= one of them, or a function of the outputs that returns a tensor",
            )
        ) from error


def tensor_of(found: Any) -> Tensor:
    """The outputs themselves. Raises BatchError for what is no tensor."""
    if isinstance(found, Tensor):
        return found
    names = list(found) if isinstance(found, Mapping) else range(len(found)) if isinstance(found, (tuple, list)) else ()
    first = next(iter(names), "logits")
    raise BatchError(
        explain(
            "the model returns something else than one tensor.",
            got=type(found).__name__ + (f" with {', '.join(map(repr, names))}" if names else ""),
            wanted="the outputs that the loss is about, [N, ...]",
            options=f"kf.batched(fn, output={first!r}); or output= a function of what the model returns",
        )
    )


def as_pair(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch. Raises BatchError for anything else than two things.

    >>> as_pair([1, 2])
    (1, 2)
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    keys = [str(key) for key in batch] if isinstance(batch, Mapping) else None
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    label = next((key for key in keys or () if "label" in key or "target" in key), "labels")
    raise BatchError(
        explain(
            "a batch is a pair (inputs, targets).",
            got=f"{type(batch).__name__}{size}" + (f" with {', '.join(map(repr, keys))}" if keys else ""),
            options=(
                f"batch = {{k: v for k, v in batch.items() if k != {label!r}}}, batch[{label!r}]"
                if keys
                else "((one, two), targets) for a model of several inputs"
            ),
        )
    )
