"""Scale and shift of layer, RMS, group and (in eval mode) batch normalisation: y = x̂ ∘ γ + β.

A vector block: the gradient of one example is V_n = [Σ_s g∘x̂ | Σ_s g], summed over positions before anything is
squared, so its diagonal is exact. The recorded input is x̂ itself, of half-precision inputs in float32: rounded, it
would lose more than torch's own kernels do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func.blocks import Kind
from kfac_func.layers.base import Call, Found, Handler, Ref, ref_of, refuse


def _sum_positions(x: Tensor, options: tuple, lead: int) -> Tensor:
    """Sum [*lead, ...] over everything but the leading dimensions and the parameter's own, flattened to [*lead, p]."""
    channels, dims, _, _ = options
    if channels:
        return x.flatten(lead + 1).sum(dim=-1) if x.ndim > lead + 1 else x
    x = x.flatten(-dims)
    return x.flatten(lead, -2).sum(dim=lead) if x.ndim > lead + 1 else x


def _per_example(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    _, _, scale, shift = options
    g = g.to(x.dtype)
    parts = [_sum_positions(g * x, options, 2)] if scale else []
    return torch.cat([*parts, _sum_positions(g, options, 2)] if shift else parts, dim=-1)


def _gradient(x: Tensor, g: Tensor, options: tuple) -> Tensor:
    return _per_example(x, g.unsqueeze(0), options).sum(dim=(0, 1))


normalization = Kind("normalization", _gradient, per_example=_per_example)
"""`options` = (parameter along dimension 1?, number of parameter dimensions, has a scale, has a shift)."""


def _found(
    call: Call, name: str, weight: object, bias: object, normalized: Callable[[], Tensor], channels: bool
) -> Found | None:
    scale, shift = ref_of(call, weight), ref_of(call, bias)
    own: Ref | None = scale or shift
    if own is None:
        return None
    out = call.run()
    p = torch.Size(own.shape).numel()
    if p == 0:
        why = "there are no numbers in it, so nothing can be said about its curvature"
        raise refuse(own.path, name, f"a parameter {list(own.shape)}", why, "leave the empty normalisation out")
    return Found(
        kind=normalization._replace(name=name),
        options=(channels, len(own.shape), scale is not None, shift is not None),
        weight=scale,
        bias=shift,
        inputs=normalized(),
        output=out,
        positions=out.numel() // p,
        outputs=p * ((scale is not None) + (shift is not None)),
    )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.itemsize < 4 else x


def _layer_norm(call: Call) -> Found | None:
    x, shape, weight, bias, eps = call.bind("input", "normalized_shape", "weight", "bias", "eps", eps=1e-5)
    return _found(call, "layer_norm", weight, bias, lambda: F.layer_norm(_wide(x), shape, eps=eps), channels=False)


def _rms_norm(call: Call) -> Found | None:
    x, shape, weight, eps = call.bind("input", "normalized_shape", "weight", "eps")
    return _found(call, "rms_norm", weight, None, lambda: F.rms_norm(_wide(x), shape, eps=eps), channels=False)


def _group_norm(call: Call) -> Found | None:
    x, groups, weight, bias, eps = call.bind("input", "num_groups", "weight", "bias", "eps", eps=1e-5)
    return _found(call, "group_norm", weight, bias, lambda: F.group_norm(_wide(x), groups, eps=eps), channels=True)


def _batch_norm(call: Call) -> Found | None:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, variance, weight, bias, training, _, eps = call.bind(*names, training=False, eps=1e-5)
    ref = call.ref(weight) or call.ref(bias)
    if ref is None:
        return None
    if training:
        raise refuse(
            ref.path,
            "batch_norm",
            "training=True",
            "the statistics mix the examples of the batch (and running statistics are written)",
            "call .eval() on the normalisation, or use GroupNorm or LayerNorm",
        )

    def normalized() -> Tensor:
        return F.batch_norm(_wide(x), _wide(mean), _wide(variance), eps=eps)

    return _found(call, "batch_norm", weight, bias, normalized, channels=True)


handlers: dict[object, Handler] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}
