"""A matvec on parameter trees as an operator on rows [K, P], with the checks and the random vectors that belong to it.

P counts the entries of `like`; its leaves follow each other as in `_tree.ravel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, TreeMismatchError, at_least, explain
from kfac_func._tracing import readable
from kfac_func._tree import leaves, ravel, tree_map, unique_paths, with_leaves
from kfac_func._typing import Progress, PyTree, shown
from kfac_func.linalg.tridiagonal import Rows

MatVec: TypeAlias = Callable[[PyTree], PyTree]
"""A symmetric linear operator on trees with the structure and shapes of the parameters."""


class Flat(NamedTuple):
    """The operator on rows, [K, P] -> [K, P]; K rows of random signs, or of standard normal numbers; the tree with a
    leading K for rows; P; the asymmetry that rounding may cause; K split into parts of at most chunk_size.
    """

    products: Rows
    signs: Callable[[int], Tensor]
    normals: Callable[[int], Tensor]
    tree: Callable[[Tensor], PyTree]
    size: int
    symmetry: float
    parts: Callable[[int], list[int]]


def flattened(
    matvec: MatVec,
    like: PyTree,
    generator: torch.Generator,
    chunk_size: int | None = 1,
    progress: Progress | None = None,
) -> Flat:
    """The operator on rows in at least float32. Rows are drawn one by one, so that chunks do not change them.

    Raises HyperparameterError for chunk_size < 1, a `like` without parameters or with leaves that are not real, and
    products that are not finite; TreeMismatchError, naming the path, where matvec returns another tree.
    """
    at_least(1, chunk_size=chunk_size)
    found = _parameters(like)
    vector, unravel = ravel(like)
    dtype, size = torch.promote_types(vector.dtype, torch.float32), len(vector)
    device = vector.device
    del vector

    def product(row: Tensor) -> Tensor:
        out = matvec(unravel(row))
        return torch.cat([x.reshape(-1).to(dtype) for x in leaves(_matching(like, out))])

    def products(rows: Tensor) -> Tensor:
        chunks = rows.split(chunk_size or len(rows))
        run = _alone(product) if chunk_size == 1 else torch.func.vmap(product)
        images = torch.cat([run(chunk) for chunk in shown(chunks, progress)])
        _finite(images, found)
        return images

    def drawn(draw: Callable[[], Tensor]) -> Callable[[int], Tensor]:
        return lambda count: torch.stack([draw().to(device, dtype) for _ in range(count)])

    source = {"generator": generator, "device": generator.device}
    return Flat(
        products,
        drawn(lambda: 2 * torch.randint(0, 2, (size,), **source) - 1),
        drawn(lambda: torch.randn(size, dtype=dtype, **source)),
        lambda rows: stacked(like, rows),
        size,
        max(torch.finfo(x.dtype).eps for x in found.values()) ** 0.25,
        lambda count: [len(part) for part in torch.arange(count).split(chunk_size or count)],
    )


def stacked(like: PyTree, rows: Tensor) -> PyTree:
    """Rows [K, P] as one tree like `like` whose leaves have a leading K, in the dtypes of `like`."""
    parts = rows.split([x.numel() for x in leaves(like)], dim=1)
    return with_leaves(
        like, [part.reshape(-1, *x.shape).to(x.dtype) for part, x in zip(parts, leaves(like), strict=True)]
    )


def _parameters(like: PyTree) -> dict[str, Tensor]:
    found = unique_paths(like)
    bad = [path for path, x in found.items() if not (isinstance(x, Tensor) and x.is_floating_point())]
    if bad or not sum(x.numel() for x in found.values()):
        raise HyperparameterError(
            explain(
                "like holds no parameters." if not bad else f"like holds no real tensor at {bad[0]!r}.",
                got=getattr(found[bad[0]], "dtype", type(found[bad[0]]).__name__) if bad else "a tree without entries",
                wanted="the tree of parameters (float16 to float64), whose shapes the vectors have",
                options="leave out what is no parameter; None leaves are allowed",
            )
        )
    return found


def _alone(product: Callable[[Tensor], Tensor]) -> Rows:
    return lambda rows: torch.stack([product(row) for row in rows])


def _matching(like: PyTree, out: PyTree) -> PyTree:
    """The result of a product, leaf by leaf in the order of `like`."""
    out = tree_map(lambda _, x: x, like, out)
    shapes = {path: [*getattr(x, "shape", ["no tensor"])] for path, x in unique_paths(out).items()}
    for path, x in unique_paths(like).items():
        if shapes.get(path) != list(x.shape):
            raise TreeMismatchError(
                explain(
                    f"matvec returns another shape at {path!r}.",
                    got=shapes.get(path, "None"),
                    wanted=list(x.shape),
                    options="pass the tree that matvec maps to itself as like",
                )
            )
    return out


def _finite(images: Tensor, like: dict[str, Tensor]) -> None:
    if readable(images) and not bool(images.isfinite().all()):
        first = int((~images.isfinite()).any(0).nonzero()[0])
        ends = torch.tensor([x.numel() for x in like.values()]).cumsum(0)
        raise HyperparameterError(
            explain(
                "a product of the operator is not finite.",
                got=f"NaN or infinity at {list(like)[int((ends <= first).sum())]!r}",
                wanted="finite numbers for every finite vector",
                why="the parameters, the batch or the loss hold a NaN, or the precision is too low",
                options="check the loss and its gradient at these parameters; or float32 in place of half precision",
            )
        )


def positive(**options: float | None) -> None:
    """Raise HyperparameterError for an option that is not above 0; None passes."""
    for name, value in options.items():
        if value is not None and not value > 0:
            raise HyperparameterError(explain(f"{name} must be above 0.", got=value))


def known(name: str, value: str, options: Iterable[str]) -> None:
    """Raise HyperparameterError for a value that is none of the options."""
    if value not in options:
        raise HyperparameterError(explain(f"unknown {name}.", got=repr(value), wanted=" or ".join(map(repr, options))))
