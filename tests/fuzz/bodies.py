"""Models before their loss: pieces one after the other, or a module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kfac_func as kf
from tests.fuzz.dense import DENSE, linear
from tests.fuzz.draw import Draw, Extras, Maker, Piece, Shape
from tests.fuzz.hostile import HIDDEN
from tests.fuzz.maps import ACTIVATIONS, MAPS, READERS
from tests.fuzz.mixing import MIXING, WRAPPERS
from tests.fuzz.modules import (
    AS_PIECES,
    HOSTILE_MODULES,
    MODULE_READERS,
    MODULES,
    RANDOM,
    Net,
    Row,
    made,
    piece,
    scaled,
)
from tests.fuzz.trees import CONTAINERS, STYLES, TENSOR, Container, mapped

HARMLESS: dict[str, Maker] = DENSE | MAPS | AS_PIECES
HOSTILE: dict[str, Maker] = HIDDEN | MIXING | {
    f"{name} inside": piece(name, row) for name, row in HOSTILE_MODULES.items() if "batch norm" not in name
}  # fmt: skip
OUTPUTS = 40  # of a batch, at most

Fn = Callable[[Any, Any], Tensor]


class Body(NamedTuple):
    """A model with random inputs, in float64.

    at        dtype -> (fn for the library, fn for torch, parameters)
    shape     of one example's outputs
    """

    names: list[str]
    at: Callable[[torch.dtype], tuple[Fn, Fn, Any]]
    shape: Shape
    x: Tensor
    extras: Extras
    container: Container
    whole: frozenset[str]
    traits: frozenset[str]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating numbers in another dtype; complex ones as wide."""
    if x.is_complex():
        return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return x.to(dtype) if x.is_floating_point() else x


def fitting(d: Draw, table: dict[str, Maker], s: Shape) -> tuple[str, Piece]:
    """A random piece that takes this shape and leaves something of bearable size."""
    while True:
        name = d.weighted({name: one.often for name, one in table.items() if len(s) in one.ranks})
        found = table[name].make(d, s)
        if found is not None and 0 < math.prod(found.shape) <= 48 and len(found.shape) <= 3:
            return name, found


def _start(d: Draw) -> tuple[Shape, bool]:
    """The shape of one example, and whether it is made of integers."""
    if d.chance(0.15):
        return d.pick((), (d.size(1, 4),), (d.size(1, 3),)), True
    rank = d.weighted({1: 4.0, 2: 3.0, 3: 1.5})
    return (
        (d.size(1, 2), d.size(2, 4), d.size(2, 4)) if rank == 3 else tuple(d.size(1, 4) for _ in range(rank))
    ), False


_PLAIN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Shape], Shape]]] = {
    "flat": (lambda x: x.flatten(1), lambda s: (math.prod(s),)),
    "mean": (lambda x: x.flatten(2).mean(2), lambda s: s[:1]),
    "mean of positions": (lambda x: x.mean(1), lambda s: s[1:]),
    "number": (lambda x: x.squeeze(-1), lambda s: s[:-1]),
    "squeezed": (lambda x: x.squeeze(), lambda s: s[:-1]),
}


def _plain(name: str, s: Shape) -> Piece:
    run, shape = _PLAIN[name]
    return Piece({}, lambda p, x, e: run(x), shape(s))


def head(d: Draw, s: Shape) -> tuple[list[str], list[Piece]]:
    """From features to outputs: classes, a class per position, a number."""
    names, parts = [], []

    def add(name: str, one: Piece) -> None:
        nonlocal s
        s = one.shape
        names.append(f"head: {name}")
        parts.append(one)

    if len(s) == 3:
        choice = d.pick("flat", "mean", "conv", "as it is")
        if choice == "conv":
            add(
                "conv",
                Piece(
                    {"w": (w := d.weight(d.size(2, 3), s[0], 1, 1))},
                    lambda p, x, e: torch.conv2d(x, p["w"]),
                    (len(w), *s[1:]),
                ),
            )
        elif choice != "as it is":
            add(choice, _plain(choice, s))
    elif len(s) == 2 and d.chance(0.6):
        choice = d.pick("flat", "mean of positions")
        add(choice, _plain(choice, s))
    if d.n * math.prod(s) > OUTPUTS and len(s) > 1:
        add("flat", _plain("flat", s))
    if (len(s) < 3 and d.chance(0.75)) or d.n * math.prod(s) > OUTPUTS:
        add("linear", linear(d, s, d.size(1, 4)))
    if len(s) == 1 and s[0] == 1 and d.chance(0.5):
        add(choice := d.pick("number", "squeezed"), _plain(choice, s))
    return names, parts


