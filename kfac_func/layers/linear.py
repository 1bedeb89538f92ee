"""Linear layers with any leading dimensions: y = x Wᵀ + b."""

from __future__ import annotations

import torch.nn.functional as F

from kfac_func.layers.base import Call, Found, Handler, dense, dense_bias, found_bias, ref_of


def _linear(call: Call) -> Found | None:
    x, weight, bias = call.bind("input", "weight", "bias")
    ref = call.ref(weight)
    if ref is None:
        own = ref_of(call, bias)
        return None if own is None else found_bias(dense_bias, (False,), own, call.run(), -1)
    if len(ref.shape) != 2:
        return None
    out = call.run()
    return Found(
        kind=dense._replace(name="linear"),
        options=(False,),
        weight=ref,
        bias=ref_of(call, bias),
        inputs=x,
        output=out,
        positions=out.shape[:-1].numel(),
        order=ref.order,
        outputs=out.shape[-1],
        bias_shape=out.shape[-1:] if bias is None else None,
    )


handlers: dict[object, Handler] = {F.linear: _linear}
