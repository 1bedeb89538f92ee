"""Gradients of examples as rows of the blocks of a linear operator: both sides of an influence are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from glob import escape
from typing import Any, TypeAlias

from torch import Tensor

from kfac_func._errors import BatchError, HyperparameterError, explain
from kfac_func._patterns import chosen
from kfac_func._tracing import readable
from kfac_func._typing import Model, PyTree, Scalar
from kfac_func.blocks import Pairs, matrices
from kfac_func.capture import as_pair
from kfac_func.linalg import Spectral
from kfac_func.operators import linear_operator
from kfac_func.products.regroup import regrouped
from kfac_func.products.routes import Route
from kfac_func.products.rows import reader, whole
from kfac_func.products.sources import once

Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(z, targets) -> c [N, *out], the derivative of every example's own number in its outputs."""

Read: TypeAlias = Callable[[Score, Any], Iterator[dict[str, Pairs]]]
"""(score, (inputs, targets)) -> the rows of J_nᵀ c_n by block, for some examples after the other."""


def prepared(
    fn: Model,
    params: PyTree,
    state: PyTree,
    damping: Scalar | None,
    route: Route,
    chunk_size: int | None,
    only: Sequence[str] | None,
) -> tuple[dict[str, Spectral], Read]:
    """The spectra of F̂ + λ by block, and how to read the rows of a batch in the same blocks."""
    operator = linear_operator(state, params, damping=damping)
    named = {layout.name: layout for layout in operator.layouts.value}
    layouts = {name: named[name] for name in chosen(only, named, "only")}
    spectra = {name: _invertible(name, operator.spectra[name]) for name in layouts}

    kept = None if only is None else [escape(path) for one in layouts.values() for path in one.leaves]
    passes = reader(fn, route=route, chunk_size=chunk_size, only=kept)

    def read(score: Score, batch: Any) -> Iterator[dict[str, Pairs]]:
        inputs, targets = as_pair(batch)
        for part in passes(params, inputs, once(lambda z: score(z, targets).unsqueeze(0))):
            yield regrouped(whole(part), layouts.values())

    return spectra, read


def arrays(rows: Pairs) -> Tensor:
    """The gradients [N, ...] of one output vector, formed."""
    return matrices(rows)[0]


def some(found: list[Tensor], what: str) -> list[Tensor]:
    """What the batches gave. Raises BatchError when there was none."""
    if not found:
        raise BatchError(explain(f"there is no batch of {what}.", options="pass at least one (inputs, targets)"))
    return found


def _invertible(name: str, spectral: Spectral) -> Spectral:
    if readable(spectral.values) and not bool((spectral.values > 0).all()):
        raise HyperparameterError(
            explain(
                f"the curvature of block {name!r} has no inverse.",
                got=f"the smallest eigenvalue {spectral.values.min().item():.3g}",
                why="influence is measured in (F̂ + λ)⁻¹",
                options="damping=, greater than 0; 0.1 times the mean eigenvalue is usual",
            )
        )
    return spectral
