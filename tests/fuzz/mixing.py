"""Pieces that mix or reorder the examples, and wrappers of a whole model that do, or that hide it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from tests.fuzz.draw import Draw, Maker, Params, Piece, Shape

MIXES = frozenset({"mixing"})


def _around(before: Callable[[Tensor], Any], after: Callable[[Tensor, Any], Tensor]) -> Callable[[Draw, Shape], Piece]:
    """A linear layer whose rows were moved by `before` -> (rows, how), and perhaps moved back by `after`."""

    def make(d: Draw, s: Shape) -> Piece:
        o, back = d.size(), d.chance(0.5)

        def apply(p: Params, x: Tensor, e: dict) -> Tensor:
            rows, how = before(x)
            y = F.linear(rows, p["w"], p["b"]).tanh()
            return after(y, how) if back else y

        return Piece({"w": d.weight(o, s[-1]), "b": d.normal(o)}, apply, (*s[:-1], o), traits=MIXES)

    return make


def _sorted(x: Tensor) -> tuple[Tensor, Tensor]:
    order = x.detach().flatten(1).sum(1).argsort()
    return x[order], order.argsort()


def _rolled(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.roll(1, 0), torch.arange(len(x)).roll(-1)


def _flipped(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.flip(0), torch.arange(len(x)).flip(0)


def _evens_first(x: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.cat([torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)])
    return x[order], order.argsort()


def _pick(y: Tensor, how: Tensor) -> Tensor:
    return y[how]


def _through(mix: Callable[[Tensor], Tensor]) -> Callable[[Draw, Shape], Piece]:
    """A linear layer, then a mixing of its examples."""

    def make(d: Draw, s: Shape) -> Piece:
        o = d.size()
        params = {"w": d.weight(o, s[-1])} | d.bias(o)
        return Piece(params, lambda p, x, e: mix(F.linear(x, p["w"], p.get("b"))), (*s[:-1], o), traits=MIXES)

    return make


def _interleaved(d: Draw, s: Shape) -> Piece:
    """Positions first, then examples, as time-major code flattens them."""
    o = d.size()

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        flat = x.transpose(0, 1).reshape(-1, x.shape[-1])
        y = F.linear(flat, p["w"], p["b"]).tanh()
        return y.reshape(x.shape[1], x.shape[0], o).transpose(0, 1)

    return Piece({"w": d.weight(o, s[-1]), "b": d.normal(o)}, apply, (s[0], o))


def _time_major(d: Draw, s: Shape) -> Piece:
    """[T, N, d] inside, not flattened."""
    piece = _interleaved(d, s)
    return piece._replace(apply=lambda p, x, e: F.linear(x.transpose(0, 1), p["w"], p["b"]).tanh().transpose(0, 1))


def _two_views(d: Draw, s: Shape) -> Piece:
    """Both views of every example in one batch of 2N rows."""
    o, together = d.size(), d.chance(0.5)

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        if together:
            one, two = F.linear(torch.cat([x, x.tanh()]), p["w"], p["b"]).tanh().chunk(2)
            return one * two
        return F.linear(x.repeat_interleave(2, 0), p["w"], p["b"]).tanh().unflatten(0, (-1, 2)).prod(1)

    return Piece({"w": d.weight(o, s[-1]), "b": d.normal(o)}, apply, (*s[:-1], o))


def _contrastive(x: Tensor) -> Tensor:
    z = F.normalize(x.flatten(1), dim=-1, eps=1e-2)
    return ((z @ z.mT).softmax(-1) @ x.flatten(1)).reshape(x.shape)


def _trained_norm(d: Draw, s: Shape) -> Piece:
    params = {"w": 1 + d.normal(s[0]), "b": d.normal(s[0])}
    return Piece(params, lambda p, x, e: F.batch_norm(x, None, None, p["w"], p["b"], True), s, traits=MIXES)


def _neighbours(d: Draw, s: Shape) -> Piece:
    """A graph net: every node reads another one, whose number is among the inputs."""
    o, sources = d.size(), d.permutation(d.n)
    apply = lambda p, x, e: F.linear(x, p["w"]) + F.linear(x[e["edges"] % len(x)], p["v"])  # noqa: E731
    params = {"w": d.weight(o, s[-1]), "v": d.weight(o, s[-1])}
    return Piece(params, apply, (*s[:-1], o), {"edges": sources}, traits=MIXES)


MIXING: dict[str, Maker] = {
    "sorted": Maker(_around(_sorted, _pick), (1, 2), 1.5),
    "flipped": Maker(_around(_flipped, _pick), (1, 2)),
    "rolled": Maker(_around(_rolled, _pick), (1, 2)),
    "evens first": Maker(_around(_evens_first, _pick), (1, 2)),
    "centred": Maker(_through(lambda h: h - h.mean(0)), (1, 2)),
    "softmax over the batch": Maker(_through(lambda h: h.softmax(0)), (1, 2)),
    "sum over the batch": Maker(_through(lambda h: h + h.sum(0, keepdim=True)), (1, 2)),
    "cumsum over the batch": Maker(_through(lambda h: h.cumsum(0)), (1, 2), 0.5),
    "scaled by the batch": Maker(_through(lambda h: h / h.detach().abs().max()), (1, 2)),
    "scaled by N": Maker(_through(lambda h: h / len(h)), (1, 2), 0.5),
    "contrastive": Maker(_through(_contrastive), (1, 2)),
    "first example read": Maker(_through(lambda h: h + 0.5 * h[:1]), (1, 2)),
    "batch norm in training": Maker(_trained_norm, (1, 2, 3), 1.5),
    "neighbours": Maker(_neighbours, (1, 2)),
    "interleaved rows": Maker(_interleaved, (2,), 1.5),
    "time-major": Maker(_time_major, (2,)),
    "two views": Maker(_two_views, (1, 2)),
}


# ------------------------------------------------------------------------------------------- whole models


Model = Callable[[Any, Any], Tensor]


class Wrapper(NamedTuple):
    """fn -> fn. `traits` as those of a piece."""

    wrap: Callable[[Model, Draw], Model]
    traits: frozenset[str] = frozenset()


def _first(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(inputs) if isinstance(inputs, Tensor) else inputs


def _mapped(fn: Model, d: Draw) -> Model:
    def run(p: Any, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            return fn(p, x)
        return vmap(lambda one: fn(p, one[None])[0], randomness="different")(x)

    return run


def _autocast(fn: Model, d: Draw) -> Model:
    def run(p: Any, x: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fn(p, x)

    return run


def _no_grad_target(fn: Model, d: Draw) -> Model:
    def run(p: Any, x: Any) -> Tensor:
        with torch.no_grad():
            target = fn(p, x)
        return fn(p, x) + 0.5 * target

    return run


def _by_parts(fn: Model, d: Draw) -> Model:
    def run(p: Any, x: Any) -> Tensor:
        if not isinstance(x, Tensor) or len(x) < 2:
            return fn(p, x)
        return torch.cat([fn(p, x[:1]), fn(p, x[1:])])

    return run


def _penalised(fn: Model, d: Draw) -> Model:
    """The outputs and the slope of the model along its inputs."""

    def run(p: Any, x: Any) -> Tensor:
        z = fn(p, x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return z
        slope = grad(lambda y: fn(p, y).sum())(x).flatten(1).sum(1)
        return z + slope.reshape(-1, *[1] * (z.ndim - 1))

    return run


def _counted(fn: Model, d: Draw) -> Model:
    """A model that is another one at its first call."""
    calls: list[int] = []

    def run(p: Any, x: Any) -> Tensor:
        calls.append(1)
        return fn(p, x)

    return run


class _Holder(nn.Module):
    def __init__(self, fn: Model):
        super().__init__()
        self.fn = fn

    def forward(self, p: Any, x: Any) -> Tensor:
        return self.fn(p, x)


WRAPPERS: dict[str, Wrapper] = {
    "model under vmap": Wrapper(_mapped),
    "model checkpointed": Wrapper(lambda fn, d: lambda p, x: checkpoint(fn, p, x, use_reentrant=False)),
    "model under autocast": Wrapper(_autocast, frozenset({"rough"})),
    "model and its frozen self": Wrapper(_no_grad_target),
    "model by parts": Wrapper(_by_parts),
    "model and its slope": Wrapper(_penalised),
    "model counts its calls": Wrapper(_counted),
    "model in a module": Wrapper(lambda fn, d: _Holder(fn)),
    "inputs flipped": Wrapper(lambda fn, d: lambda p, x: fn(p, _first(x, lambda t: t.flip(0))), MIXES),
    "outputs flipped": Wrapper(lambda fn, d: lambda p, x: fn(p, x).flip(0), MIXES),
    "flipped twice": Wrapper(lambda fn, d: lambda p, x: fn(p, _first(x, lambda t: t.flip(0))).flip(0)),
    "outputs centred": Wrapper(lambda fn, d: lambda p, x: (lambda z: z - z.mean(0))(fn(p, x)), MIXES),
    "outputs detached by half": Wrapper(lambda fn, d: lambda p, x: (lambda z: 0.5 * z + 0.5 * z.detach())(fn(p, x))),
    "parameters detached": Wrapper(lambda fn, d: lambda p, x: fn(_detached(p), x) + fn(p, x)),
    "parameters cast": Wrapper(lambda fn, d: lambda p, x: fn(_mapped_leaves(p, lambda w: w.to(w.dtype).clone()), x)),
}


def _mapped_leaves(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped_leaves(value, change) for key, value in tree.items()}
    return type(tree)(_mapped_leaves(value, change) for value in tree)


def _detached(tree: Any) -> Any:
    return _mapped_leaves(tree, torch.Tensor.detach)
