"""Layers whose weight is seen through views, casts, copies and functions of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.draw import Draw, Maker, Piece, Shape

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, w [o, i], b [o]) -> what comes out."""


def layer(d: Draw, s: Shape, run: Layer) -> Piece:
    """A piece x ↦ run(x, w, b) with a linear layer's parameters."""
    o = d.size()
    params = {"w": d.weight(o, s[-1]), "b": d.normal(o)}
    return Piece(params, lambda p, x, e: run(x, p["w"], p["b"]), (*s[:-1], o))


def layers(run: Layer, ranks: tuple[int, ...] = (1, 2), often: float = 1.0) -> Maker:
    """Such pieces of any width."""
    return Maker(lambda d, s: layer(d, s, run), ranks, often)


class Straight(torch.autograd.Function):
    """Rounding whose gradient is the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as_strided": lambda w: w.as_strided(w.shape, w.stride()),
    "strided slice": lambda w: torch.cat([w[:, ::2], w[:, 1::2]], 1)[:, : w.shape[1]],
    "index": lambda w: w[torch.arange(len(w) - 1, -1, -1)],
    "tril": lambda w: w.tril(),
    "norm": lambda w: w / w.norm(),
    "python norm": lambda w: w / float(w.detach().norm()),
    "standardised": lambda w: (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True, correction=0) + 1e-2).sqrt(),
    "rounded": lambda w: Straight.apply(w),
    "stopped and added": lambda w: w.detach() + 0.5 * (w - w.detach()),
    ".data": lambda w: w.data,
    "detached": lambda w: w.detach(),
    ".float() and back": lambda w: w.float().to(w.dtype),
    ".double()": lambda w: w.double().to(w.dtype),
    "type_as": lambda w: w.type_as(w),
    "to": lambda w: w.to(w.device).to(w.dtype, copy=True),
    "clone": lambda w: w.clone().contiguous(),
    "copied": lambda w: copy.copy(w),
    "expanded": lambda w: w.expand(2, *w.shape)[1],
    "stacked": lambda w: torch.stack([w, w])[0],
    "where": lambda w: torch.where(w > 0, w, 0.5 * w),
    "view": lambda w: w.reshape(-1).view(w.shape),
    "flip twice": lambda w: w.flip(0).flip(0),
    "view_as": lambda w: w.view_as(w),
    "in place": lambda w: w.clone().mul_(2),
    "exp": lambda w: w.exp() * 0.3,
    "real": lambda w: torch.view_as_real(torch.complex(w, w))[..., 0],
}  # fmt: skip


def _clothed(change: Callable[[Tensor], Tensor]) -> Maker:
    return layers(lambda x, w, b: F.linear(x, change(w), b), often=0.25)


CLOTHES: dict[str, Maker] = {f"weight {name}": _clothed(change) for name, change in _CHANGES.items()}