def raw_body(d: Draw, hostile: bool) -> Body:
    """A pure function of a parameter tree."""
    s, integers = _start(d)
    x = d.ints(12, d.n, *s) if integers else d.normal(d.n, *s)
    names: list[str] = []
    parts: list[Piece] = []

    def add(table: dict[str, Maker]) -> None:
        nonlocal s
        name, one = fitting(d, table, s)
        if not set(one.extras) & {key for part in parts for key in part.extras}:
            s = one.shape
            names.append(name)
            parts.append(one)

    if integers:
        add(READERS)
    count = d.size(0, 2) if hostile else d.size(1, 3)
    place = d.size(0, count) if hostile and d.chance(0.8) else None
    for k in range(count + 1):
        if place == k:
            if len(s) == 3:
                parts.append(_plain("flat", s))
                s = parts[-1].shape
            add(HOSTILE)
        if k < count:
            add(HARMLESS)
            if d.chance(0.6):
                add(ACTIVATIONS)
    above, tail = head(d, s)
    parts += tail
    wrapper = d.pick(*WRAPPERS) if hostile and (place is None or d.chance(0.05)) else None
    return _raw(d, names + above, parts, x, wrapper)


def _raw(d: Draw, names: list[str], parts: list[Piece], x: Tensor, wrapper: str | None) -> Body:
    style = STYLES[d.pick(*STYLES)]
    extras = {k: v for part in parts for k, v in part.extras.items()}
    boxed = bool(extras) or d.chance(0.1)
    kind = d.pick(*CONTAINERS) if boxed else ""
    box = CONTAINERS[kind] if boxed else TENSOR
    keys = list(extras)

    def fn(params: Any, inputs: Any) -> Tensor:
        y, more = box.open(inputs, keys)
        opened = style.open(params)
        for part, own in zip(parts, opened + [{}] * (len(parts) - len(opened)), strict=True):
            y = part.apply(own, y, more)
        return y

    traits = frozenset().union(*(part.traits for part in parts))
    whole = frozenset().union(*(part.whole for part in parts))
    run: Fn = fn
    if wrapper is not None:
        run, traits = WRAPPERS[wrapper].wrap(fn, d), traits | WRAPPERS[wrapper].traits
    names = names + ([f"inputs: {kind}"] if boxed else []) + ([wrapper] if wrapper else [])
    params = style.pack([part.params for part in parts])
    if not any(part.params for part in parts):
        raise NoParameters

    def at(dtype: torch.dtype) -> tuple[Fn, Fn, Any]:
        return run, run, mapped(params, lambda w: cast(w, dtype))

    return Body(names, at, parts[-1].shape, x, extras, box, whole, traits)


class NoParameters(Exception):
    """A model without parameters was drawn; the next draw has some."""


def module_body(d: Draw, hostile: bool) -> Body:
    """An nn.Module for `make_functional`; the same module by torch's functional_call for torch."""
    s, integers = _start(d)
    x = d.ints(5, d.n, *s) if integers else d.normal(d.n, *s)
    names: list[str] = []
    parts: list[nn.Module] = []

    def add(table: dict[str, Row]) -> None:
        nonlocal s
        rows = {name: row.often for name, row in table.items() if len(s) in row.ranks}
        name = d.weighted(rows)
        found = made(d, table[name], s, not parts and integers)
        if found is not None:
            names.append(name)
            parts.append(found[0])
            s = found[1]

    while integers and not parts:
        add(MODULE_READERS)
    for _ in range(d.size(1, 3)):
        add(MODULES)
    if hostile and len(s) in (1, 2, 3):
        add(HOSTILE_MODULES)
    if len(s) > 1 and (d.n * math.prod(s) > OUTPUTS or d.chance(0.5)):
        parts.append(nn.Flatten())
        s = (math.prod(s),)
    if d.n * math.prod(s) > OUTPUTS or d.chance(0.6):
        out = d.size()
        parts.append(scaled(d, nn.Linear(s[len(s) - 1], out).double()))
        s = (*s[:-1], out)
    flat = len(s) == 1 and s[0] == 1 and d.chance(0.5)
    net = Net(parts, flat)
    s = s[:-1] if flat else s
    names += _frozen(d, net)
    if not any(leaf.requires_grad for leaf in net.parameters()):
        raise NoParameters

    def at(dtype: torch.dtype) -> tuple[Fn, Fn, Any]:
        own, other = copy.deepcopy(net).to(dtype), copy.deepcopy(net).to(dtype)
        fn, params = kf.make_functional(own)
        buffers = dict(other.named_buffers())

        def plain(params: Any, inputs: Tensor) -> Tensor:
            return torch.func.functional_call(other, (params, {k: v.clone() for k, v in buffers.items()}), (inputs,))

        return fn, plain, params

    traits = frozenset({"random"} if RANDOM & set(names) else ()) | (
        {"mixing"} if "nn batch norm in training" in names else frozenset()
    )
    return Body(names, at, s, x, {}, TENSOR, frozenset(), traits)


def _frozen(d: Draw, net: nn.Module) -> list[str]:
    """Freeze some leaves, as fine-tuning does."""
    if not d.chance(0.2):
        return []
    leaves = list(net.parameters())
    for leaf in leaves[1:]:
        leaf.requires_grad_(not d.chance(0.5))
    return ["frozen leaves"]
