"""Pieces that convolve, normalise, attend, look up and reshape."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.draw import Draw, Maker, Params, Piece, Shape, like, simple

CONVS = {1: F.conv1d, 2: F.conv2d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d}


def _shape(run: Callable[[Tensor], Tensor], s: Shape) -> Shape | None:
    """The shape that comes out for one example, None where torch refuses or nothing is left."""
    try:
        out = tuple(run(torch.zeros(1, *s, dtype=torch.float64)).shape[1:])
    except RuntimeError:
        return None
    return out if 0 < math.prod(out) <= 60 else None


def conv(d: Draw, s: Shape) -> Piece | None:
    dims, groups = len(s) - 1, d.pick(1, 1, 1, s[0])
    out = groups * d.size(1, 2) if groups > 1 else d.size(1, 3)
    kernel = tuple(d.size(1, min(3, n)) for n in s[1:])
    options = {"stride": d.size(1, 2), "dilation": d.size(1, 2), "groups": groups, "padding": d.pick(0, 1, "valid")}
    if d.chance(0.15):
        options |= {"stride": 1, "padding": "same"}
    mode = d.pick(None, None, None, "reflect", "circular", "replicate")
    options["padding"] = 0 if mode else options["padding"]
    params = {"w": d.weight(out, s[0] // groups, *kernel)} | d.bias(out)

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        x = F.pad(x, (1, 1) * dims, mode=mode) if mode else x
        return CONVS[dims](x, p["w"], p.get("b"), **options)

    shape = _shape(lambda x: apply(params, x, {}), s)
    return None if shape is None else Piece(params, apply, shape)


def conv_transposed(d: Draw, s: Shape) -> Piece | None:
    dims, groups = len(s) - 1, d.pick(1, 1, s[0])
    kernel = tuple(d.size(1, 3) for _ in s[1:])
    per, stride = d.size(1, 2), d.size(1, 2)
    options = {"stride": stride, "groups": groups, "padding": d.size(0, 1), "dilation": d.size(1, 2)}
    options["output_padding"] = d.size(0, 1) if stride == 2 else 0
    params = {"w": d.weight(s[0], per, *kernel)} | d.bias(per * groups)

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        return TRANSPOSED[dims](x, p["w"], p.get("b"), **options)

    shape = _shape(lambda x: apply(params, x, {}), s)
    return None if shape is None else Piece(params, apply, shape)


def unfolded(d: Draw, s: Shape) -> Piece | None:
    """A convolution by hand: im2col, then a matrix product."""
    kernel, out = tuple(min(2, n) for n in s[1:]), d.size(1, 3)
    w = d.weight(out, s[0] * math.prod(kernel))
    size = tuple(n - k + 1 for n, k in zip(s[1:], kernel, strict=True))
    return Piece({"w": w}, lambda p, x, e: (p["w"] @ F.unfold(x, kernel)).unflatten(-1, size), (out, *size))


def affine(d: Draw, size: int) -> Params:
    return d.pick(
        {"w": 1 + 0.5 * d.normal(size), "b": d.normal(size)}, {"w": 1 + 0.5 * d.normal(size)}, {"b": d.normal(size)}
    )


def layer_norm(d: Draw, s: Shape) -> Piece:
    last = s[-1:] if d.chance(0.7) else s
    params = {k: v.reshape(last) for k, v in affine(d, math.prod(last)).items()}
    return Piece(params, lambda p, x, e: F.layer_norm(x, last, p.get("w"), p.get("b")), s)


def rms_norm(d: Draw, s: Shape) -> Piece:
    return Piece({"w": 1 + d.normal(s[-1])}, lambda p, x, e: F.rms_norm(x, s[-1:], p["w"], 1e-5), s)


def group_norm(d: Draw, s: Shape) -> Piece:
    groups, params = d.pick(1, s[0]), affine(d, s[0])
    params.setdefault("w", 1 + d.normal(s[0]))  # torch.func fails on a bias alone
    return Piece(params, lambda p, x, e: F.group_norm(x, groups, p.get("w"), p.get("b")), s)


def batch_norm(d: Draw, s: Shape) -> Piece:
    mean, var = d.normal(s[0]), d.uniform(s[0]) + 0.3

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        return F.batch_norm(x, like(mean, x), like(var, x), p.get("w"), p.get("b"))

    return Piece(affine(d, s[0]), apply, s)


def instance_norm(d: Draw, s: Shape) -> Piece | None:
    if math.prod(s[1:]) < 2:
        return None
    params = {"w": 1 + d.normal(s[0]), "b": d.normal(s[0])}
    return Piece(params, lambda p, x, e: F.instance_norm(x, weight=p["w"], bias=p["b"]), s)


def attention(d: Draw, s: Shape) -> Piece:
    """Attention written out, or torch's; perhaps causal, perhaps with a mask [T, T] or a padding mask among the
    inputs.
    """
    t, width = s
    heads, own = d.size(1, 2), d.size(1, 2)
    params = {k: d.weight(heads * own, width) for k in "qkv"} | {"out": d.weight(width, heads * own)}
    masked, fused = d.pick("", "", "causal", "mask", "padding"), d.chance(0.5)
    causal = torch.ones(t, t).tril().bool()
    padding = torch.ones(d.n, t, dtype=torch.bool)
    padding[:, 1:] = d.uniform(d.n, t - 1) > 0.4
    extras = {"mask": {"mask": d.normal(t, t).where(causal, -1e4)}, "padding": {"padding": padding}}.get(masked, {})

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        q, k, v = (F.linear(x, p[c]).unflatten(-1, (heads, own)).transpose(1, 2) for c in "qkv")
        mask = {"causal": causal, "mask": e.get("mask")}.get(masked)
        mask = e["padding"][:, None, None] if masked == "padding" else mask
        mask = like(mask, x) if mask is not None else None
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.mT * own**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e4) if mask.dtype == torch.bool else scores + mask
            y = scores.softmax(-1) @ v
        return x + F.linear(y.transpose(1, 2).flatten(2), p["out"])

    return Piece(params, apply, s, extras, frozenset({"mask"} & set(extras)))


def table(d: Draw, s: Shape) -> Piece:
    """A table among the inputs that all examples read, often as long as the batch."""
    rows = d.pick(d.n, d.size())
    o, extras = d.size(), {"a_table": d.normal(rows, s[-1])}
    apply = lambda p, x, e: F.linear(x, p["w"]) + F.linear(like(e["a_table"], x), p["w"]).mean(0)  # noqa: E731
    if d.chance(0.5):
        return Piece({"w": d.weight(o, s[-1])}, apply, (*s[:-1], o), extras, frozenset(extras))
    return Piece({}, lambda p, x, e: x @ like(e["a_table"], x).T, (*s[:-1], rows), extras, frozenset(extras))


def temperature(d: Draw, s: Shape) -> Piece:
    """A number among the inputs."""
    return Piece({}, lambda p, x, e: x / like(e["heat"], x), s, {"heat": d.uniform() + 0.5}, frozenset({"heat"}))


def conditioned(d: Draw, s: Shape) -> Piece:
    """A second input with examples, wide or one number each."""
    width = d.pick(0, d.size())
    second = d.normal(d.n, width) if width else d.normal(d.n)
    w = d.weight(s[-1], max(1, width))

    def apply(p: Params, x: Tensor, e: dict) -> Tensor:
        y = F.linear(like(e["second"], x).reshape(len(x), -1), p["w"])
        return x + (y if x.ndim == 2 else y[:, None])

    return Piece({"w": w}, apply, s, {"second": second})


def positions(d: Draw, s: Shape) -> Piece:
    """A position embedding of arange(T)."""
    padding = d.pick(None, 0)
    apply = lambda p, x, e: x + F.embedding(torch.arange(s[0]), p["w"], padding)  # noqa: E731
    return Piece({"w": d.normal(s[0] + d.size(0, 2), s[1])}, apply, s)


_RESHAPES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "flatten": ((2, 3), lambda x: x.flatten(1)),
    "view": ((2, 3), lambda x: x.reshape(len(x), -1)),
    "transpose": ((2, 3), lambda x: x.transpose(1, 2)),
    "permute": ((3,), lambda x: x.permute(0, 2, 3, 1)),
    "mean": ((2,), lambda x: x.mean(1)),
    "max": ((2,), lambda x: x.amax(1)),
    "first": ((2,), lambda x: x[:, 0]),
    "pool": ((3,), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "squeezed and back": ((1, 2), lambda x: x.squeeze(-1).reshape(x.shape)),
    "unsqueeze": ((1, 2), lambda x: x.unsqueeze(1)),
    "unsqueeze last": ((1, 2), lambda x: x.unsqueeze(-1)),
    "fold positions": ((2,), lambda x: x.reshape(-1, x.shape[-1]).tanh().reshape(x.shape)),
    "cumsum": ((2,), lambda x: x.cumsum(1)),
    "features rolled": ((1, 2), lambda x: x.roll(1, -1)),
    "upsampled": ((3,), lambda x: F.interpolate(x, scale_factor=2, mode="nearest")[..., :3, :3]),
    "masked fill": ((1, 2), lambda x: x.masked_fill(x < -1, 0.1)),
    "where": ((1, 2), lambda x: torch.where(x > 0, x, 0.2 * x)),
    "normalised": ((1, 2), lambda x: F.normalize(x, dim=-1, eps=1e-2)),
    "softmax": ((1, 2), lambda x: x.softmax(-1)),
}


def reshape(name: str) -> Maker:
    ranks, run = _RESHAPES[name]

    def make(d: Draw, s: Shape) -> Piece | None:
        shape = _shape(run, s)
        return None if shape is None or len(shape) > 3 else Piece({}, lambda p, x, e: run(x), shape)

    return Maker(make, ranks, 0.3)


def dropout(d: Draw, s: Shape) -> Piece:
    rate = d.pick(0.2, 0.5)
    return Piece({}, lambda p, x, e: F.dropout(x, rate), s, traits=frozenset({"random"}))


ACTIVATIONS: dict[str, Maker] = {
    name: Maker(simple(fn), (1, 2, 3), 0.7)
    for name, fn in {
        "tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "softplus": F.softplus, "sigmoid": torch.sigmoid,
        "silu": F.silu, "sin": torch.sin,
    }.items()
}  # fmt: skip

MAPS: dict[str, Maker] = {
    "conv": Maker(conv, (2, 3), 3.0),
    "conv transposed": Maker(conv_transposed, (2, 3), 1.5),
    "conv by unfold": Maker(unfolded, (3,), 0.4),
    "layer norm": Maker(layer_norm, (1, 2, 3)),
    "rms norm": Maker(rms_norm, (1, 2), 0.7),
    "group norm": Maker(group_norm, (1, 2, 3)),
    "batch norm eval": Maker(batch_norm, (1, 2, 3)),
    "instance norm": Maker(instance_norm, (2, 3), 0.4),
    "attention": Maker(attention, (2,), 2.0),
    "table among the inputs": Maker(table, (1, 2), 0.7),
    "number among the inputs": Maker(temperature, (1, 2), 0.4),
    "second input": Maker(conditioned, (1, 2), 0.7),
    "positions": Maker(positions, (2,)),
    **{name: reshape(name) for name in _RESHAPES},
    "dropout": Maker(dropout, (1, 2), 0.3),
}


# ------------------------------------------------------------------------- what reads integers: ids [N, *s]


def embedding(d: Draw, s: Shape) -> Piece:
    v, width, padding = d.size(2, 5), d.size(), d.pick(None, None, 0, -1)
    return Piece({"w": d.normal(v, width)}, lambda p, x, e: F.embedding(x % v, p["w"], padding), (*s, width))


def indexed(d: Draw, s: Shape) -> Piece:
    v, width = d.size(2, 5), d.size()
    return Piece({"w": d.normal(v, width)}, lambda p, x, e: p["w"][x % v], (*s, width))


def one_hot(d: Draw, s: Shape) -> Piece:
    v, width = d.size(2, 5), d.size()
    apply = lambda p, x, e: F.one_hot(x % v, v).to(p["w"].dtype) @ p["w"]  # noqa: E731
    return Piece({"w": d.normal(v, width)}, apply, (*s, width))


def bag(d: Draw, s: Shape) -> Piece:
    v, width, mode = d.size(2, 5), d.size(), d.pick("sum", "mean")
    return Piece({"w": d.normal(v, width)}, lambda p, x, e: F.embedding_bag(x % v, p["w"], mode=mode), (width,))


READERS: dict[str, Maker] = {
    "embedding": Maker(embedding, (0, 1, 2), 4.0),
    "embedding by index": Maker(indexed, (0, 1, 2), 0.5),
    "embedding by one-hot": Maker(one_hot, (0, 1, 2), 0.5),
    "embedding bag": Maker(bag, (1,), 0.5),
}
