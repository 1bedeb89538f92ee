"""The state of a K-FAC transformation, how to find one inside any optimiser state, and how to read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import StateError, explain
from kfac_func._tree import Static
from kfac_func._typing import PyTree
from kfac_func.blocks import Layout
from kfac_func.damping import Split

Average = Literal["debiased", "warmup", "constant"]


class Options(NamedTuple):
    """The settings of a preconditioner, as `kfac` explains them; `patterns` are those of a damping by path, and
    `driven` says whether a schedule or a tensor sets the damping at every update. A decay that is no number is None
    here: the state has it.
    """

    split: Split
    decay: float | None
    average: Average
    refresh_every: int
    scale_every: int = 1
    growing: bool = True
    stagger: bool = False
    burn_in: int = 0
    l2: float = 0.0
    patterns: tuple[str, ...] = ()
    driven: bool = False


class Rules(NamedTuple):
    """What is static about a state: the curvature, the options, and (after the first statistics) the blocks and all
    leaf paths. `decayed`: the leaves that the l2 term covers. `patterns`: that of a damping by path for every block.
    `name`: that of the curvature, which files keep.
    """

    curvature: Any  # a Curvature, None after loading from a file
    options: Options
    layouts: tuple[Layout, ...] = ()
    paths: tuple[str, ...] = ()
    unclaimed: tuple[tuple[str, str], ...] = ()
    decayed: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    name: str = ""

    def __reduce__(self) -> tuple:
        """Functions do not go into files: after loading, the first `update` puts the curvature back."""
        return Rules, (None, *self[1:])


class KFacState(NamedTuple):
    """The state of `kfac()`: tensors only at the leaves.

    step       updates so far, 0-dim int64 on the CPU (it decides about refreshes without asking a device)
    observed   batches whose statistics were absorbed        rejected   batches that were not finite and left out
    failed     factorisations that were not finite and did not replace the one before
    scaled     batches whose scalings were absorbed (EKFAC)  scaled_at  the update of the last of them, on the CPU
    weight     W of the zero-debiased averages               scale_weight   that of the scalings
    damping    λ, float64; or by pattern
    curvature  the averages, () before the first statistics
    factored   what solving needs, () before the first statistics
    decay      β, float64, where a schedule or a tensor sets it at every update; () where it is a number
    """

    step: Tensor
    observed: Tensor
    rejected: Tensor
    failed: Tensor
    scaled: Tensor
    scaled_at: Tensor
    weight: Tensor
    scale_weight: Tensor
    damping: Tensor | dict[str, Tensor]
    curvature: Any
    factored: Any
    rules: Static[Rules]
    decay: Tensor | tuple[()] = ()


_tree.storable(KFacState, Rules, Options, Layout, Static)


def inside(state: PyTree) -> list[KFacState]:
    """The K-FAC states inside a state. Raises StateError when there is none."""
    found = _tree.nodes(state, KFacState)
    if not found:
        raise StateError(
            explain(
                "there is no K-FAC state inside.",
                got=type(state).__name__,
                options="pass the state of a chain with kfac() in it, or that of kfac() itself",
            )
        )
    return found


def the_one(state: PyTree) -> KFacState:
    """The K-FAC state inside a state. Raises StateError when there is none, and for several."""
    found = inside(state)
    if len(found) > 1:
        raise StateError(explain("there are several K-FAC states inside.", got=len(found), options="pass one of them"))
    return found[0]


def observed_one(state: PyTree) -> KFacState:
    """The same; raises StateError before the first statistics too."""
    found = the_one(state)
    if found.curvature == ():
        raise StateError(
            explain("the state has seen no statistics.", options="kf.observe(state, stats), or kf.fit_curvature(...)")
        )
    return found


def map_damping(state: PyTree, fn: Callable[[Tensor], Tensor]) -> PyTree:
    """λ ← fn(λ) in the K-FAC states inside a state, for every pattern of a damping by path; all else stays as it is.

    The damping acts at the next refresh. A schedule or a tensor overwrites it at the next update; numbers do not. The
    l2 coefficient is no part of it. Raises StateError when there is no K-FAC state inside.

        >>> state = map_damping(kf.kfac(damping=0.1).init({"w": torch.ones(2)}), lambda damping: 2 * damping)
        >>> state.damping
        tensor(0.2000, dtype=torch.float64)
    """
    inside(state)
    return _tree.map_nodes(lambda one: one._replace(damping=_tree.tree_map(fn, one.damping)), state, KFacState)


def describe(state: PyTree) -> str:
    """A table of what the K-FAC state inside covers: the curvature by name, every block with its kind, size, memory
    (of its averages and its factorisation) and leaves, and every leaf without one; and the memory of all. Of a stacked
    state, the ranges over the members and the memory of all of them.

    >>> print(kf.describe(kf.kfac().init({"w": torch.ones(2)})))
    kfac: blockwise(kronecker[cholesky], diagonal), damping 0.001, split pi, 0 batches observed, 0 rejected
    no statistics yet: gradients pass unchanged
    """
    inner = inside(state)[0]
    rules = inner.rules.value
    name = "no curvature attached" if rules.curvature is None else rules.curvature.name
    lines = [
        f"kfac: {name}, damping {_damping(inner)}, split {rules.options.split}, "
        f"{_span(inner.observed)} batches observed, {_span(inner.rejected)} rejected"
        + (f", {len(inner.step)} members" if inner.step.dim() else "")
    ]
    if not rules.layouts:
        return "\n".join([*lines, "no statistics yet: gradients pass unchanged"])
    rows = [("block", "kind", "V", "memory", "leaves")]
    for layout in rules.layouts:
        size = f"{layout.groups}x{layout.outputs}" if layout.groups > 1 else str(layout.outputs)
        held = _megabytes(*(of_block(part, layout.name) for part in (inner.curvature, inner.factored)))
        size = ("o=" if layout.matrix else "p=") + size
        rows.append((layout.name, layout.kind, size, held, " + ".join(layout.leaves)))
    covered = {path for layout in rules.layouts for path in layout.leaves}
    rows += [(path, "identity", "-", "-", path) for path, policy in rules.unclaimed if policy == "identity"]
    named = covered | {path for path, _ in rules.unclaimed}
    rows += [(path, "unused", "-", "-", path) for path in rules.paths if path not in named]
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    total, averages = _megabytes(inner.curvature, inner.factored), _megabytes(inner.curvature)
    return "\n".join([*lines, f"memory: {total}, of which averages {averages}"])


def of_block(things: Any, block: str) -> list[Any]:
    """What a tree holds for a block: the entries of that name in its dictionaries."""
    if isinstance(things, dict):
        return [things[block]] if block in things else []
    return [one for part in things for one in of_block(part, block)] if isinstance(things, tuple) else []


def _megabytes(*trees: Any) -> str:
    once = {id(leaf): leaf.nbytes for leaf in _tree.leaves(trees)}
    return f"{sum(once.values()) / 1e6:.3g} MB"


def _span(x: Tensor) -> str:
    """A number, or the range of those of an ensemble."""
    low, high = (f"{end.item():.6g}" if x.is_floating_point() else str(end.item()) for end in (x.min(), x.max()))
    return low if low == high else f"{low} to {high}"


def _damping(state: KFacState) -> str:
    options, values = state.rules.value.options, state.damping
    text = (
        _span(values)
        if isinstance(values, Tensor)
        else ", ".join(f"{_span(values[pattern])} for {pattern}" for pattern in options.patterns)
    )
    return text + (f" + l2 {options.l2:g}" if options.l2 else "")
