"""Pytrees: the only importer of optree, and the only place that flattens.

optree and torch.func disagree (optree sorts dictionary keys, torch.func keeps insertion order; None is an empty node in
one and a leaf in the other), so a tree flattened in one world must never be unflattened in the other. Everything in the
house goes through these functions. Here a None anywhere in the first tree stands for "nothing here" and stays None.

Dynamo cannot trace optree on every container, so under torch.compile the same functions walk the tree in Python
(`_children`), in the same order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import optree
import torch
import torch.utils._pytree as torch_pytree

from kfac_func._containers import closed, is_dataclass, opened
from kfac_func._errors import TreeMismatchError, explain
from kfac_func._typing import PyTree

T = TypeVar("T")


class Static(Generic[T]):
    """A tree node without leaves that carries a hashable value (rules, layouts) through vmap, compile and tree maps."""

    __slots__ = ("value",)

    def __init__(self, value: T):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(("Static", self.value))

    def __repr__(self) -> str:
        return f"Static({self.value!r})"


OWN = "kfac_func"  # the namespace of classes that are looked into
_optree: Any = optree  # its annotations ask a node class to be iterable, which one without children need not be
_optree.register_pytree_node(
    Static, lambda node: ((), node, ()), lambda node, _: node, namespace=_optree.registry.__GLOBAL_NAMESPACE
)
torch_pytree.register_pytree_node(Static, lambda node: ([], node), lambda _, node: node)


def storable(*states: type) -> None:
    """Let `torch.load(weights_only=True)` read these NamedTuples of tensors."""
    torch.serialization.add_safe_globals(list(states))


class Leaf(NamedTuple):
    """One leaf of a tree with the dotted path that names it in messages."""

    path: str
    value: Any


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """The keys and children of a node in optree's order, or None for a leaf. For tracing only."""
    if node is None or isinstance(node, Static):
        return []
    if isinstance(node, dict):
        return [(key, node[key]) for key in (node if isinstance(node, OrderedDict) else sorted(node))]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(node, (tuple, list)):
        return list(enumerate(node))
    if isinstance(node, Mapping) or is_dataclass(node):
        children, names, _ = opened(node)
        return list(zip(names, children, strict=True))
    return None


def _rebuilt(node: Any, new: dict[Any, Any]) -> Any:
    if isinstance(node, dict):
        return type(node)((key, new[key]) for key in node)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*new.values())
    if isinstance(node, Mapping) or is_dataclass(node):
        return closed(type(node), tuple(new), tuple(new.values()))
    return node if node is None or isinstance(node, Static) else type(node)(new.values())


def _traced_leaves(tree: PyTree, path: str = "") -> list[Leaf]:
    children = _children(tree)
    if children is None:
        return [Leaf(path, tree)]
    start = path + "." if path else ""
    return [leaf for key, child in children for leaf in _traced_leaves(child, f"{start}{key}")]


def _traced_map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    children = _children(tree)
    if children is None:
        return fn(tree, *rest)
    others = [dict(_children(other) or []) for other in rest]
    return _rebuilt(tree, {key: _traced_map(fn, child, *(other[key] for other in others)) for key, child in children})


def leaves(tree: PyTree) -> list[Any]:
    """The leaves of a tree, without the None ones."""
    if torch.compiler.is_compiling():
        return [leaf.value for leaf in _traced_leaves(tree)]
    return optree.tree_leaves(tree, namespace=OWN)


def leaves_with_paths(tree: PyTree) -> list[Leaf]:
    """The leaves of a tree with their dotted paths (dict keys, field names, indices), without the None ones."""
    if torch.compiler.is_compiling():
        return _traced_leaves(tree)
    accessors, values, _ = optree.tree_flatten_with_accessor(tree, namespace=OWN)
    return [Leaf(_dotted(accessor), value) for accessor, value in zip(accessors, values, strict=True)]


def _dotted(accessor: Any) -> str:
    return ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor)


