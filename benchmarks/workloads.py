"""The five workloads: a module, a batch, the loss of this library and the same loss in plain torch. Seeds are fixed.

    id  model                                                                  batch  loss
    W1  autoencoder 784-1000-500-250-30-250-500-1000-784, tanh, linear code    500    sigmoid cross entropy, batchmean
    W2  MLP 784-512-512-10, relu                                               128    cross entropy
    W3  3x3 conv 3-32, 32-64 and 64-128 with stride 2, relu, mean, linear      128    cross entropy
    W4  ResNet-20 shape, biased convs, no normalisation, branch x 0.5          64     cross entropy
    W5  decoder: embedding 100, width 128, 4 heads, 4 layers, sequence 64      16     cross entropy per token

The shortcuts of W4 have no parameters; W5 has no position embedding, its norms come first and its head is not tied.
The data are random: nothing here measures learning, and time does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf

SEED = 0


class Workload(NamedTuple):
    """What is trained.

    model       () -> a module with seeded weights
    batch       (examples) -> (inputs, targets), seeded
    loss        the loss of this library            torch_loss  (outputs, targets) -> the same number in plain torch
    examples    the batch size
    targets     the aims for the schedules a, b, c, d, and for peak memory over the plain step in MB (None: no aim)
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: kf.losses.Loss
    torch_loss: Callable[[Tensor, Tensor], Tensor]
    examples: int
    targets: dict[str, float] | None = None
    memory: float | None = None


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module from SEED; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build()


def mlp(sizes: Sequence[int], activation: type[nn.Module], linear: Sequence[int] = ()) -> nn.Sequential:
    """Linear layers with an activation after each but the last and those with an index in `linear`."""
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(d_in, d_out))
        if index not in linear and index != len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


class GlobalMean(nn.Module):
    """The mean over all pixels: [N, C, H, W] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def convolutional() -> nn.Module:
    """Three 3x3 convolutions, two of them strided, and a linear classifier."""

    def conv(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.ReLU()]

    return nn.Sequential(*conv(3, 32, 1), *conv(32, 64, 2), *conv(64, 128, 2), GlobalMean(), nn.Linear(128, 10))


class Residual(nn.Module):
    """x' + ½ f(x), f two convolutions; where the shape changes, x' is x subsampled and padded with empty channels."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.second = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.stride, self.more = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(torch.relu(self.first(x)))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return torch.relu(x + 0.5 * branch)


def resnet20() -> nn.Module:
    """16, 32 and 64 channels, three residual blocks each: 19 convolutions and a linear classifier."""
    blocks = [Residual(a, b, s) for a, b, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2)) for a, b, s in _stage(a, b, s)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *blocks, GlobalMean(), nn.Linear(64, 10))


def _stage(c_in: int, c_out: int, stride: int) -> list[tuple[int, int, int]]:
    return [(c_in, c_out, stride), (c_out, c_out, 1), (c_out, c_out, 1)]


class DecoderLayer(nn.Module):
    """Causal attention with q, k and v in one linear layer, then an MLP four times as wide; norms in front of both."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        packed = self.packed(self.before_attention(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


def decoder(vocabulary: int = 100, width: int = 128, heads: int = 4, layers: int = 4) -> nn.Module:
    """Tokens [N, T] -> logits [N, T, vocabulary]."""
    body = [DecoderLayer(width, heads) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(vocabulary, width), *body, nn.LayerNorm(width), nn.Linear(width, vocabulary))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _pictures(examples: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(examples, 784, generator=_generator())
    return x, x.clone()


def _vectors(examples: int) -> tuple[Tensor, Tensor]:
    generator = _generator()
    return torch.randn(examples, 784, generator=generator), torch.randint(10, (examples,), generator=generator)


def _images(examples: int) -> tuple[Tensor, Tensor]:
    generator = _generator()
    return torch.randn(examples, 3, 32, 32, generator=generator), torch.randint(10, (examples,), generator=generator)


def _tokens(examples: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(100, (examples, 65), generator=_generator())
    return text[:, :-1].clone(), text[:, 1:].clone()


def _sigmoid(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / z.shape[0]


def _per_token(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


_AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
_CROSS = kf.losses.cross_entropy()


def _aims(a: float, b: float, c: float, d: float) -> dict[str, float]:
    return {"a": a, "b": b, "c": c, "d": d}


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            *("W1", "MLP autoencoder", lambda: seeded(lambda: mlp(_AUTOENCODER, nn.Tanh, linear=(3,))), _pictures),
            *(kf.losses.bce_with_logits(reduction="batchmean"), _sigmoid, 500, _aims(4.5, 2.6, 1.9, 1.8), 80),
        ),
        Workload(
            *("W2", "small MLP", lambda: seeded(lambda: mlp((784, 512, 512, 10), nn.ReLU)), _vectors),
            *(_CROSS, F.cross_entropy, 128, _aims(9, 4.2, 2.9, 2.7), 30),
        ),
        Workload(
            *("W3", "convolutions", lambda: seeded(convolutional), _images),
            *(_CROSS, F.cross_entropy, 128, _aims(1.9, 1.6, 1.1, 1.0), 60),
        ),
        Workload(
            *("W4", "ResNet-20 shape", lambda: seeded(resnet20), _images),
            *(_CROSS, F.cross_entropy, 64, _aims(3.0, 2.3, 1.25, 1.05), 110),
        ),
        Workload(
            *("W5", "decoder", lambda: seeded(decoder), _tokens),
            *(kf.losses.cross_entropy(class_dim=-1), _per_token, 16, _aims(2.6, 1.8, 1.2, 1.1), 38),
        ),
    )
}
