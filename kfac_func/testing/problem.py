"""What the dense matrices are made of: a loss as a function of one vector, and sums over rows of its Jacobians."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from kfac_func import _tree
from kfac_func._errors import BatchError, HyperparameterError, TreeMismatchError, explain
from kfac_func._tracing import readable
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import pack
from kfac_func.capture import as_pair, check_examples, make_plan, not_empty, rules_of, tensor_of
from kfac_func.losses import Loss, checked_loss

CHUNK = 64  # backward passes that are made at once
ROWS = 512  # rows that are multiplied at once


class Problem(NamedTuple):
    """A loss as a function of one vector.

    theta     [P], all parameters in the order of the tree
    value     θ -> L
    z         [N, *out], the outputs of the batch
    targets   of the batch
    loss      z -> L
    pullback  c [N, *out] -> (Σ_n J_nᵀ c_n [P],)
    wanted    the rows of every matrix that is asked for, by name
    paths     the rows of every leaf
    blocks    whether they are asked for by name; else there is one, of all rows
    """

    theta: Tensor
    value: Callable[[Tensor], Tensor]
    z: Tensor
    targets: Tensor
    loss: Callable[[Tensor], Tensor]
    pullback: Callable[..., tuple[Tensor, ...]]
    wanted: dict[str, Tensor]
    paths: dict[str, slice]
    blocks: bool


def opened(fn: Model, loss: Loss, params: PyTree, batch: tuple[Any, Tensor], blocks: bool, limit: int) -> Problem:
    """Linearise the model at a batch, and say which rows are wanted. Raises what `dense_ggn` says."""
    loss = checked_loss(loss)
    inputs, targets = as_pair(batch)
    _tree.know(inputs)
    if not rules_of(fn).whole:
        not_empty(inputs)
    _differentiable(params)
    theta, unravel = _tree.ravel(params)
    wanted = block_indices(fn, params, inputs) if blocks else {"": torch.arange(len(theta))}
    _affordable(wanted, theta, limit)

    def outputs(x: Tensor) -> Tensor:
        return tensor_of(fn(unravel(x), inputs))

    def of_outputs(z: Tensor) -> Tensor:
        return loss.value(z, targets)

    z, pullback, *_ = vjp(outputs, theta)
    check_examples(z, len(targets))
    wanted = {name: rows.to(theta.device) for name, rows in wanted.items()}
    return Problem(
        theta, lambda x: of_outputs(outputs(x)), z, targets, of_outputs, pullback, wanted, slices(params), blocks
    )


def pulled(problem: Problem, n: int, c: Tensor) -> Tensor:
    """J_nᵀ c for output vectors c [K, *out] of example n, [K, P]."""
    z = problem.z
    here = (torch.arange(len(z), device=z.device) == n).to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
    (rows,) = vmap(problem.pullback, chunk_size=CHUNK)(here * c.unsqueeze(1))
    return rows


def unit_vectors(z_n: Tensor) -> Tensor:
    """[D, *out], one for each output of an example."""
    return torch.eye(z_n.numel(), dtype=z_n.dtype, device=z_n.device).reshape(-1, *z_n.shape)


def replaced(z: Tensor, n: int, z_n: Tensor) -> Tensor:
    """z [N, *out] with the outputs of example n replaced."""
    return torch.cat([z[:n], z_n.unsqueeze(0), z[n + 1 :]])


def accumulated(problem: Problem, products: Iterable[tuple[Tensor, Tensor]]) -> Any:
    """Σ leftᵀ right over pairs of rows [K, P], for the rows and columns that are wanted."""
    total = {name: problem.theta.new_zeros(len(rows), len(rows)) for name, rows in problem.wanted.items()}
    for left, right in _joined(products):
        for name, rows in problem.wanted.items():
            total[name] = total[name].addmm(left[:, rows].mT, right[:, rows])
    return given(problem, total)


def _joined(products: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows, many at a time: adding to a large matrix costs more than the product of a few rows."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for pair in products:
        waiting.append(pair)
        if sum(len(left) for left, _ in waiting) >= ROWS:
            yield _stacked(waiting)
            waiting = []
    if waiting:
        yield _stacked(waiting)


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([left for left, _ in pairs]), torch.cat([right for _, right in pairs])


def given(problem: Problem, found: dict[str, Tensor]) -> Any:
    """The matrices by block name, or the only one. Raises BatchError unless all they are made of is finite."""
    if not all(bool(x.isfinite().all()) for x in (problem.z, *found.values()) if readable(x)):
        raise BatchError(
            explain(
                "the curvature at this batch is not finite.",
                got=_culprit(problem),
                options="look at the parameters, the inputs and the targets with torch.isfinite",
            )
        )
    return found if problem.blocks else found[""]


def _culprit(problem: Problem) -> str:
    suspects = {f"parameter {path!r}": problem.theta[rows] for path, rows in problem.paths.items()}
    suspects |= {"outputs of the model": problem.z, "targets": problem.targets}
    found = [name for name, x in suspects.items() if not bool(x.isfinite().all())]
    return f"{found[0]}, not finite" if found else "derivatives that are not finite"


def slices(params: PyTree) -> dict[str, slice]:
    """The rows of a dense matrix that belong to each leaf, by its dotted path, in the order of the tree.

    Raises TreeMismatchError when two leaves have the same path.

    >>> slices({"w": torch.zeros(2, 3), "b": torch.zeros(2)})
    {'b': slice(0, 2, None), 'w': slice(2, 8, None)}
    """
    found, start = {}, 0
    for path, leaf in _tree.unique_paths(params).items():
        found[path] = slice(start, start + leaf.numel())
        start += leaf.numel()
    return found


def block_indices(fn: Model, params: PyTree, inputs: Any) -> dict[str, Tensor]:
    """The numbers of the parameters of each block, by block name, in the row-major order of its array V = [W | b].

    `dense[index][:, index]` is a block of a dense matrix. Leaves that belong to no block are blocks of their own.
    Raises the errors of `make_plan`.

    >>> fn, params = kf.make_functional(torch.nn.Linear(2, 3))
    >>> kf.testing.block_indices(fn, params, torch.ones(4, 2))["weight"]  # leaves: bias, then weight
    tensor([3, 4, 0, 5, 6, 1, 7, 8, 2])
    """
    numbers = {
        path: torch.arange(part.start, part.stop).reshape(leaf.shape)
        for (path, leaf), part in zip(_tree.unique_paths(params).items(), slices(params).values(), strict=True)
    }
    plan = make_plan(fn, params, inputs, strict=False)
    found = {block.layout.name: pack(block.layout, numbers).flatten() for block in plan.blocks}
    return found | {path: part.flatten() for path, part in numbers.items() if path not in plan.claimed}


def _differentiable(params: PyTree) -> None:
    leaves = _tree.unique_paths(params)
    if not leaves:
        raise TreeMismatchError(
            explain("there are no parameters.", got=type(params).__name__, wanted="a tree of tensors")
        )
    for path, leaf in leaves.items():
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            raise TreeMismatchError(
                explain(
                    f"parameter {path!r} cannot be differentiated.",
                    got=leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__,
                    wanted="a floating-point tensor",
                    options="keep everything else out of params: in the closure of fn, or in the inputs",
                )
            )


def _affordable(wanted: dict[str, Tensor], theta: Tensor, limit: int) -> None:
    name, rows = max(((name, len(rows)) for name, rows in wanted.items()), key=lambda pair: pair[1])
    if rows > limit:
        smaller = "" if name else "blocks=True, for the diagonal blocks alone; or "
        raise HyperparameterError(
            explain(
                f"the matrix{f' of block {name!r}' if name else ''} would be too large.",
                got=f"{rows} x {rows} numbers: {rows * rows * theta.itemsize / 2**30:.1f} GiB",
                wanted=f"at most {limit} rows",
                options=f"{smaller}limit={rows}, where there is the memory for it",
            )
        )
