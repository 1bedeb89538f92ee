"""What people say about the batches of a model by `kf.batched`: inputs without examples, outputs in a tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from tests.fuzz.bodies import Body, Fn
from tests.fuzz.draw import Draw


class Logits(NamedTuple):
    """The outputs of a model of the transformers library."""

    loss: None
    logits: Tensor


_OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "dict": (lambda z: {"features": 2 * z, "logits": z}, "logits"),
    "tuple": (lambda z: (z, z.detach()), 0),
    "NamedTuple": (lambda z: Logits(None, z), "logits"),
    "by a function": (lambda z: [z, None], lambda found: found[0]),
}


def described(d: Draw, body: Body) -> tuple[list[str], Callable[[Fn, Any, list[Tensor]], Fn]]:
    """Names, and (fn, inputs, further inputs without examples) -> fn for the library."""
    shared = bool(body.whole) and d.chance(0.5)
    whole = "mixing" in body.traits and not shared and d.chance(0.15)
    kind = d.pick(*_OUTPUTS) if d.chance(0.07) else ""
    said = not kind or d.chance(0.8)
    names = ["inputs said to be shared"] if shared else ["said to be whole"] if whole else []
    names += [f"outputs: {kind}" + ("" if said else ", not said")] if kind else []

    def describe(fn: Fn, inputs: Any, lone: list[Tensor]) -> Fn:
        options: dict[str, Any] = {"whole": True} if whole else {}
        if shared:
            paths = _tree.unique_paths(inputs)
            options["shared"] = [path for path, leaf in paths.items() if any(leaf is one for one in lone)]
        if not kind:
            return kf.batched(fn, **options) if options else fn
        change, output = _OUTPUTS[kind]
        return kf.batched(lambda p, x: change(fn(p, x)), output=output if said else None, **options)

    return names, describe
