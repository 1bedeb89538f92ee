"""Linear layers with any leading dimensions: y = x Wᵀ + b."""

from __future__ import annotations

import torch.nn.functional as F

from kfac_func.layers.base import Call, Found, Handler, dense, ref_of
from kfac_func.layers.lone import found_alone


def _linear(call: Call) -> Found | None:
    x, weight, bias = call.bind("input", "weight", "bias")
    ref = call.ref(weight)
    if ref is None:
        return found_alone(dense, (False,), ref_of(call, bias), call.run(), -1) if bias is not None else None
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
