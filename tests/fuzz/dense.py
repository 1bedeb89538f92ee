"""Pieces made of matrices: linear layers in the forms that people write, ties, repeats, gains, recurrences."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.draw import Draw, Maker, Params, Piece, Shape

# name -> (the weight is stored [i, o], the product)
FORMS: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "F.linear": (False, F.linear),
    "x @ w": (True, lambda x, w: x @ w),
    "x @ w.T": (False, lambda x, w: x @ w.T),
    "matmul": (True, torch.matmul),
    "w @ x.mT": (False, lambda x, w: (w @ x.reshape(-1, x.shape[-1]).mT).mT.reshape(*x.shape[:-1], -1)),
    "F.linear, w.t()": (True, lambda x, w: F.linear(x, w.t())),
    "einsum": (False, lambda x, w: torch.einsum("...i,oi->...o", x, w)),
    "einsum, w first": (False, lambda x, w: torch.einsum("oi,n...i->n...o", w, x)),
    "tensordot": (True, lambda x, w: torch.tensordot(x, w, dims=1)),
    "inner": (False, torch.inner),
    "contiguous": (True, lambda x, w: x @ w.transpose(0, 1).contiguous().clone().mT),
    "matmul, flat": (True, lambda x, w: x.flatten(0, -2).matmul(w).unflatten(0, x.shape[:-1])),
    "bmm": (True, lambda x, w: torch.bmm(x.reshape(len(x), -1, x.shape[-1]), w.expand(len(x), -1, -1)).reshape(
        *x.shape[:-1], -1
    )),
    "sum": (True, lambda x, w: (x.unsqueeze(-1) * w).sum(-2)),
}  # fmt: skip


def dense(d: Draw, s: Shape, o: int | None = None) -> Piece:
    o = d.size() if o is None else o
    turned, product = FORMS[d.pick(*FORMS)]
    return _affine(d, s, o, turned, product)


def _affine(d: Draw, s: Shape, o: int, turned: bool, product: Callable[[Tensor, Tensor], Tensor]) -> Piece:
    w = d.weight(o, s[-1])
    params = {"w": w.mT.contiguous() if turned else w} | d.bias(o)
    adds = d.pick(lambda y, b: y + b, lambda y, b: b + y, lambda y, b: y.add(b), lambda y, b: torch.add(y, b, alpha=1))

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        y = product(x, p["w"])
        return adds(y, p["b"]) if "b" in p else y

    return Piece(params, apply, (*s[:-1], o))


def linear(d: Draw, s: Shape, o: int | None = None) -> Piece:
    o = d.size() if o is None else o
    apply = lambda p, x, e: F.linear(x, p["w"], p.get("b"))  # noqa: E731
    return Piece({"w": d.weight(o, s[-1])} | d.bias(o), apply, (*s[:-1], o))


def form(name: str) -> Maker:
    return Maker(lambda d, s: _affine(d, s, d.size(), *FORMS[name]), (1, 2, 3), 0.3)


def addmm(d: Draw, s: Shape) -> Piece:
    o = d.size()
    return Piece({"w": d.weight(s[0], o), "b": d.normal(o)}, lambda p, x, e: torch.addmm(p["b"], x, p["w"]), (o,))


_CUTS: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "chunk": lambda w, o: w.chunk(3),
    "split": lambda w, o: w.split(o),
    "slices": lambda w, o: (w[:o], w[o : 2 * o], w[2 * o :]),
    "narrow": lambda w, o: tuple(w.narrow(0, k * o, o) for k in range(3)),
    "unflatten": lambda w, o: tuple(w.unflatten(0, (3, o))),
    "view": lambda w, o: w.view(3, o, *w.shape[1:]).unbind(),
    "index": lambda w, o: tuple(w.reshape(3, o, *w.shape[1:])[k] for k in range(3)),
    "tensor_split": lambda w, o: w.tensor_split(3),
}


def packed(d: Draw, s: Shape) -> Piece:
    """One weight for three layers, cut before use, as the in_proj of attention; or the result is cut."""
    o, cut = d.size(), _CUTS[d.pick(*_CUTS)]
    after, bias = d.chance(0.3), d.chance(0.5)
    params = {"w": d.weight(3 * o, s[-1])} | ({"b": d.normal(3 * o)} if bias else {})

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        if after:
            q, k, v = F.linear(x, p["w"], p.get("b")).chunk(3, -1)
        else:
            b = cut(p["b"], o) if "b" in p else (None,) * 3
            q, k, v = (F.linear(x, w, one) for w, one in zip(cut(p["w"], o), b, strict=True))
        return torch.tanh(q) * k + v

    return Piece(params, apply, (*s[:-1], o))


def heads(d: Draw, s: Shape) -> Piece:
    """Einsum with a dimension for heads, there and back."""
    h, k, o = d.size(1, 3), d.size(1, 3), d.size()
    params = {"in": d.weight(s[-1], h, k) / s[-1] ** 0.5 * k, "out": d.weight(h, k, o)}
    bias = {"b": d.normal(h, k)} if d.chance(0.5) else {}

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        y = torch.einsum("n...d,dhk->n...hk", x, p["in"])
        y = y + p["b"] if "b" in p else y
        return torch.einsum("n...hk,hko->n...o", y.tanh(), p["out"])

    return Piece(params | bias, apply, (*s[:-1], o))


def tied(d: Draw, s: Shape) -> Piece:
    """There with W, back with its transpose."""
    h = d.size()
    back = d.pick(lambda y, w: y @ w, lambda y, w: F.linear(y, w.T), lambda y, w: F.linear(y, w.mT.contiguous()))
    params = {"w": d.weight(h, s[-1])} | d.bias(h)
    return Piece(params, lambda p, x, e: back(F.linear(x, p["w"], p.get("b")).tanh(), p["w"]), s)


def repeated(d: Draw, s: Shape) -> Piece:
    times, one = d.size(2, 3), linear(d, s, s[-1])

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        for _ in range(times):
            x = one.apply(p, x, e).tanh()
        return x

    return one._replace(apply=apply)


def residual(d: Draw, s: Shape) -> Piece:
    one = d.pick(linear, dense)(d, s, s[-1])
    scale = d.pick(1.0, 0.5)
    return one._replace(apply=lambda p, x, e: x + scale * one.apply(p, x, e).tanh())


def branches(d: Draw, s: Shape) -> Piece:
    """Two layers side by side, added or joined; sometimes with one bias for both."""
    o, joined, shared = d.size(), d.chance(0.4), d.chance(0.3)
    one, two = linear(d, s, o), dense(d, s, o)
    if shared:
        params = {"v": d.weight(o, s[-1]), "w": d.weight(o, s[-1]), "b": d.normal(o)}
        return Piece(params, lambda p, x, e: F.linear(x, p["v"], p["b"]) * F.linear(x, p["w"], p["b"]), (*s[:-1], o))

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        y, z = one.apply(p["one"], x, e), two.apply(p["two"], x, e)
        return torch.cat([y, z], -1) if joined else y + z.tanh()

    return Piece({"one": one.params, "two": two.params}, apply, (*s[:-1], 2 * o if joined else o))


def gated(d: Draw, s: Shape) -> Piece:
    one, two = linear(d, s, s[-1]), linear(d, s, s[-1])
    apply = lambda p, x, e: F.silu(one.apply(p["g"], x, e)) * two.apply(p["u"], x, e)  # noqa: E731
    return Piece({"g": one.params, "u": two.params}, apply, s)


def low_rank(d: Draw, s: Shape) -> Piece:
    """LoRA: a constant weight plus two thin layers, or their product."""
    o, r = d.size(), d.size(1, 2)
    base, product = d.weight(o, s[-1]), d.chance(0.3)

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        w = base.to(x.dtype)
        if product:
            return F.linear(x, w + p["up"] @ p["down"])
        return F.linear(x, w) + F.linear(F.linear(x, p["down"]), p["up"]) * 0.5

    return Piece({"down": d.weight(r, s[-1]), "up": d.weight(o, r)}, apply, (*s[:-1], o))


def bilinear(d: Draw, s: Shape) -> Piece:
    o = d.size()
    params = {"w": d.weight(o, s[-1], s[-1])} | d.bias(o)
    return Piece(params, lambda p, x, e: F.bilinear(x, x.tanh(), p["w"], p.get("b")), (*s[:-1], o))


_GAINS: dict[str, tuple[Callable[[Draw, Shape], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gain": (lambda d, s: 1 + d.normal(), lambda x, w: x * w),
    "exp(gain)": (lambda d, s: d.normal(), lambda x, w: x * w.exp()),
    "scale": (lambda d, s: 1 + d.normal(s[-1]), lambda x, w: x * w),
    "shift": (lambda d, s: d.normal(s[-1]), lambda x, w: x + w),
    "position": (lambda d, s: d.normal(*s), lambda x, w: x + w),
    "position, expanded": (lambda d, s: d.normal(1, *s), lambda x, w: x + w.expand(len(x), *w.shape[1:])),
    "prelu": (lambda d, s: d.normal(1) * 0.3, lambda x, w: F.prelu(x, w)),
    "rms by hand": (lambda d, s: 1 + d.normal(s[-1]), lambda x, w: w * x * (x**2 + 1e-3).mean(-1, True).rsqrt()),
    "addcmul": (lambda d, s: d.normal(s[-1]), lambda x, w: torch.addcmul(x, x, w)),
}  # fmt: skip


def gain(name: str) -> Maker:
    first, apply = _GAINS[name]
    return Maker(lambda d, s: Piece({"w": first(d, s)}, lambda p, x, e: apply(x, p["w"]), s), (1, 2), 0.35)


def lone_bias(d: Draw, s: Shape) -> Piece:
    """The weight is frozen, the bias trains."""
    o = d.size()
    w, add = d.weight(o, s[-1]), d.chance(0.5)

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        frozen = w.to(x.dtype)
        return F.linear(x, frozen) + p["b"] if add else F.linear(x, frozen, p["b"])

    return Piece({"b": d.normal(o)}, apply, (*s[:-1], o))


def lone_weight(d: Draw, s: Shape) -> Piece:
    """The bias is frozen, the weight trains."""
    o = d.size()
    b = d.normal(o)
    return Piece({"w": d.weight(o, s[-1])}, lambda p, x, e: F.linear(x, p["w"], b.to(x.dtype)), (*s[:-1], o))


def unread(d: Draw, s: Shape) -> Piece:
    """A parameter that the model never reads."""
    return Piece({"nobody": d.normal(d.size(), d.size())}, lambda p, x, e: x, s)


def class_token(d: Draw, s: Shape) -> Piece:
    apply = lambda p, x, e: torch.cat([p["w"].expand(len(x), 1, -1), x], 1)  # noqa: E731
    return Piece({"w": d.normal(s[-1])}, apply, (s[0] + 1, s[1]))


def recurrence(d: Draw, s: Shape) -> Piece:
    """A recurrent cell written out; every state, or the last."""
    h, every = d.size(), d.chance(0.5)
    params = {"in": d.weight(h, s[-1]), "hidden": d.weight(h, h)} | d.bias(h)

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        state, states = x.new_zeros(len(x), h), []
        for step in x.unbind(1):
            state = torch.tanh(F.linear(step, p["in"], p.get("b")) + state @ p["hidden"])
            states.append(state)
        return torch.stack(states, 1) if every else state

    return Piece(params, apply, (s[0], h) if every else (h,))


DENSE: dict[str, Maker] = {
    "linear": Maker(linear, (1, 2, 3), 3.0),
    **{f"linear by {name}": form(name) for name in FORMS},
    "addmm": Maker(addmm, (1,), 0.5),
    "packed": Maker(packed, (1, 2), 1.5),
    "heads": Maker(heads, (1, 2)),
    "tied": Maker(tied, (1, 2)),
    "repeated": Maker(repeated, (1, 2)),
    "residual": Maker(residual, (1, 2, 3)),
    "branches": Maker(branches, (1, 2)),
    "gated": Maker(gated, (1, 2), 0.6),
    "low rank": Maker(low_rank, (1, 2), 0.6),
    "bilinear": Maker(bilinear, (1, 2), 0.3),
    **{name: gain(name) for name in _GAINS},
    "lone bias": Maker(lone_bias, (1, 2), 0.5),
    "lone weight": Maker(lone_weight, (1, 2), 0.5),
    "unread": Maker(unread, (1, 2, 3), 0.4),
    "class token": Maker(class_token, (2,), 0.5),
    "recurrence": Maker(recurrence, (2,)),
}