def tree_map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map `fn` over the leaves of `tree` and the matching subtrees of `rest`; a None leaf of `tree` stays None.

    Dictionary keys are matched by name, in any order. A leaf of `rest` may be None: `fn` sees it.
    Raises TreeMismatchError, naming the first path that differs, when a tree of `rest` has another structure.
    """
    if torch.compiler.is_compiling():
        return _traced_map(fn, tree, *rest)
    values, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=OWN)
    others = []
    for other in rest:
        try:
            others.append(spec.flatten_up_to(other))
        except (ValueError, TypeError) as error:
            raise TreeMismatchError(mismatch(tree, other)) from error
    return spec.unflatten(
        [None if value is None else fn(value, *more) for value, *more in zip(values, *others, strict=True)]
    )


def mismatch(tree: PyTree, other: PyTree) -> str:
    """Say where two trees differ first: a path that only one of them has."""
    wanted, got = ({leaf.path: None for leaf in leaves_with_paths(t)} for t in (tree, other))
    missing = [path for path in wanted if path not in got]
    extra = [path for path in got if path not in wanted]
    rules = "" if missing or extra else _other_rules(tree, other)
    return explain(
        "two trees that must have the same structure differ.",
        why=f"the rules that the states carry differ at {rules!r}" if rules else None,
        missing=", ".join(map(repr, missing[:5])) or None,
        unexpected=", ".join(map(repr, extra[:5])) or None,
        wanted=f"{len(wanted)} leaves" if missing or extra else type(tree).__name__,
        got=f"{len(got)} leaves" if missing or extra else type(other).__name__,
        options="build both trees from the same parameters (same containers, same keys, same lengths)",
    )


def _other_rules(tree: PyTree, other: PyTree) -> str:
    """The path of the first `Static` node that differs."""
    found = []
    for one in (tree, other):
        accessors, values, _ = optree.tree_flatten_with_accessor(
            one, is_leaf=lambda x: isinstance(x, Static), namespace=OWN
        )
        found.append([(_dotted(a), v) for a, v in zip(accessors, values, strict=True) if isinstance(v, Static)])
    return next((path for (path, one), (_, two) in zip(*found, strict=False) if one != two), "")


def replace_leaves(tree: PyTree, new: dict[str, Any]) -> PyTree:
    """The same tree with the leaves at the dotted paths of `new` replaced, the others kept as they are.

    Raises TreeMismatchError when `new` names a path that the tree does not have, or two leaves share one path.
    """
    found = leaves_with_paths(tree)
    paths = [leaf.path for leaf in found]
    unknown = set(new) - set(paths)
    if unknown:
        raise TreeMismatchError(
            explain(
                "a tree lacks leaves that it must have.",
                missing=", ".join(map(repr, sorted(unknown))),
                got=", ".join(map(repr, paths[:20])) or "an empty tree",
                options="pass the tree that has the structure of the parameters",
            )
        )
    return with_leaves(tree, [new.get(path, value) for path, value in found])


def unique_paths(tree: PyTree) -> dict[str, Any]:
    """The leaves by dotted path. Raises TreeMismatchError when two leaves have the same path ({'a.b'} and {'a':
    {'b'}}).
    """
    found: dict[str, Any] = {}
    for path, value in leaves_with_paths(tree):
        if path in found:
            raise TreeMismatchError(
                explain(
                    f"two leaves have the same path {path!r}.",
                    why="blocks are named by path, so a path must name one leaf",
                    options="rename one of the keys",
                )
            )
        found[path] = value
    return found


def ravel(tree: PyTree) -> tuple[torch.Tensor, Callable[[torch.Tensor], PyTree]]:
    """Concatenate all leaves to one vector [P]; the second value takes such a vector back to the tree.

    `unravel` restores shapes and dtypes, so that `unravel(ravel(tree)[0])` equals the tree (None stays None).
    Mixed dtypes are promoted in the vector. Raises TreeMismatchError when a vector of another length is unravelled.
    """
    values, spec = optree.tree_flatten(tree, namespace=OWN)
    kinds = [(value.shape, value.dtype, value.numel()) for value in values]
    vector = torch.cat([value.reshape(-1) for value in values]) if values else torch.zeros(0)

    def unravel(flat: torch.Tensor) -> PyTree:
        if flat.shape != vector.shape:
            raise TreeMismatchError(
                explain("a vector does not fit the tree.", got=list(flat.shape), wanted=list(vector.shape))
            )
        parts = zip(flat.split([size for *_, size in kinds]), kinds, strict=True)
        return spec.unflatten([part.reshape(shape).to(dtype) for part, (shape, dtype, _) in parts])

    return vector, unravel


def with_leaves(tree: PyTree, values: list[Any]) -> PyTree:
    """The tree with other leaves, in the order of `leaves(tree)`."""
    if torch.compiler.is_compiling():
        remaining = list(values)[::-1]
        return _traced_map(lambda _: remaining.pop(), tree)
    return optree.tree_structure(tree, namespace=OWN).unflatten(values)


def map_nodes(fn: Callable[[Any], Any], tree: PyTree, kind: type) -> PyTree:
    """Replace every node of the given type, leaving everything else as it is."""
    if torch.compiler.is_compiling():
        if isinstance(tree, kind):
            return fn(tree)
        children = _children(tree)
        return tree if children is None else _rebuilt(tree, {key: map_nodes(fn, x, kind) for key, x in children})
    return optree.tree_map(
        lambda x: fn(x) if isinstance(x, kind) else x, tree, is_leaf=lambda x: isinstance(x, kind), namespace=OWN
    )


def nodes(tree: PyTree, kind: type[T]) -> list[T]:
    """Every node of the given type."""
    if torch.compiler.is_compiling():
        return [tree] if isinstance(tree, kind) else [x for _, y in _children(tree) or [] for x in nodes(y, kind)]
    return [
        x for x in optree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, kind), namespace=OWN) if isinstance(x, kind)
    ]


def broadcast(prefix: PyTree, tree: PyTree) -> list[Any]:
    """For every leaf of a tree the value of the leaf of `prefix` that stands for it, None being a value. Raises
    TreeMismatchError when `prefix` is none.

    >>> broadcast((0, None), ({"a": 1, "b": 2}, 3))
    [0, 0, None]
    """
    try:
        found = optree.broadcast_prefix(prefix, tree, none_is_leaf=True, namespace=OWN)
    except ValueError as error:
        raise TreeMismatchError(mismatch(tree, prefix)) from error
    values = optree.tree_leaves(tree, none_is_leaf=True, namespace=OWN)
    return [own for own, value in zip(found, values, strict=True) if value is not None]


def know(tree: PyTree) -> None:
    """Look into mappings and dataclasses of any class as well (a batch of a tokenizer, say), here and from now on.

    >>> from types import MappingProxyType
    >>> know(MappingProxyType({"a": 1}))
    >>> leaves(MappingProxyType({"a": 1}))
    [1]
    """
    while kinds := {type(leaf) for leaf in leaves(tree) if isinstance(leaf, Mapping) or is_dataclass(leaf)}:
        for kind in kinds:
            _optree.register_pytree_node(kind, opened, partial(closed, kind), namespace=OWN)
