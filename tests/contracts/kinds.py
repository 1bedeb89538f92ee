"""The table of layer kinds and options: a row is a layer on known inputs, and the form of each block written anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf

N = 4  # examples
Columns = Callable[[Tensor], Tensor]


class Form(NamedTuple):
    """The matrix of a block, written down independently: its weight leaf (reshaped by `matrix`), then its bias."""

    weight: str | None = "weight"
    bias: str | None = None
    matrix: Columns = lambda w: w
    groups: int = 1

    def of(self, leaves: dict[str, Tensor]) -> Tensor:
        parts = [] if self.weight is None else [self.matrix(leaves[self.weight])]
        if self.bias is not None:
            b = leaves[self.bias]
            parts.append(b.reshape(self.groups, -1, 1) if self.groups > 1 else b.reshape(-1, 1))
        return torch.cat(parts, dim=-1)


class Flat(NamedTuple):
    """The vector of a block without a matrix: its leaves one after the other."""

    names: tuple[str, ...]

    def of(self, leaves: dict[str, Tensor]) -> Tensor:
        return torch.cat([leaves[name].flatten() for name in self.names])


class Row(NamedTuple):
    """A layer, its parameters and input, the form of each block; rows [K, (q), i] and [K, (q), o] of a single use."""

    layer: Callable[[dict[str, Tensor], Tensor], Tensor]
    params: dict[str, Tensor]
    x: Tensor
    forms: dict[str, Any]
    rows: Columns | None = None  # of x, without the homogeneous 1
    out_rows: Columns = lambda g: g.flatten(0, -2)
    shared: bool = False  # one use for all examples


def rand(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, dtype=torch.float64, generator=g)


def ints(*shape: int, high: int = 6) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: rand(*shape) + 0.1 * k for k, (name, shape) in enumerate(shapes.items())}


def last(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def turned(x: Tensor) -> Tensor:
    return last(x.mT)


# --------------------------------------------------------------------------------------- modules


def module(m: nn.Module, x: Tensor, form: Any, rows: Columns | None = None, **more: Any) -> Row:
    torch.manual_seed(0)
    fn, params = kf.make_functional(m.double())
    params = {k: rand(*v.shape) if v.ndim == 1 else v for k, v in params.items()}
    return Row(fn, params, x, {"weight": form}, rows, **more)


def linear(x: Tensor, bias: bool = True) -> Row:
    return module(nn.Linear(3, 5, bias=bias), x, Form(bias="bias" if bias else None), last)


def around(row: Row, before: Columns, after: Columns) -> Row:
    return row._replace(layer=lambda p, x: after(row.layer(p, before(x))))


def conv(m: Any, *size: int) -> Row:
    x, q = rand(N, m.in_channels, *size), m.groups
    i = m.in_channels * torch.Size(m.kernel_size).numel()
    options = {k: getattr(m, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    unit = type(m)(m.in_channels, i, bias=False, dtype=torch.float64, **options)
    unit.weight = nn.Parameter(torch.eye(i, dtype=torch.float64).reshape(unit.weight.shape))

    def split(t: Tensor) -> Tensor:
        found = last(t.movedim(1, -1))
        return found.unflatten(-1, (q, -1)) if q > 1 else found

    form = Form(
        bias="bias" if m.bias is not None else None,
        matrix=lambda w: w.reshape(q, w.shape[0] // q, -1) if q > 1 else w.flatten(1),
        groups=q,
    )
    return module(m, x, form, lambda x: split(unit(x).detach()), out_rows=split)


def embedding(shape: tuple[int, ...], **options: Any) -> Row:
    tokens = ints(*shape)
    kept = (tokens.flatten() != options.get("padding_idx", -1)).double().unsqueeze(-1)

    def rows(x: Tensor) -> Tensor:
        return F.one_hot(x.flatten(), 6) * kept

    form = Form(matrix=lambda w: w.T)
    row = module(nn.Embedding(6, 3, **options), tokens, form, rows, out_rows=lambda g: last(g) * kept)
    return row._replace(params={"weight": rand(6, 3)})


def norm(m: nn.Module, *size: int) -> Row:
    return module(m.eval(), rand(N, *size), Flat(tuple(dict(m.named_parameters()))))


def batch_norm() -> nn.Module:
    m = nn.BatchNorm1d(3)
    m.running_mean, m.running_var = torch.arange(3.0), torch.arange(1.0, 4.0)
    return m


# --------------------------------------------------------------------------------- raw tensors

T_: dict[str, Any] = {"matrix": lambda w: w.T}
X, XT = rand(N, 3), rand(N, 2, 3)
HEADS, GROUPS = rand(N, 2, 6), rand(N, 2, 3)


def raw(layer: Callable, x: Tensor, rows: Columns = last, *, w: Any = (3, 5), b: bool = False, **form: Any) -> Row:
    out_rows = form.pop("out_rows", last)
    params = tensors(w=w, b=(w[-1],)) if b else tensors(w=w)
    return Row(layer, params, x, {"w": Form("w", "b" if b else None, **form)}, rows, out_rows)


def several(layer: Callable, x: Tensor, forms: dict[str, Any], **shapes: tuple[int, ...]) -> Row:
    return Row(layer, tensors(**shapes), x, forms)


SQUARE = {"w": (3, 3), "b": (3,)}
ROWS = {
    "linear": linear(X),
    "linear without bias": linear(X, bias=False),
    "linear on [N, T, d]": linear(XT),
    "linear on [N, T, U, d]": linear(rand(N, 2, 2, 3), bias=False),
    "linear on [T, N, d]": around(linear(XT), lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "linear on [N·T, d]": around(linear(XT), lambda x: x.reshape(-1, 3), lambda y: y.reshape(-1, 2, 5)),
    "conv1d on [N·T, C, L]": around(
        conv(nn.Conv1d(2, 3, 3), 7)._replace(x=rand(N, 2, 2, 5), rows=None),
        lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (-1, 2)),
    ),
    "conv1d": conv(nn.Conv1d(2, 3, 3), 7),
    "conv1d stride, padding, dilation": conv(nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), 9),
    "conv1d same, even kernel": conv(nn.Conv1d(2, 3, 4, padding="same"), 6),
    "conv1d same, odd kernel, dilation": conv(nn.Conv1d(2, 3, 3, padding="same", dilation=2), 6),
    "conv1d reflect": conv(nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), 6),
    "conv2d": conv(nn.Conv2d(2, 3, (3, 2)), 5, 4),
    "conv2d without bias": conv(nn.Conv2d(2, 3, (3, 2), bias=False), 5, 4),
    "conv2d valid": conv(nn.Conv2d(2, 3, (1, 2), padding="valid"), 2, 4),
    "conv2d all": conv(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), 5, 6),
    "conv2d same, one even side": conv(nn.Conv2d(2, 3, (2, 3), padding="same"), 3, 4),
    "conv2d circular": conv(nn.Conv2d(2, 3, (3, 2), padding=(1, 2), padding_mode="circular"), 4, 5),
    "conv2d replicate": conv(nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="replicate"), 3, 4),
    "conv2d depthwise": conv(nn.Conv2d(4, 4, (2, 3), groups=4), 4, 5),
    "conv2d depthwise, two filters, no bias": conv(nn.Conv2d(3, 6, 2, groups=3, bias=False), 3, 4),
    "conv2d larger than the map": conv(nn.Conv2d(2, 3, 5, padding=2), 3, 2),
    "conv3d": conv(nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 1)), 3, 5, 2),
    "conv3d groups": conv(nn.Conv3d(2, 4, 2, groups=2, bias=False), 3, 2, 3),
    "embedding": embedding((N,)),
    "embedding on [N, T]": embedding((N, 3)),
    "embedding on [N, T, U]": embedding((N, 2, 2)),
    "embedding on [T, N]": around(embedding((N, 3)), lambda x: x.T, lambda y: y.transpose(0, 1)),
    "embedding with padding": embedding((N, 3), padding_idx=2),
    "layer_norm": norm(nn.LayerNorm(3), 3),
    "layer_norm on [N, T, d]": norm(nn.LayerNorm(3), 2, 3),
    "layer_norm on [T, N, d]": around(
        norm(nn.LayerNorm(3), 2, 3), lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)
    ),
    "layer_norm over two": norm(nn.LayerNorm([2, 3]), 2, 2, 3),
    "layer_norm without bias": norm(nn.LayerNorm(3, bias=False), 2, 3),
    "rms_norm": norm(nn.RMSNorm(3), 2, 3),
    "group_norm": norm(nn.GroupNorm(2, 4), 4, 3),
    "batch_norm, eval": norm(batch_norm(), 3),
    "batch_norm on maps, eval": norm(nn.BatchNorm2d(2), 2, 3, 2),
    "x @ W": raw(lambda p, x: x @ p["w"], XT, **T_),
    "x @ W.T": raw(lambda p, x: x @ p["w"].T, XT, w=(5, 3)),
    "x @ W.T.T": raw(lambda p, x: x @ p["w"].T.T, X, **T_),
    "x @ W.mT": raw(lambda p, x: x @ p["w"].mT, X, w=(5, 3)),
    "x @ W.transpose": raw(lambda p, x: x @ p["w"].transpose(-1, 0), X, w=(5, 3)),
    "x @ W.permute": raw(lambda p, x: x @ p["w"].permute(1, 0), X, w=(5, 3)),
    "x @ W.clone": raw(lambda p, x: x @ p["w"].clone(), X, **T_),
    "mm": raw(lambda p, x: torch.mm(x, p["w"]), X, **T_),
    "x.mm": raw(lambda p, x: x.mm(p["w"]), X, **T_),
    "matmul": raw(lambda p, x: torch.matmul(x, p["w"]), XT, **T_),
    "addmm": raw(lambda p, x: torch.addmm(p["b"], x, p["w"]), X, b=True, **T_),
    "F.linear": raw(lambda p, x: F.linear(x, p["w"]), XT, w=(5, 3)),
    "F.linear, W.T": raw(lambda p, x: F.linear(x, p["w"].T), X, **T_),
    "F.linear, keywords": raw(lambda p, x: F.linear(input=x, weight=p["w"], bias=None), X, w=(5, 3)),
    "x @ W + b": raw(lambda p, x: x @ p["w"] + p["b"], XT, b=True, **T_),
    "b + x @ W": raw(lambda p, x: p["b"] + x @ p["w"], XT, b=True, **T_),
    "torch.add(x @ W, b)": raw(lambda p, x: torch.add(x @ p["w"], p["b"]), X, b=True, **T_),
    "F.linear + b": raw(lambda p, x: F.linear(x, p["w"].T) + p["b"], X, b=True, **T_),
    "W @ x": raw(lambda p, x: (p["w"] @ x.T).T, X, w=(5, 3)),
    "W @ columns": raw(lambda p, x: p["w"] @ x, XT.mT, turned, w=(5, 3), out_rows=turned),
    "x @ w": raw(
        lambda p, x: x @ p["w"], X, w=(3,), matrix=lambda w: w.reshape(1, 3), out_rows=lambda g: g.reshape(-1, 1)
    ),
    "einsum": raw(lambda p, x: torch.einsum("nti,io->nto", x, p["w"]), XT, **T_),
    "einsum, weight first": raw(lambda p, x: torch.einsum("oi,ni->no", p["w"], x), X, w=(5, 3)),
    "einsum, ellipsis": raw(lambda p, x: torch.einsum("...i,oi->...o", x, p["w"]), XT, w=(5, 3)),
    "einsum + b": raw(lambda p, x: torch.einsum("nti,io->nto", x, p["w"]) + p["b"], XT, b=True, **T_),
    "einsum, heads": raw(
        lambda p, x: torch.einsum("btd,dhk->bthk", x, p["w"]),
        XT, w=(3, 2, 4), matrix=lambda w: w.reshape(3, 8).T, out_rows=lambda g: g.reshape(-1, 8),
    ),
    "einsum, heads summed": raw(
        lambda p, x: torch.einsum("bthk,hkd->btd", x.unflatten(-1, (2, 3)), p["w"]),
        HEADS, last, w=(2, 3, 5), matrix=lambda w: w.reshape(6, 5).T,
    ),
    "einsum, groups": raw(
        lambda p, x: torch.einsum("bhd,hdk->bhk", x, p["w"]),
        GROUPS, lambda x: x, w=(2, 3, 4), matrix=lambda w: w.mT, groups=2, out_rows=lambda g: g,
    ),
    "einsum, positions last": raw(
        lambda p, x: torch.einsum("bdt,dk->bkt", x, p["w"]), XT.mT, turned, out_rows=turned, **T_
    ),
    "einsum, list of operands": raw(lambda p, x: torch.einsum("nd,dk->nk", [x, p["w"]]), X, **T_),
    "einsum, numbered": raw(lambda p, x: torch.einsum(x, [0, 1], p["w"], [1, 2], [0, 2]), X, **T_),
    "einsum, outer": raw(
        lambda p, x: torch.einsum("nd,k->ndk", x, p["w"]),
        X, lambda x: x.reshape(-1, 1), w=(2,), matrix=lambda w: w[:, None],
    ),
    "einsum, scale": raw(
        lambda p, x: torch.einsum("nd,d->nd", x, p["w"]),
        X, lambda x: x[..., None], w=(3,), matrix=lambda w: w[:, None, None], groups=3, out_rows=lambda g: g[..., None],
    ),
    "matmul, groups": raw(
        lambda p, x: (x.transpose(0, 1) @ p["w"]).transpose(0, 1),
        GROUPS, lambda x: x, w=(2, 3, 4), matrix=lambda w: w.mT, groups=2, out_rows=lambda g: g,
    ),
    "position embedding": Row(
        lambda p, x: F.embedding(torch.arange(2), p["w"]) + x, tensors(w=(3, 5)), rand(N, 2, 5),
        {"w": Form("w", matrix=lambda w: w.T)}, lambda x: torch.eye(3, dtype=torch.float64)[:2], shared=True,
    ),
    "repeated linear": several(
        lambda p, x: F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["w"], p["b"]), X, {"w": Form("w", "b")}, **SQUARE
    ),
    "repeated, other positions": several(
        lambda p, x: F.linear(F.linear(x, p["w"]).sin().mean(1), p["w"]), XT, {"w": Form("w")}, w=(3, 3)
    ),
    "repeated, transposed": several(lambda p, x: (x @ p["w"]).sin() @ p["w"].T, X, {"w": Form("w", **T_)}, w=(3, 5)),
    "tied embedding and head": several(
        lambda p, x: F.linear(F.embedding(x, p["w"]).sin(), p["w"]), ints(N, 2), {"w": Form("w")}, w=(6, 3)
    ),
    "tied embedding and head with bias": several(
        lambda p, x: F.linear(F.embedding(x, p["w"], padding_idx=1).sin(), p["w"], p["b"]),
        ints(N, 2), {"w": Form("w"), "b": Form(None, "b")}, w=(6, 3), b=(6,),
    ),
    "one weight, two biases": several(
        lambda p, x: F.linear(F.linear(x, p["w"], p["b"]).sin(), p["w"], p["c"]),
        XT, {"w": Form("w"), "b": Form(None, "b"), "c": Form(None, "c")}, c=(3,), **SQUARE,
    ),
    "one bias, two weights": several(
        lambda p, x: F.linear(F.linear(x, p["w"], p["b"]).sin(), p["v"], p["b"]),
        X, {"w": Form("w"), "v": Form("v"), "b": Form(None, "b")}, v=(3, 3), **SQUARE,
    ),
}  # fmt: skip
