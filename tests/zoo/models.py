"""Pure functions on dictionaries of tensors, and modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict


def mlp(p: Params, x: Tensor) -> Tensor:
    """tanh between layers x @ w + b, from nested dictionaries."""
    layers = list(p.values())
    for k, layer in enumerate(layers):
        x = x @ layer["w"] + layer["b"]
        x = torch.tanh(x) if k < len(layers) - 1 else x
    return x


def recurrent(p: Params, x: Tensor) -> Tensor:
    """One cell used at every step of x [N, T, i]."""
    h = x.new_zeros(x.shape[0], 5)
    for step in x.unbind(1):
        h = torch.tanh(F.linear(h, p["hidden"], p["shift"]) + step @ p["input"])
    return F.linear(h, p["head"], p["bias"])


def attention(p: Params, x: Tensor) -> Tensor:
    """Softmax attention (a bias of the keys would cancel), classes for every token: x [N, T, d] -> [N, T, C]."""
    q, k, v = (F.linear(x, p[name], p.get(f"{name}_bias")) for name in ("query", "key", "value"))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    h = torch.tanh(x + F.linear(weights @ v, p["out"], p["out_bias"]))
    return F.linear(h, p["head"], p["head_bias"])


def tied(p: Params, tokens: Tensor) -> Tensor:
    """An embedding that is also the output head: tokens [N, T] -> [N, T, vocabulary]."""
    h = torch.tanh(F.linear(F.embedding(tokens, p["embedding"]), p["middle"], p["bias"]))
    return h @ p["embedding"].T


class ConvNet(nn.Module):
    """Rectangular images, asymmetric kernels, stride, padding and dilation: [N, 2, 6, 5] -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.second = nn.Conv2d(3, 4, (2, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(1))


class GroupedNet(nn.Module):
    """Two groups with an asymmetric stride: [N, 4, 4, 7] -> 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (2, 3), stride=(1, 2), groups=2)
        self.head = nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean(-1).flatten(1))


class TokenNet(nn.Module):
    """Padded embedding, layer norm and a linear layer on every token, averaged: tokens [N, 4] -> 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, padding_idx=0)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.head(self.norm(self.embedding(tokens)))).mean(1)
