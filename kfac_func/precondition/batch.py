"""What one batch says, or the micro-batches that it came in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import StateError, explain
from kfac_func._tracing import at_hand, untouched
from kfac_func._typing import PyTree
from kfac_func.blocks import KroneckerState, Layout, Pairs, Thin, add, diagonal_of
from kfac_func.curvature.base import Batch, Question
from kfac_func.estimators import Stats
from kfac_func.precondition.rules import curvature_of, filled
from kfac_func.state import KFacState


class Observed:
    """One batch as a curvature may see it, `batch`. Every answer is made finite; `finite` says whether the moments were
    so by themselves, `later` whether all answers so far were.

    Statistics of several micro-batches answer as one batch does, by the means of their moments over all examples. Only
    where a use is shared by all examples, products between micro-batches are left out; their mean is zero.
    """

    def __init__(self, state: KFacState, stats: Stats | Sequence[Stats]):
        self.parts = (stats,) if isinstance(stats, Stats) else tuple(stats)
        self.curvature = curvature_of(state)
        _check_layouts(self.parts, state.rules.value.layouts)
        self.rules = self.parts[0].rules.value
        total = sum(part.rules.value.examples for part in self.parts)
        self.shares = [part.rules.value.examples / total for part in self.parts]
        self.prepared = [None if part.moments != () else self.curvature.prepare(part.blocks()) for part in self.parts]
        first, self.finite = self._checked(self._asked(self.curvature.measure, measured=True))
        self.later = self.finite
        self.batch = Batch(first, self._answer)

    def _answer(self, question: Question) -> Any:
        found, finite = self._checked(self._asked(question))
        self.later = self.later & finite
        return found

    def _asked(self, question: Question, *, measured: bool = False) -> Any:
        """The answer of all parts. `measured`: what was measured already is an answer."""
        if not measured and any(prepared is None for prepared in self.prepared):
            raise StateError(
                explain(
                    f"{self.curvature.name} looks at a batch more than once, and the statistics are moments already.",
                    why="a basis or factors of the state decide what is measured",
                    options="leave `measure=` out of value_grad_and_stats; or use kronecker() or diagonal()",
                )
            )
        both = zip(self.parts, self.prepared, strict=True)
        found = [part.moments if prepared is None else question(prepared) for part, prepared in both]
        return found[0] if len(found) == 1 else pooled(found, self.shares)

    @staticmethod
    def _checked(moments: Any) -> tuple[Any, Tensor]:
        finite = all_finite(witnesses(moments))
        if at_hand(finite) and finite:
            return moments, finite
        return _tree.tree_map(lambda m: torch.where(finite, m, 0.0), moments), finite


def pooled(parts: list[Any], shares: list[float]) -> Any:
    """The moments of several micro-batches as those of one: means by their shares of the examples; rows side by side.

    >>> pooled([torch.zeros(1), torch.ones(1)], [0.25, 0.75])
    tensor([0.7500])
    """
    first = parts[0]
    if isinstance(first, Pairs):
        return _side_by_side(parts, shares)
    if isinstance(first, dict) and any(isinstance(value, Pairs) for value in first.values()):
        return {name: _side_by_side([part[name] for part in parts], shares) for name in first}

    def mean(*leaves: Tensor) -> Tensor:
        return add([share * leaf for share, leaf in zip(shares, leaves, strict=True)])

    return _tree.tree_map(mean, *parts)


def _side_by_side(parts: list[Pairs], shares: list[float]) -> Pairs:
    """Rows [V, B, S, ...]: 1/√N is in `left`; vectors and positions that a micro-batch does not have are zero."""

    def joined(sides: list[Tensor]) -> Tensor:
        vectors, positions = (max(x.shape[dim] for x in sides) for dim in (0, 2))
        rest = [0, 0] * (sides[0].ndim - 3)
        wide = [F.pad(x, (*rest, 0, positions - x.shape[2], 0, 0, 0, vectors - x.shape[0])) for x in sides]
        return torch.cat(wide, dim=1)

    left = [part.left * share**0.5 for part, share in zip(parts, shares, strict=True)]
    return Pairs(joined(left), joined([part.right for part in parts]))


def speaking(stats: Stats | Sequence[Stats] | None) -> Stats | Sequence[Stats] | None:
    """The statistics that say something about curvature, None where none does."""
    if stats is None or isinstance(stats, Stats):
        return None if stats is None or stats.rules.value.silent else stats
    parts = tuple(part for part in stats if not part.rules.value.silent)
    return None if stats and not parts else parts


def rows_of(stats: Stats | Sequence[Stats] | None, updates: PyTree) -> dict[str, Thin]:
    """By block, the rows of the very gradients that are to be preconditioned: the leaves are the same tensors, as the
    step returned them and never written since.
    """
    if not isinstance(stats, Stats) or not stats.gradient:
        return {}
    here, found = _tree.unique_paths(updates), {}
    for layout in stats.rules.value.layouts:
        known = stats.gradient.get(layout.name)
        if known is not None and all(
            here.get(path) is leaf and untouched(leaf) for path, leaf in zip(layout.leaves, known.leaves, strict=True)
        ):
            found[layout.name] = known.rows
    return found


def _check_layouts(parts: Sequence[Stats], known: tuple[Layout, ...]) -> None:
    if not parts:
        raise StateError(explain("there are no statistics in the sequence.", options="pass stats=None on such steps"))
    known = known or filled(parts[0].rules.value.layouts)
    for part in parts:
        found = filled(part.rules.value.layouts)
        if found != known:
            raise StateError(
                explain(
                    "the statistics describe other blocks than the state.",
                    got=_listed(found, known),
                    wanted=_listed(known, found),
                    options="use one model and one `unclaimed` setting per state",
                )
            )


def _listed(blocks: tuple[Layout, ...], others: tuple[Layout, ...]) -> str:
    """The blocks that the others lack, and how they are made."""
    odd = [at for at in blocks if at not in others]
    some = [f"{' + '.join(map(repr, at.leaves))} ({at.kind}, V {list(at.size)})" for at in odd[:5]]
    return ", ".join(some + ["…"] * (len(odd) > 5)) or f"{len(blocks)} blocks, in another order"


def witnesses(tree: PyTree) -> PyTree:
    """What is not finite if the tree is not: second moments by their diagonals, as |A_ij|² ≤ A_ii A_jj.

    >>> witnesses(kf.curvature.KroneckerState(torch.ones(2, 2), torch.ones(1, 1), torch.ones(()), torch.ones(()))).a
    tensor([1., 1.])
    """

    def of(state: KroneckerState) -> KroneckerState:
        turned = () if state.turned == () else of(state.turned)
        return state._replace(a=diagonal_of(state.a), g=diagonal_of(state.g), turned=turned)

    return _tree.map_nodes(of, tree, KroneckerState)


def all_finite(tree: PyTree) -> Tensor:
    """Whether all leaves are finite: a 0-dim tensor, so nothing waits for a device."""
    sums = [torch.isfinite(leaf.sum()) for leaf in _tree.leaves(tree)]
    return torch.stack(sums).all() if sums else torch.tensor(True)
