"""nn.Modules: one as a piece of a raw function, or a whole net for `make_functional`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.fuzz.draw import Draw, Maker, Params, Piece, Shape


class Last(nn.Module):
    """The output of a recurrent module, or the first of a tuple."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Itself(nn.Module):
    """Attention of x to itself, perhaps causal."""

    def __init__(self, width: int, heads: int, causal: bool, weights: bool, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **options)
        self.causal, self.weights = causal, weights

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        mask = torch.full((t, t), -1e4, dtype=x.dtype).triu(1) if self.causal else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=self.weights)[0]


class Residual(nn.Module):
    """x + f(x), f a layer that is used twice."""

    def __init__(self, inner: nn.Module, times: int):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.inner(x).tanh()
        return x


class Positions(nn.Module):
    """Learned positions, as a parameter or an embedding of a buffer of indices."""

    def __init__(self, length: int, width: int, embedded: bool):
        super().__init__()
        self.table = nn.Embedding(length + 1, width) if embedded else None
        self.w = nn.Parameter(torch.randn(1, length, width)) if not embedded else torch.zeros(())
        self.register_buffer("indices", torch.arange(length))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.w if self.table is None else self.table(self.indices))


class Tied(nn.Module):
    """Two layers with one weight, one of them through its transpose."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.there, self.back = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.back.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(x).sigmoid() @ self.there.weight + self.there(x).tanh() @ self.back.weight


Factory = Callable[[Draw, Shape], nn.Module | None]


class Row(NamedTuple):
    """A module for inputs of these ranks."""

    make: Factory
    ranks: tuple[int, ...] = (1, 2)
    often: float = 1.0


def _conv(d: Draw, s: Shape) -> nn.Module:
    kind = {2: nn.Conv1d, 3: nn.Conv2d}[len(s)]
    mode = d.pick("zeros", "zeros", "reflect", "circular", "replicate")
    groups = d.pick(1, s[0])
    kernel, options = d.size(1, min(2, *s[1:])), {"padding_mode": mode, "groups": groups, "bias": d.chance(0.7)}
    return kind(s[0], groups * d.size(1, 2), kernel, stride=d.size(1, 2), padding=0 if kernel == 1 else 1, **options)


def _transposed(d: Draw, s: Shape) -> nn.Module:
    kind = {2: nn.ConvTranspose1d, 3: nn.ConvTranspose2d}[len(s)]
    return kind(s[0], d.size(1, 2), d.size(1, 2), stride=d.size(1, 2), bias=d.chance(0.7))


def _itself(d: Draw, s: Shape) -> nn.Module:
    heads = d.pick(1, s[1])
    return Itself(s[1], heads, d.chance(0.4), d.chance(0.4), bias=d.chance(0.6), add_bias_kv=d.chance(0.1))


def _encoder(d: Draw, s: Shape) -> nn.Module:
    options = {"activation": d.pick("relu", "gelu"), "norm_first": d.chance(0.5), "bias": d.chance(0.8)}
    layer = nn.TransformerEncoderLayer(s[1], d.pick(1, s[1]), d.size(2, 4), batch_first=True, **options)
    one = nn.TransformerEncoder(layer, d.size(1, 2), enable_nested_tensor=False) if d.chance(0.4) else layer
    return one.eval()


def _recurrent(d: Draw, s: Shape) -> nn.Module:
    kind, both = d.pick(nn.LSTM, nn.GRU, nn.RNN), d.chance(0.2)
    return Last(kind(s[1], d.size(1, 3), batch_first=True, bidirectional=both, num_layers=d.size(1, 2)))


def _norm(d: Draw, s: Shape) -> nn.Module:
    last, all_ = list(s[-1:]), list(s)
    batch = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(s)](s[0]).eval()
    layer = d.pick(nn.LayerNorm(last), nn.LayerNorm(all_), nn.LayerNorm(last, bias=False))
    return d.pick(layer, nn.RMSNorm(last), batch, nn.GroupNorm(1, s[0]) if len(s) > 1 else layer)


def _reparametrised(d: Draw, s: Shape) -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(s[-1], d.size()))


MODULES: dict[str, Row] = {
    "nn.Linear": Row(lambda d, s: nn.Linear(s[-1], d.size(), bias=d.chance(0.7)), (1, 2, 3), 3.0),
    "nn.Conv": Row(_conv, (2, 3), 2.0),
    "nn.ConvTranspose": Row(_transposed, (2, 3)),
    "nn norm": Row(_norm, (1, 2, 3), 1.5),
    "nn.MultiheadAttention": Row(_itself, (2,), 2.0),
    "nn.TransformerEncoderLayer": Row(_encoder, (2,), 1.5),
    "nn.LSTM and the like": Row(_recurrent, (2,), 0.7),
    "nn residual": Row(lambda d, s: Residual(nn.Linear(s[-1], s[-1]), d.size(1, 2)), (1, 2)),
    "nn positions": Row(lambda d, s: Positions(s[0], s[1], d.chance(0.5)), (2,)),
    "nn tied": Row(lambda d, s: Tied(s[-1], d.size()), (1, 2)),
    "nn.PReLU": Row(lambda d, s: nn.PReLU(d.pick(1, s[0])), (1, 2), 0.3),
    "nn weight norm": Row(_reparametrised, (1, 2), 0.3),
    "nn.Dropout": Row(lambda d, s: nn.Dropout(0.4), (1, 2), 0.3),
    "nn activation": Row(lambda d, s: d.pick(nn.Tanh(), nn.ReLU(), nn.GELU(), nn.Softmax(-1)), (1, 2, 3)),
    "nn inplace": Row(lambda d, s: d.pick(nn.ReLU(inplace=True), nn.SiLU(inplace=True)), (1, 2, 3), 0.5),
    "nn.Flatten": Row(lambda d, s: nn.Flatten(), (2, 3), 0.5),
}
MODULE_READERS: dict[str, Row] = {
    "nn.Embedding": Row(lambda d, s: nn.Embedding(5, d.size(), padding_idx=d.pick(None, 0)), (0, 1, 2), 4.0),
    "nn.EmbeddingBag": Row(lambda d, s: nn.EmbeddingBag(5, d.size(), mode=d.pick("mean", "sum")), (1,), 0.5),
}
HOSTILE_MODULES: dict[str, Row] = {
    "nn batch norm in training": Row(lambda d, s: {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(s)](
        s[0], track_running_stats=d.chance(0.5)), (1, 2, 3)),
    "nn spectral norm": Row(lambda d, s: parametrizations.spectral_norm(nn.Linear(s[-1], d.size())), (1, 2)),
}  # fmt: skip
RANDOM = {"nn.Dropout"}


def shape_after(module: nn.Module, s: Shape, integers: bool = False) -> Shape | None:
    """The shape that comes out for one example, None where torch refuses or too much is left."""
    x = torch.zeros(2, *s, dtype=torch.long if integers else torch.float64)
    probe = copy.deepcopy(module).double()
    try:
        with torch.no_grad():
            out = tuple(probe(x).shape[1:])
    except (RuntimeError, ValueError):
        return None
    return out if len(out) <= 3 and 0 < math.prod(out) <= 60 else None


def scaled(d: Draw, module: nn.Module) -> nn.Module:
    """Seeded parameters in float64; torch's own first biases are often zero."""
    with torch.no_grad():
        for leaf in module.parameters():
            leaf.copy_(0.7 * torch.randn(leaf.shape, generator=d.generator, dtype=torch.float64))
    return module


