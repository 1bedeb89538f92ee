r"""Transformations for some of the leaves: one for those of a mask, or one for each label."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch

from kfac_func._errors import HyperparameterError, TreeMismatchError, explain
from kfac_func._tree import (
    Static,
    _children,
    _rebuilt,
    leaves_with_paths,
    storable,
    tree_map,
    unique_paths,
    with_leaves,
)
from kfac_func._typing import PyTree
from kfac_func.transforms.base import GradientTransformation
from kfac_func.transforms.keywords import strict
from kfac_func.transforms.masks import Mask, selected
from kfac_func.transforms.wrappers import with_extra_args_support

Labels: TypeAlias = Mapping[str, str] | Callable[[PyTree], Any] | PyTree
"""Path patterns with their labels (the first that matches), a tree of labels like the parameters, or a function from
the parameters to either.
"""


_HOLE = Static("no leaf here")  # None in a state as it is stored: vmap cannot return None


class MaskedState(NamedTuple):
    """The state of the transformation inside, and the paths of the leaves that it is for."""

    inner: PyTree
    chosen: Static[tuple[str, ...]]


def masked(inner: Any, mask: Mask) -> GradientTransformation:
    r"""Transform some leaves only:  u'_l = f(u)_l  for the leaves l of the mask,  u'_l = u_l  for all others.

    inner   any member of a chain; updates and params that it sees are None at the leaves outside of the mask, so it
            keeps no state for them. All extras reach it (`stats=` as it is: K-FAC inside knows the whole model, and a
            mask must hold the weight and the bias of a layer together)
    mask    path patterns, a tree of bools or a function of the params, as in `selected`; asked once, by `init`

    Raises HyperparameterError and TreeMismatchError for a mask that does not fit the params, and what `chain` raises.
    Source: optax.masked.

    >>> tx = masked(kf.scale(2.0), "*.weight")
    >>> grads = {"head": {"weight": torch.ones(2), "bias": torch.ones(1)}}
    >>> tx.update(grads, tx.init(grads))[0]
    {'head': {'weight': tensor([2., 2.]), 'bias': tensor([1.])}}
    """
    inner = with_extra_args_support(inner)

    def init(params: PyTree) -> MaskedState:
        chosen = tuple(path for path, meant in selected(mask, params).items() if meant)
        return MaskedState(closed(inner.init(_only(params, chosen))), Static(chosen))

    def update(updates, state, params=None, **extra):
        chosen = state.chosen.value
        mine, new = inner.update(_only(updates, chosen), opened(state.inner), _only(params, chosen), **extra)
        others = [path for path, _ in leaves_with_paths(updates) if path not in set(chosen)]
        rest = tree_map(torch.clone, _only(updates, others))
        return _together(updates, [mine, rest]), MaskedState(closed(new), state.chosen)

    return GradientTransformation(init, strict(update, inner.update))


class PartitionState(NamedTuple):
    """The state of every transformation by its label, and the labels of all leaves by their paths."""

    inner: dict[str, PyTree]
    labels: Static[tuple[tuple[str, str], ...]]


storable(MaskedState, PartitionState, Static)


def partition(transforms: Mapping[str, Any], labels: Labels) -> GradientTransformation:
    r"""Several transformations, each for its own leaves:  u'_l = f_k(u)_l  for the leaves l with the label k.

    transforms  any member of a chain for every label; each sees None at the leaves of the others, and all extras
    labels      patterns of paths with their labels, the first that matches (`{"*.bias": "adam", "*": "kfac"}`); or a
                tree of labels like the params, or a function of the params; asked once, by `init`

    Raises HyperparameterError when a leaf has no label or an unknown one, or a pattern matches nothing,
    TreeMismatchError for a tree of labels or updates unlike the params, and what `chain` raises.
    Source: optax.partition (multi_transform).

    >>> tx = partition({"slow": kf.scale(0.5), "fast": kf.scale(2.0)}, {"*.bias": "fast", "*": "slow"})
    >>> grads = {"head": {"weight": torch.ones(2), "bias": torch.ones(1)}}
    >>> tx.update(grads, tx.init(grads))[0]
    {'head': {'weight': tensor([0.5000, 0.5000]), 'bias': tensor([2.])}}
    """
    members = {label: with_extra_args_support(member) for label, member in transforms.items()}

    def init(params: PyTree) -> PartitionState:
        found = _labelled(labels, params)
        for path in unique_paths(params):
            if found.get(path) not in members:
                raise HyperparameterError(_unknown(path, found.get(path), members))
        states = {label: closed(member.init(_only(params, _paths(found, label)))) for label, member in members.items()}
        return PartitionState(states, Static(tuple(found.items())))

    def update(updates, state, params=None, **extra):
        found = dict(state.labels.value)
        for path, _ in leaves_with_paths(updates):
            if path not in found:
                raise TreeMismatchError(_unlike(path, found))
        parts, states = [], {}
        for label, member in members.items():
            mine = _paths(found, label)
            inner = opened(state.inner[label])
            part, new = member.update(_only(updates, mine), inner, _only(params, mine), **extra)
            parts, states = [*parts, part], {**states, label: closed(new)}
        return _together(updates, parts), PartitionState(states, state.labels)

    return GradientTransformation(init, strict(update, *(member.update for member in members.values())))


def _labelled(labels: Labels, params: PyTree) -> dict[str, Any]:
    """The label of every leaf that has one, by path."""
    if callable(labels):
        return _labelled(labels(params), params)
    if isinstance(labels, Mapping) and all(isinstance(label, str) for label in labels.values()):
        found: dict[str, Any] = {}
        for pattern, label in labels.items():
            found |= {path: label for path, on in selected(pattern, params).items() if on and path not in found}
        return found
    given: list[Any] = []
    tree_map(lambda _, label: given.append(label), params, labels)
    return dict(zip(unique_paths(params), given, strict=True))


def _paths(labels: Mapping[str, str], label: str) -> set[str]:
    return {path for path, own in labels.items() if own == label}


def _only(tree: PyTree, paths: Collection[str]) -> PyTree:
    """The tree with None at all leaves but those of the paths."""
    paths = set(paths)
    return with_leaves(tree, [leaf if path in paths else None for path, leaf in leaves_with_paths(tree)])


def _together(updates: PyTree, parts: list[PyTree]) -> PyTree:
    """One tree like the updates from trees that have other leaves each."""
    found = {path: leaf for part in parts for path, leaf in leaves_with_paths(part)}
    return with_leaves(updates, [found.get(path) for path, _ in leaves_with_paths(updates)])


def closed(state: PyTree) -> PyTree:
    """A state of an inner transformation as it is stored."""
    return _swapped(state, None, _HOLE)


def opened(state: PyTree) -> PyTree:
    """A stored state as the inner transformation knows it, with None at the leaves of others."""
    return _swapped(state, _HOLE, None)


def _swapped(node: Any, old: Any, new: Any) -> Any:
    if node is None or isinstance(node, Static):
        return new if node == old else node
    children = _children(node)
    return _rebuilt(node, {key: _swapped(child, old, new) for key, child in children}) if children else node


def _unknown(path: str, label: Any, members: Mapping[str, Any]) -> str:
    return explain(
        f"the leaf {path!r} has no label that names a transformation.",
        got="no label" if label is None else repr(label),
        wanted=" or ".join(map(repr, members)),
        options='add a last pattern {..., "*": label}; or add a transformation of that name',
    )


def _unlike(path: str, labels: Mapping[str, str]) -> str:
    return explain(
        f"the update {path!r} belongs to no leaf of the params that `init` was given.",
        wanted=", ".join(map(repr, list(labels)[:20])),
        options="take updates from the same parameters",
    )
