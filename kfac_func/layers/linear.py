"""Linear layers with any leading dimensions: y = x Wᵀ + b."""

from __future__ import annotations

import torch.nn.functional as F

from kfac_func.blocks import Part
from kfac_func.layers.base import Call, Found, Handler, dense, dense_bias, found_bias, vector_of


def _linear(call: Call) -> Found | None:
    x, weight, bias = call.bind("input", "weight", "bias")
    ref = call.ref(weight)
    if ref is None:
        own = vector_of(call, bias)
        return None if own is None else found_bias(dense_bias, (False,), own, call.run(), -1)
    if len(ref.shape) != 2:
        return None
    out = call.run()
    return Found(
        kind=dense._replace(name="linear"),
        options=(False,),
        weight=ref,
        bias=vector_of(call, bias),
        inputs=x,
        output=out,
        positions=out.shape[:-1].numel(),
        order=ref.order,
        outputs=ref.shape[ref.order[0]],
        part=Part(ref.place(ref.order[0]), ref.place(ref.order[1])),
        bias_shape=out.shape[-1:] if bias is None else None,
    )


handlers: dict[object, Handler] = {F.linear: _linear}