def made(d: Draw, row: Row, s: Shape, integers: bool = False) -> tuple[nn.Module, Shape] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what it replaces
        torch.manual_seed(d.random.randrange(2**31))
        module = row.make(d, s)
        if module is None:
            return None
        module = scaled(d, module.double())
        shape = shape_after(module, s, integers)
    return None if shape is None else (module, shape)


def piece(name: str, row: Row, integers: bool = False) -> Maker:
    """A module in the middle of a raw function."""

    def make(d: Draw, s: Shape) -> Piece | None:
        found = made(d, row, s, integers)
        if found is None:
            return None
        module, shape = found
        own = dict(module.named_parameters())
        names = {name.replace(".", "_"): name for name in own}
        params = {k: own[name].detach().clone() for k, name in names.items()}
        buffers = dict(module.named_buffers())

        def apply(p: Params, x: Tensor, e: dict) -> Tensor:
            floats = next(iter(p.values())).dtype if p else x.dtype
            cast = {k: v.clone().to(floats) if v.is_floating_point() else v.clone() for k, v in buffers.items()}
            return torch.func.functional_call(module, ({names[k]: v for k, v in p.items()}, cast), (x,))

        return Piece(params, apply, shape, traits=frozenset({"random"} if name in RANDOM else ()))

    return Maker(make, row.ranks, 0.5 * row.often)


AS_PIECES: dict[str, Maker] = {f"{name} inside": piece(name, row) for name, row in MODULES.items()}


class Net(nn.Module):
    """Modules one after the other; some of its parameters may be frozen."""

    def __init__(self, parts: list[nn.Module], flat: bool):
        super().__init__()
        self.parts, self.flat = nn.ModuleList(parts), flat

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x.squeeze(-1) if self.flat else x
