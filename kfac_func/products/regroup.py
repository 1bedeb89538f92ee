"""The rows of examples in the blocks of a curvature that was measured before."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kfac_func._errors import StateError, explain
from kfac_func.blocks import Layout, Pairs, matrices, pack
from kfac_func.products.rows import ExampleRows


def regrouped(rows: ExampleRows, layouts: Iterable[Layout]) -> dict[str, Pairs]:
    """The rows of every block of `layouts`, by its name; zero for a block that the model did not read.

    The tape sees blocks, which must be these. Other routes give leaves, which are joined to blocks: the arrays V_{v,n}
    themselves, one row of theirs at a time. Raises StateError for a block of the tape that is not known.
    """
    known = {layout.name: layout for layout in layouts}
    if rows.by_leaf:
        return {name: _joined(layout, rows) for name, layout in known.items()}
    for name, layout in rows.layouts.items():
        if known.get(name) != layout:
            raise StateError(
                explain(
                    f"the curvature does not know block {name!r} as this model uses it.",
                    got=_form(layout),
                    wanted=_form(known[name]) if name in known else ", ".join(map(repr, known)),
                    options="measure the curvature with the same model; or route='vmap' or 'loop': any form will do",
                )
            )
    return {name: rows.pairs[name] if name in rows.pairs else _silent(at, rows) for name, at in known.items()}


def _form(layout: Layout) -> str:
    return f"{layout.kind} of {', '.join(layout.leaves)}"


def _silent(layout: Layout, rows: ExampleRows) -> Pairs:
    lead = (1, len(rows.outputs), 1, *([layout.groups] if layout.groups > 1 else []))
    vectors = next((pair.left.shape[0] for pair in rows.pairs.values()), 1)
    left = rows.outputs.new_zeros(vectors, *lead[1:], layout.outputs)
    return Pairs(left, rows.outputs.new_zeros(*lead, layout.columns if layout.matrix else 1))


def _joined(layout: Layout, rows: ExampleRows) -> Pairs:
    entries = {path: matrices(rows.pairs[path]).flatten(2) for path in layout.leaves}

    def one(flat: dict[str, torch.Tensor]) -> torch.Tensor:
        return pack(layout, {path: x.reshape(rows.layouts[path].shape) for path, x in flat.items()})

    v = torch.func.vmap(torch.func.vmap(one))(entries)  # [V, N, (q), o, i] or [V, N, p]
    if not layout.matrix:
        return Pairs(v.unsqueeze(2), v.new_ones(1, v.shape[1], 1, 1))
    right = v.movedim(-2, 2)
    eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device)
    left = eye.unsqueeze(1).expand(-1, v.shape[2], -1) if v.ndim > 4 else eye
    return Pairs(left.expand(*v.shape[:2], *left.shape), right)
