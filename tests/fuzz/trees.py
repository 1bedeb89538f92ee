"""Trees of parameters, containers of inputs and memory layouts, as people have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.fuzz.draw import Draw, Extras


def flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """The leaves by dotted path."""
    if isinstance(tree, Tensor):
        return {prefix[:-1]: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}{key}.").items()}


def rebuilt(tree: Any, leaves: dict[str, Tensor], prefix: str = "") -> Any:
    """The tree with other leaves."""
    if isinstance(tree, Tensor):
        return leaves[prefix[:-1]]
    if isinstance(tree, dict):
        return {key: rebuilt(value, leaves, f"{prefix}{key}.") for key, value in tree.items()}
    return type(tree)([rebuilt(value, leaves, f"{prefix}{key}.") for key, value in enumerate(tree)])


def vector(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in flat(tree).values()])


def mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return rebuilt(tree, {path: change(leaf) for path, leaf in flat(tree).items()})


# ----------------------------------------------------------------------------- parameters: a list of dicts, packed


class Style(NamedTuple):
    """How the parameters of all pieces are kept, and found again."""

    pack: Callable[[list[dict]], Any]
    open: Callable[[Any], list[dict]]


def _dotted(parts: list[dict]) -> dict[str, Tensor]:
    return {f"{k}.{path}": leaf for k, part in enumerate(parts) for path, leaf in flat(part).items()}


def _undotted(tree: dict[str, Tensor]) -> list[dict]:
    found: dict = {}
    for path, leaf in tree.items():
        *parents, last = path.split(".")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    size = max((int(k) for k in found), default=-1) + 1
    return [found.get(str(k), {}) for k in range(size)]


STYLES: dict[str, Style] = {
    "nested": Style(
        lambda parts: {f"layer{k}": part for k, part in enumerate(parts)},
        lambda tree: [tree[f"layer{k}"] for k in range(len(tree))],
    ),
    "dotted": Style(_dotted, _undotted),
    "list": Style(list, list),
    "tuple": Style(tuple, list),
}


# ------------------------------------------------------------------------------------------- containers of inputs


@dataclass
class Batch:
    """Inputs as people who like types keep them."""

    x: Tensor
    extras: Extras


class Pair(NamedTuple):
    """Inputs as a NamedTuple."""

    extras: Extras
    x: Tensor


class Container(NamedTuple):
    """How x [N, ...] and further inputs travel."""

    pack: Callable[[Tensor, Extras], Any]
    open: Callable[[Any, list[str]], tuple[Tensor, Extras]]


CONTAINERS: dict[str, Container] = {
    "tuple": Container(lambda x, e: (x, *e.values()), lambda i, names: (i[0], dict(zip(names, i[1:], strict=True)))),
    "list": Container(lambda x, e: [x, *e.values()], lambda i, names: (i[0], dict(zip(names, i[1:], strict=True)))),
    "tuple, x last": Container(
        lambda x, e: (*e.values(), x), lambda i, names: (i[-1], dict(zip(names, i[:-1], strict=True)))
    ),
    "dict": Container(lambda x, e: {"x": x} | e, lambda i, names: (i["x"], {k: i[k] for k in names})),
    "dict, nested": Container(lambda x, e: {"x": x, "more": e}, lambda i, names: (i["x"], i["more"])),
    "dataclass": Container(Batch, lambda i, names: (i.x, i.extras)),
    "NamedTuple": Container(lambda x, e: Pair(e, x), lambda i, names: (i.x, i.extras)),
    "with None": Container(lambda x, e: (x, None, e), lambda i, names: (i[0], i[2])),
    "with a flag": Container(lambda x, e: {"x": x, "train": True, "extras": e}, lambda i, names: (i["x"], i["extras"])),
}
TENSOR = Container(lambda x, e: x, lambda i, names: (i, {}))


# ------------------------------------------------------------------------------------------------ memory layouts


def _turned(x: Tensor) -> Tensor:
    """The last dimension outermost in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.ndim > 1 else x


def _every_second(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1], -1)[..., 0]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)


def _all_one(x: Tensor) -> Tensor:
    """Every example the same, without memory of its own."""
    return x[:1].expand(x.shape)


INPUT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": _turned, "every second": _every_second, "channels last": _channels_last, "offset": _offset,
    "expanded": _all_one,
}  # fmt: skip
LEAF_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": _turned, "every second": _every_second, "channels last": _channels_last, "offset": _offset,
    "requires grad": lambda x: x.clone().requires_grad_(), "nn.Parameter": lambda x: torch.nn.Parameter(x.clone()),
    "with a graph": lambda x: x.clone().requires_grad_() * 1,
}  # fmt: skip


def one_buffer(tree: Any) -> Any:
    """All leaves as views of one flat tensor."""
    whole, found, start = vector(tree), {}, 0
    for path, leaf in flat(tree).items():
        found[path] = whole[start : start + leaf.numel()].view(leaf.shape)
        start += leaf.numel()
    return rebuilt(tree, found)


def laid_out(d: Draw, tree: Any) -> tuple[str, Any]:
    """The parameters in some layout of memory, and its name."""
    name = d.weighted({"": 8.0, "one buffer": 0.7} | dict.fromkeys(LEAF_LAYOUTS, 0.6))
    if not name or (name == "one buffer" and len({leaf.dtype for leaf in flat(tree).values()}) > 1):
        return "", tree
    return f"params {name}", one_buffer(tree) if name == "one buffer" else mapped(tree, LEAF_LAYOUTS[name])
