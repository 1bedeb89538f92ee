"""Small models on which something is known to be exact: the regimes of curvature, and one model per layer kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import Model, PyTree
from kfac_func.estimators.stats import Sharing
from kfac_func.losses import Loss, cross_entropy, mse


class Regime(NamedTuple):
    """A model, a loss and a batch on which a curvature is claimed to be exact.

    fn, params, batch, loss  as for `dense_ggn`
    sharing   "expand" or "reduce", as for `value_grad_and_stats`
    blocks    the names of the blocks that the claim is about; empty: all
    claim     what is exact here, for messages
    """

    fn: Model
    params: PyTree
    batch: tuple[Any, Tensor]
    loss: Loss
    sharing: Sharing = "expand"
    blocks: tuple[str, ...] = ()
    claim: str = ""


def regimes() -> tuple[str, ...]:
    """The names that `assert_exact` and `regime` know.

    "deep_linear"         linear layers and squared loss: K-FAC is exact
    "expand"              the same with positions that the loss sums over: K-FAC with sharing="expand" is exact, T = 3
    "one_datum"           one example, one position: K-FAC is exact
    "constant_inputs"     every example has the same layer input: K-FAC is exact for block "one"
    "constant_gradients"  the output gradients do not depend on the example: K-FAC is exact for block "two"
    "reduce_mean"         positions are averaged right after the layer: K-FAC with sharing="reduce" is exact
    "any"                 a convolution, a normalisation and a weight used twice: what is exact here is exact always
    others                a model with the layer of that name

    Source: Eschenhagen et al. 2023 (2311.00636), §3; Martens & Grosse 2015 (1503.05671); Bernacchia et al. 2018.

    >>> kf.testing.regimes()[:3]
    ('deep_linear', 'expand', 'one_datum')
    """
    return tuple(REGIMES)


def regime(name: str) -> Regime:
    """The regime of this name, in float64; the same numbers at every call.

    Raises HyperparameterError for a name that is not in `regimes()`.

    >>> kf.testing.regime("expand").batch[0].shape
    torch.Size([7, 3, 4])
    """
    if name not in REGIMES:
        raise HyperparameterError(
            explain(
                f"unknown regime {name!r}.",
                wanted=", ".join(map(repr, REGIMES)),
                options="kf.testing.Regime(fn, params, batch, loss) for a model of your own",
            )
        )
    return REGIMES[name]()


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: 0.6 * _randn(*shape, seed=k + 1) for k, (name, shape) in enumerate(shapes.items())}


def _labels(classes: int, examples: int) -> Tensor:
    return torch.arange(examples).mul(5).remainder(classes)


# ------------------------------------------------------------------ regimes of curvature

HALF = mse("batchmean", scale=0.5)
TWO_LAYERS = {"one": (5, 4), "one_bias": (5,), "two": (2, 5), "two_bias": (2,)}


def _chain(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p["one"], p["one_bias"]), p["two"], p["two_bias"])


def _net(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["one"], p["one_bias"])), p["two"], p["two_bias"])


def _deep_linear() -> Regime:
    claim = "linear layers and squared loss: T·G⊗A is the block"
    return Regime(_chain, _weights(**TWO_LAYERS), (_randn(7, 4), _randn(7, 2, seed=9)), HALF, claim=claim)


def _expand() -> Regime:
    claim = "linear layers and squared loss that sums over T = 3 positions: T·G⊗A is the block"
    batch = _randn(7, 3, 4), _randn(7, 3, 2, seed=9)
    return Regime(_chain, _weights(**TWO_LAYERS), batch, mse("sum"), claim=claim)


def _one_datum() -> Regime:
    claim = "one example and one position: G⊗A is the block"
    return Regime(_net, _weights(**TWO_LAYERS), (_randn(1, 4), _labels(2, 1)), cross_entropy(), claim=claim)


def _constant_inputs() -> Regime:
    def fn(p: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, gate = inputs
        h = torch.tanh(gate * F.linear(x, p["one"], p["one_bias"]))
        return F.linear(h, p["two"], p["two_bias"])

    batch = (_randn(1, 4).expand(7, 4), _randn(7, 5, seed=8)), _labels(2, 7)
    claim = "the layer's input is the same for every example: G⊗A is the block"
    return Regime(fn, _weights(**TWO_LAYERS), batch, cross_entropy(), blocks=("one",), claim=claim)


def _constant_gradients() -> Regime:
    claim = "the layer's output gradients are the same for every example: G⊗A is the block"
    batch = _randn(7, 4), _randn(7, 2, seed=9)
    return Regime(_net, _weights(**TWO_LAYERS), batch, HALF, blocks=("two",), claim=claim)


def _reduce_mean() -> Regime:
    def fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, p["one"], p["one_bias"]).mean(1)

    claim = "positions are averaged right after the layer: with reduced rows T·G⊗A is the block"
    batch = _randn(7, 3, 4), _randn(7, 5, seed=9)
    return Regime(fn, _weights(one=(5, 4), one_bias=(5,)), batch, HALF, "reduce", claim=claim)


def _any() -> Regime:
    def fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.conv2d(x, p["conv"], p["conv_bias"])
        h = F.group_norm(torch.tanh(h), 1, p["scale"], p["shift"]).flatten(2).mean(2)
        for _ in range(2):
            h = torch.tanh(F.linear(h, p["hidden"], p["hidden_bias"]))
        return F.linear(h, p["head"])

    shapes = {"conv": (4, 2, 2, 1), "conv_bias": (4,), "scale": (4,), "shift": (4,)}
    shapes |= {"hidden": (4, 4), "hidden_bias": (4,), "head": (3, 4)}
    claim = "none but for structures that are exact everywhere"
    return Regime(fn, _weights(**shapes), (_randn(6, 2, 4, 3), _labels(3, 6)), cross_entropy(), claim=claim)


# ------------------------------------------------------------------ layer kinds


def _layer(run: Callable[..., Tensor], x: Tensor, **shapes: tuple[int, ...]) -> Callable[[], Regime]:
    """A model z = tanh(layer(x)) M with a fixed M, so that every output of the layer matters in its own way."""

    def fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        flat = torch.tanh(run(x, *p.values()).flatten(1))
        return flat @ torch.arange(1.0, 3 * flat.shape[1] + 1, dtype=flat.dtype).sin().reshape(-1, 3)

    return lambda: Regime(fn, _weights(**shapes), (x, _labels(3, len(x))), cross_entropy())


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2)


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, torch.arange(3, dtype=x.dtype), torch.arange(1, 4, dtype=x.dtype), weight, bias)


REGIMES: dict[str, Callable[[], Regime]] = {
    "deep_linear": _deep_linear,
    "expand": _expand,
    "one_datum": _one_datum,
    "constant_inputs": _constant_inputs,
    "constant_gradients": _constant_gradients,
    "reduce_mean": _reduce_mean,
    "any": _any,
    "linear": _layer(F.linear, _randn(4, 2, 3), weight=(5, 3), bias=(5,)),
    "einsum": _layer(lambda x, w: torch.einsum("nd,dhk->nhk", x, w), _randn(4, 3), weight=(3, 2, 5)),
    "conv1d": _layer(F.conv1d, _randn(4, 2, 6), weight=(3, 2, 2), bias=(3,)),
    "conv2d": _layer(_conv2d, _randn(4, 4, 5, 6), weight=(6, 2, 2, 3), bias=(6,)),
    "conv3d": _layer(F.conv3d, _randn(4, 2, 3, 2, 4), weight=(3, 2, 2, 1, 3), bias=(3,)),
    "conv_transpose2d": _layer(F.conv_transpose2d, _randn(4, 2, 2, 3), weight=(2, 3, 2, 1), bias=(3,)),
    "embedding": _layer(
        lambda x, w: F.embedding(x, w, padding_idx=0), torch.arange(20).mul(7).remainder(6).reshape(4, 5), weight=(6, 3)
    ),
    "layer_norm": _layer(lambda x, *p: F.layer_norm(x, (3,), *p), _randn(4, 2, 3), weight=(3,), bias=(3,)),
    "rms_norm": _layer(lambda x, w: F.rms_norm(x, (3,), w), _randn(4, 2, 3), weight=(3,)),
    "group_norm": _layer(lambda x, *p: F.group_norm(x, 2, *p), _randn(4, 6, 2), weight=(6,), bias=(6,)),
    "batch_norm": _layer(_batch_norm, _randn(4, 3, 2), weight=(3,), bias=(3,)),
    "scale": _layer(lambda x, w: x * w, _randn(4, 2, 3), weight=(3,)),
    "shift": _layer(lambda x, w: torch.tanh(x) + w, _randn(4, 2, 3), weight=(2, 3)),
}
