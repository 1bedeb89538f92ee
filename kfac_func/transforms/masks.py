"""Which leaves of a tree are meant: by path patterns, by a tree of truth values, or by a function of the tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from kfac_func._errors import HyperparameterError, explain
from kfac_func._patterns import chosen
from kfac_func._tree import tree_map, unique_paths
from kfac_func._typing import PyTree

Mask: TypeAlias = str | Sequence[str] | Callable[[PyTree], Any] | PyTree
"""One or more patterns ("*.weight"), a tree of bools like the parameters, or a function from the tree to either."""


def selected(mask: Mask | None, tree: PyTree) -> dict[str, bool]:
    """Whether each leaf of a tree is meant, by its dotted path.

    mask    None: every leaf. A pattern or a sequence of them as in `fnmatch`: the leaves that any of them matches
            ("*" matches any part of a path). A tree of bools with the structure of `tree`. A function of the tree that
            returns one of these

    Raises HyperparameterError for a pattern that matches no leaf and for a value that is no bool, TreeMismatchError for
    a tree of another structure.

        >>> import torch
        >>> selected("*.bias", {"head": {"weight": torch.ones(2), "bias": torch.ones(1)}})
        {'head.bias': True, 'head.weight': False}
    """
    paths = list(unique_paths(tree))
    if mask is None:
        return dict.fromkeys(paths, True)
    if callable(mask):
        return selected(mask(tree), tree)
    if isinstance(mask, str) or (isinstance(mask, Sequence) and all(isinstance(item, str) for item in mask)):
        found = chosen([mask] if isinstance(mask, str) else list(mask), paths, "a mask")
        return {path: path in found for path in paths}
    flags: list[Any] = []
    tree_map(lambda _, flag: flags.append(flag), tree, mask)
    for path, flag in zip(paths, flags, strict=True):
        if not isinstance(flag, bool):
            raise HyperparameterError(
                explain(f"the mask has no truth value at {path!r}.", got=repr(flag), wanted="True or False")
            )
    return dict(zip(paths, flags, strict=True))
