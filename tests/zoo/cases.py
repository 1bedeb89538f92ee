"""The table of cases. In every block o, i(+1), N and T are different numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from tests.oracles import Spec, rows
from tests.zoo import models


class Case(NamedTuple):
    """A model, a batch, a loss of the library and the same loss by torch (`value`), and what its blocks are."""

    fn: Callable[[Any, Any], Tensor]
    params: Any
    inputs: Tensor
    targets: Tensor
    loss: kf.losses.Loss
    value: Callable[[Tensor, Tensor], Tensor]
    blocks: dict[str, Spec]
    positions: dict[str, int]  # T of every matrix block

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(shapes: dict[str, tuple[int, ...]], scale: float = 0.6) -> dict[str, Tensor]:
    """Parameters with these shapes; names may be dotted paths."""
    tree: dict = {}
    for seed, (path, shape) in enumerate(shapes.items()):
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = scale * randn(*shape, seed=seed + 1)
    return tree


def functional(module: nn.Module, scale: float = 0.6) -> tuple[Callable, dict[str, Tensor]]:
    """The library's function of a module, with seeded float64 parameters."""
    fn, params = kf.make_functional(module.double())
    return fn, {name: scale * randn(*leaf.shape, seed=k + 1) for k, (name, leaf) in enumerate(params.items())}


def subset(case: Case, start: int, stop: int) -> Case:
    """The same case on some of its examples."""
    return case._replace(inputs=rows(case.inputs, start, stop), targets=case.targets[start:stop])


def labels(classes: int, *shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).mul(5).remainder(classes).reshape(shape)


def _half_square(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(z, t, reduction="sum") / len(z)


def _token_entropy(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.movedim(-1, 1), t)


def _mlp() -> Case:
    params = weights({"first.w": (4, 6), "first.b": (6,), "second.w": (6, 3), "second.b": (3,)})
    blocks = {f"{k}.w": Spec(f"{k}.w", f"{k}.b", "in_out") for k in params}
    data = randn(8, 4, seed=9), labels(3, 8)
    return Case(models.mlp, params, *data, kf.losses.cross_entropy(), F.cross_entropy, blocks, dict.fromkeys(blocks, 1))


def _modules(names: list[str], groups: dict[str, int] | None = None) -> dict[str, Spec]:
    return {f"{k}.weight": Spec(f"{k}.weight", f"{k}.bias", groups=(groups or {}).get(k, 1)) for k in names}


def _deep_linear() -> Case:
    fn, params = functional(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    loss, blocks = kf.losses.mse(reduction="batchmean", scale=0.5), _modules(["0", "1"])
    data = randn(7, 3, seed=9), randn(7, 2, seed=10)
    return Case(fn, params, *data, loss, _half_square, blocks, dict.fromkeys(blocks, 1))


def _mean_square() -> Case:
    fn, params = functional(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    data, blocks = (randn(7, 3, seed=9), randn(7, 2, seed=10)), _modules(["0", "2"])
    return Case(fn, params, *data, kf.losses.mse(), F.mse_loss, blocks, dict.fromkeys(blocks, 1))


def _bernoulli() -> Case:
    fn, params = functional(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)))
    data, value = (randn(9, 5, seed=9), labels(2, 9, 2).double()), F.binary_cross_entropy_with_logits
    blocks = _modules(["0", "2"])
    return Case(fn, params, *data, kf.losses.bce_with_logits(), value, blocks, dict.fromkeys(blocks, 1))


def _conv() -> Case:
    fn, params = functional(models.ConvNet(), 0.4)
    blocks, positions = _modules(["first", "second", "head"]), {"first.weight": 9, "second.weight": 2, "head.weight": 1}
    data = randn(7, 2, 6, 5, seed=9), labels(5, 7)
    return Case(fn, params, *data, kf.losses.cross_entropy(), F.cross_entropy, blocks, positions)


def _grouped() -> Case:
    fn, params = functional(models.GroupedNet(), 0.4)
    blocks, positions = _modules(["conv", "head"], {"conv": 2}), {"conv.weight": 9, "head.weight": 1}
    data = randn(5, 4, 4, 7, seed=9), labels(2, 5, 2).double()
    return Case(fn, params, *data, kf.losses.bce_with_logits(), F.binary_cross_entropy_with_logits, blocks, positions)


def _recurrent() -> Case:
    shapes = {"input": (2, 5), "hidden": (5, 5), "shift": (5,), "head": (4, 5), "bias": (4,)}
    blocks = {"input": Spec("input", form="in_out"), "hidden": Spec("hidden", "shift"), "head": Spec("head", "bias")}
    data, positions = (randn(7, 3, 2, seed=9), labels(4, 7)), {"input": 3, "hidden": 3, "head": 1}
    return Case(models.recurrent, weights(shapes), *data, kf.losses.cross_entropy(), F.cross_entropy, blocks, positions)


def _attention() -> Case:
    sizes = {"query": (6, 4), "key": (6, 4), "value": (6, 4), "out": (4, 6), "head": (2, 4)}
    shapes = {n: s for k, size in sizes.items() for n, s in ((k, size), (f"{k}_bias", size[:1])) if n != "key_bias"}
    blocks = {k: Spec(k, None if k == "key" else f"{k}_bias") for k in sizes}
    data, loss = (randn(8, 3, 4, seed=9), labels(2, 8, 3)), kf.losses.cross_entropy(class_dim=-1)
    return Case(models.attention, weights(shapes), *data, loss, _token_entropy, blocks, dict.fromkeys(blocks, 3))


def _tokens() -> Case:
    fn, params = functional(models.TokenNet(), 0.8)
    tokens = torch.arange(36).mul(7).remainder(11).reshape(9, 4)
    blocks = _modules(["head"]) | {"embedding.weight": Spec("embedding.weight", form="in_out")}
    blocks["norm.weight"] = Spec("norm.weight", "norm.bias", "vector")
    positions = {"embedding.weight": 4, "head.weight": 4}
    return Case(fn, params, tokens, labels(3, 9), kf.losses.cross_entropy(), F.cross_entropy, blocks, positions)


def _tied() -> Case:
    params = weights({"embedding": (7, 5), "middle": (5, 5), "bias": (5,)})
    blocks = {"embedding": Spec("embedding"), "middle": Spec("middle", "bias")}
    tokens, loss = torch.arange(12).mul(3).remainder(7).reshape(6, 2), kf.losses.cross_entropy(class_dim=-1)
    positions = {"embedding": 4, "middle": 2}
    return Case(models.tied, params, tokens, labels(7, 6, 2), loss, _token_entropy, blocks, positions)


CASES: dict[str, Case] = {
    "mlp": _mlp(),
    "deep_linear": _deep_linear(),
    "mean_square": _mean_square(),
    "bernoulli": _bernoulli(),
    "conv": _conv(),
    "grouped": _grouped(),
    "recurrent": _recurrent(),
    "attention": _attention(),
    "tokens": _tokens(),
    "tied": _tied(),
}
