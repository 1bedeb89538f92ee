"""Containers that pytree libraries do not look into: mappings and dataclasses of any class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def is_dataclass(node: Any) -> bool:
    """Whether this is an instance of a dataclass."""
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def opened(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The children, what is static about the node, and the names of the children.

    >>> from types import MappingProxyType
    >>> opened(MappingProxyType({"a": 1}))
    ((1,), ('a',), ('a',))
    """
    if isinstance(node, Mapping):
        return tuple(node.values()), tuple(node), tuple(node)
    names = tuple(field.name for field in dataclasses.fields(node))
    return tuple(getattr(node, name) for name in names), names, names


def closed(kind: Any, names: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
    """A node of the class with other children."""
    if issubclass(kind, Mapping):
        made: Any = kind
        return made(dict(zip(names, children, strict=True)))
    node = object.__new__(kind)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(node, name, child)
    return node
