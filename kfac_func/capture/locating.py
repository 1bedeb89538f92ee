"""Finding the examples of the inputs: the model is asked, and the lengths of its inputs alone decide nothing.

A leaf holds examples if the model runs on two and on three of its rows, its outputs then have two and three rows, and
neither another third row nor none at all nor another order changes the outputs of the others. Among the ways to cut
that run, one of the last kind goes first: a table that happens to be as long as the batch would make examples see each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, KFacError, explain
from kfac_func._patterns import useful
from kfac_func._tracing import level, plain
from kfac_func._typing import Model, PyTree
from kfac_func.capture.batched import Batched, rules_of, tensor_of
from kfac_func.capture.discovery import spared
from kfac_func.capture.draws import Again
from kfac_func.capture.examples import Cut, Drawn, drawn, not_empty

TRIES = 32  # ways to cut the inputs that are tried


class Located(NamedTuple):
    """Where the examples are, some of them, whether outputs depend neither on other examples nor on N, and N."""

    cut: Cut
    drawn: Drawn
    apart: bool
    examples: int


def located(fn: Model, params: PyTree, inputs: Any, again: Again) -> Located:
    """Where the examples of the inputs are. `again` lets all runs of the model draw the same random numbers.

    Raises BatchError when there are none, or no way to cut the inputs fits what the model does; what the model raises,
    when it does not run on the batch itself either.
    """
    rules, leaves = rules_of(fn), _tree.leaves_with_paths(inputs)

    def run(x: Any, ahead: int = 0) -> Any:
        return again(lambda: (_drawn_ahead(params, ahead), spared(fn, params, x))[1])

    if rules.whole:
        z = tensor_of(run(_tree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)))
        cut = Cut((None,) * len(leaves))
        return Located(cut, drawn(cut, inputs), True, z.shape[0] if z.ndim else 0)
    not_empty(inputs)
    mixed, failure = None, None
    for cut in _ways(rules, inputs, leaves):
        found = _tried(cut, inputs, run)
        if isinstance(found, Exception):
            found = _tried(cut, inputs, run, moved=False)
        if isinstance(found, Located) and found.apart:
            return found
        if isinstance(found, Located):
            mixed = mixed or found
        else:
            failure = failure or found
    if mixed is not None:
        return mixed
    _runs(run, params, inputs)
    raise BatchError(_nowhere(leaves, failure)) from (failure if isinstance(failure, Exception) else None)


def _drawn_ahead(params: PyTree, count: int) -> None:
    for device in {leaf.device for leaf in _tree.leaves(params)} if count else ():
        torch.rand(count, device=device)


def _runs(run: Callable[[Any], Any], params: PyTree, inputs: Any) -> None:
    """Raise what the model raises on the batch itself; BatchError where inputs and parameters differ in precision."""
    try:
        run(inputs)
    except RuntimeError as error:
        kinds = [
            {x.dtype for x in _tree.leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()}
            for tree in (inputs, params)
        ]
        if not kinds[0] - kinds[1]:
            raise
        names = [", ".join(sorted(map(str, kind))) for kind in kinds]
        raise BatchError(
            explain(
                "the model does not run on inputs of this precision.",
                got=f"inputs of {names[0]}, parameters of {names[1]}",
                why=str(error).strip().splitlines()[0],
                options=f"inputs.to({names[1].split(', ')[0]}), or parameters in the precision of the inputs",
            )
        ) from error


def _ways(rules: Batched, inputs: Any, leaves: list[_tree.Leaf]) -> Iterator[Cut]:
    """All ways to cut that are worth a try, those that cut most leaves first."""
    tensors = {k: leaf.value for k, leaf in enumerate(leaves) if isinstance(leaf.value, Tensor) and leaf.value.ndim}
    paths = [leaf.path for leaf in leaves]
    useful(rules.shared, paths, "shared")
    if rules.in_dims != 0 or rules.shared:
        dims = _tree.broadcast(rules.in_dims, inputs)
        shared = {k for k, path in enumerate(paths) if any(fnmatchcase(path, pattern) for pattern in rules.shared)}
        yield Cut(tuple(dims[k] if k in tensors and k not in shared else None for k in range(len(leaves))))
        return
    count = 0
    for size in dict.fromkeys(leaf.shape[0] for leaf in tensors.values()):
        alike = [k for k, leaf in tensors.items() if leaf.shape[0] == size]
        for some in (some for n in range(len(alike), 0, -1) for some in combinations(alike, n)):
            count += 1
            if count <= TRIES or len(some) == 1:
                yield Cut(tuple(0 if k in some else None for k in range(len(leaves))))


def _tried(cut: Cut, inputs: Any, run: Callable[[Any], Any], moved: bool = True) -> Located | Exception | str:
    """The cut with what the model says of it; or why it is none."""
    if cut.whole:
        return "no leaf of the inputs is cut"
    some = drawn(cut, inputs, moved)
    try:
        turned = cut.take(some.three, (2, 1, 0))
        three, other, two, back = (plain(tensor_of(run(x))) for x in (some.three, some.other, some.two, turned))
        wild = _wild(cut, some, run)
    except KFacError:
        raise
    except Exception as error:
        return error
    for z, n in ((two, 2), (three, 3), (other, 3), (back, 3)):
        if z.ndim == 0 or z.shape[0] != n:
            return f"outputs {list(z.shape)} for {n} examples"
    alone = same_numbers(three[1:2], two[:1], 2**12) and same_numbers(three.flip(0), back, 2**6)
    apart = alone or _random(some.three, three, run)
    apart = apart and all(same_numbers(three[:2], z[:2], 2**6) for z in (other, wild) if z is not None)
    return Located(cut, some, apart, cut.count(inputs))


def _wild(cut: Cut, some: Drawn, run: Callable[..., Any]) -> Tensor | None:
    """The outputs where the third example is far away from all others: a maximum over the batch shows."""
    far = _tree.tree_map(lambda x: 8 * x if isinstance(x, Tensor) and x.is_floating_point() else x, some.three)
    leaves = zip(_tree.leaves(some.three), _tree.leaves(far), cut.dims, strict=True)
    mixed = [x if dim is None else torch.cat([x.narrow(dim, 0, 2), y.narrow(dim, 2, 1)], dim) for x, y, dim in leaves]
    try:
        return plain(tensor_of(run(_tree.with_leaves(some.three, mixed))))
    except Exception:  # it need not run on such an example
        return None


def _random(inputs: Any, z: Tensor, run: Callable[..., Any]) -> bool:
    """Whether the model draws random numbers, so that two examples of three are others than two of two."""
    return level() > 0 or not same_numbers(plain(tensor_of(run(inputs, 1))), z, 2**6)


def same_numbers(one: Tensor, two: Tensor, roundings: int) -> bool:
    """Up to rounding, which may depend on what else is computed; as far as both go, where a length is that of the
    batch.
    """
    if one.ndim != two.ndim:
        return False
    both = tuple(slice(min(sizes)) for sizes in zip(one.shape, two.shape, strict=True))
    one, two = one[both], two[both]
    if not one.is_floating_point():
        return torch.equal(one, two)
    rounding = min((roundings if one.itemsize > 2 else 2**5) * torch.finfo(one.dtype).eps, 0.1)
    scale = float(one.nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0.0
    return torch.allclose(one, two, rtol=rounding, atol=rounding * scale, equal_nan=True)


def _nowhere(leaves: list[_tree.Leaf], failure: Exception | str | None) -> str:
    shapes = [f"{x.path or 'inputs'}: {list(x.value.shape)}" for x in leaves if isinstance(x.value, Tensor)]
    why = f"{type(failure).__name__}: {failure}".splitlines()[0] if isinstance(failure, Exception) else failure
    return explain(
        "the model's outputs do not have the examples of its inputs in the first dimension.",
        got=", ".join(shapes),
        why=f"on two or three of them: {why}",
        wanted="a model that runs on some of the examples, with outputs [N, ...]",
        options="kf.batched(fn, shared=...) names inputs without examples, in_dims= other dimensions of them; "
        "whole=True for a batch that cannot be cut",
    )
