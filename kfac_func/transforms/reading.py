r"""Read and change parts of a state by name, wherever they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, StateError, explain
from kfac_func._tree import _children, _rebuilt, tree_map
from kfac_func._typing import PyTree

_REQUIRED: Any = object()


def tree_get(state: PyTree, name: str, default: Any = _REQUIRED) -> Any:
    """The part of a state with a name: a field of a NamedTuple or a key of a dictionary, at any depth.

    name     "damping"; or, where several parts have that name, a dotted path or the end of one: "1.damping",
             "kfac.damping". A whole path comes before the ends of longer ones
    default  what to return when there is no such part

    The part is that of the state itself, not a copy. Raises StateError when there is none (it lists the names that
    exist) and no default, or when there are several (it lists their paths).     Source: optax.tree_utils.tree_get.

    >>> tx = kf.chain(kf.kfac(damping=0.5), kf.sgd(0.1, momentum=0.9))
    >>> tree_get(tx.init({"w": torch.ones(2)}), "trace")
    {'w': tensor([0., 0.])}
    """
    found = _found(state, name)
    if not found and default is not _REQUIRED:
        return default
    return _at(state, _single(state, name, found))


def tree_set(state: PyTree, /, **values: Any) -> PyTree:
    """The state with other values for parts of it, found by name as in `tree_get`; everything else stays as it is.

    values   a number or a tensor for a tensor, a tree for a tree of the same structure; paths are passed as
             `**{"1.damping": 0.5}`. Dtype, device and shape of the state stay: a single number is for every member of
             an ensemble. Gradients flow through tensors

    Raises StateError for names as `tree_get` does, TreeMismatchError for another structure, HyperparameterError for a
    value that the tensor cannot hold.     Source: optax.tree_utils.tree_set.

    >>> tx = kf.chain(kf.kfac(damping=0.5), kf.sgd(0.1))
    >>> state = tree_set(tx.init({"w": torch.ones(2)}), damping=0.25)
    >>> tree_get(state, "0.damping")
    tensor(0.2500, dtype=torch.float64)
    """
    for name, value in values.items():
        path = _single(state, name, _found(state, name))

        def fitted(old: Any, new: Any, name: str = name) -> Any:
            return _fitted(name, old, new)

        state = _replaced(state, path, tree_map(fitted, _at(state, path), value))
    return state


_Path = tuple[Any, ...]


def _parts(node: Any, path: _Path = ()) -> list[_Path]:
    """The paths of all parts below a node, as keys."""
    return [found for key, child in _children(node) or () for found in [(*path, key), *_parts(child, (*path, key))]]


def _dotted(path: _Path) -> str:
    return ".".join(map(str, path))


def _found(state: PyTree, name: str) -> list[_Path]:
    paths = _parts(state)
    whole = [path for path in paths if _dotted(path) == name]
    return whole or [path for path in paths if any(_dotted(path[k:]) == name for k in range(len(path)))]


def _single(state: PyTree, name: str, found: list[_Path]) -> _Path:
    if len(found) == 1:
        return found[0]
    names = dict.fromkeys(str(path[-1]) for path in _parts(state) if not isinstance(path[-1], int))
    raise StateError(
        explain(
            f"the state has several parts {name!r}." if found else f"the state has no part {name!r}.",
            got=", ".join(map(_dotted, found)) or None,
            wanted=None if found else ", ".join(names) or "a state with parts",
            options="name one by its path, or by the end of it that differs" if found else None,
        )
    )


def _at(node: Any, path: _Path) -> Any:
    for key in path:
        node = dict(_children(node) or ())[key]
    return node


def _replaced(node: Any, path: _Path, value: Any) -> Any:
    if not path:
        return value
    children = dict(_children(node) or ())
    return _rebuilt(node, {**children, path[0]: _replaced(children[path[0]], path[1:], value)})


def _fitted(name: str, old: Any, new: Any) -> Any:
    """A value in the shape, dtype and device of the tensor that it replaces, in fresh memory."""
    if not isinstance(old, Tensor):
        return new
    if isinstance(new, (bool, int, float)):
        new = torch.tensor(new, dtype=torch.float64 if isinstance(new, float) else None, device="cpu")
    fits = isinstance(new, Tensor) and new.shape in ((), old.shape) and torch.can_cast(new.dtype, old.dtype)
    if not fits:
        raise HyperparameterError(
            explain(
                f"{name} cannot hold this value.",
                got=f"{new.dtype} of shape {list(new.shape)}" if isinstance(new, Tensor) else repr(new),
                wanted=f"a number, or a tensor that fits {old.dtype} of shape {list(old.shape)}",
            )
        )
    return new.to(old.device, old.dtype, non_blocking=True).expand(old.shape).clone()
