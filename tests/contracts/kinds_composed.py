"""More rows of the table of layer kinds: transposed convolutions and multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.contracts.kinds import Form, N, Row, last, module, rand, several


def conv_transpose(m: Any, *size: int) -> Row:
    """Rows by another transposed convolution, one whose outputs are the entries of the patches."""
    x, q = rand(N, m.in_channels, *size), m.groups
    i = m.in_channels * torch.Size(m.kernel_size).numel()
    options = {k: getattr(m, k) for k in ("kernel_size", "stride", "padding", "output_padding", "dilation")}
    unit = type(m)(m.in_channels, i, bias=False, dtype=torch.float64, **options)
    eye = torch.eye(i, dtype=torch.float64).reshape(m.in_channels, *m.kernel_size, i)
    unit.weight = nn.Parameter(eye.movedim(-1, 1))

    def split(t: Tensor) -> Tensor:
        found = last(t.movedim(1, -1))
        return found.unflatten(-1, (q, -1)) if q > 1 else found

    def matrix(w: Tensor) -> Tensor:
        parts = torch.stack([part.transpose(0, 1).flatten(1) for part in w.chunk(q)])
        return parts if q > 1 else parts[0]

    form = Form(bias="bias" if m.bias is not None else None, matrix=matrix, groups=q)
    return module(m, x, form, lambda x: split(unit(x).detach()), out_rows=split)


def attention(*names: str, **options: Any) -> Any:
    """Two heads of two, the inputs as [L, N, E]."""

    function: Any = F.multi_head_attention_forward

    def layer(p: dict[str, Tensor], x: Tensor) -> Tensor:
        inputs = {"x": x.transpose(0, 1), "y": x.transpose(0, 1).sin()[:2], "z": x.transpose(0, 1).cos()[:2]}
        leaves = p["w"], p.get("b"), None, None, False, 0.0, p["out"], p.get("c")
        y, _ = function(*(inputs[k] for k in names), 4, 2, *leaves, **options)
        return y.transpose(0, 1)

    return layer


PACKED = {"w": (12, 4), "b": (12,), "out": (4, 4), "c": (4,)}
BLOCKS = {"w": Form("w", "b"), "out": Form("out", "c")}
CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)
X = rand(N, 3, 4)
ROWS = {
    "conv_transpose1d": conv_transpose(nn.ConvTranspose1d(2, 3, 3), 4),
    "conv_transpose1d without bias": conv_transpose(nn.ConvTranspose1d(2, 3, 2, bias=False), 3),
    "conv_transpose1d stride 2": conv_transpose(nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), 3),
    "conv_transpose1d stride beyond the kernel": conv_transpose(
        nn.ConvTranspose1d(3, 2, 2, stride=3, output_padding=2), 3
    ),
    "conv_transpose1d cropped": conv_transpose(nn.ConvTranspose1d(2, 3, 2, stride=2, padding=3), 6),
    "conv_transpose2d": conv_transpose(nn.ConvTranspose2d(2, 3, (3, 2)), 2, 3),
    "conv_transpose2d all": conv_transpose(
        nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(2, 1), padding=(1, 2), output_padding=(1, 1), dilation=(1, 2), groups=2
        ), 2, 4,
    ),
    "conv_transpose2d depthwise": conv_transpose(nn.ConvTranspose2d(3, 3, (2, 3), stride=2, groups=3), 2, 2),
    "conv_transpose2d depthwise, two filters, no bias": conv_transpose(
        nn.ConvTranspose2d(3, 6, 2, groups=3, bias=False), 2, 3
    ),
    "conv_transpose3d": conv_transpose(
        nn.ConvTranspose3d(2, 3, (2, 1, 3), stride=(1, 2, 1), padding=(0, 0, 2)), 2, 2, 3
    ),
    "conv_transpose3d groups": conv_transpose(nn.ConvTranspose3d(4, 2, 2, groups=2, bias=False), 1, 2, 2),
    "multi-head attention, packed": several(attention("x", "x", "x"), X, BLOCKS, **PACKED),
    "multi-head attention, causal, without bias": several(
        attention("x", "x", "x", attn_mask=CAUSAL),
        X, {"w": Form("w"), "out": Form("out")}, w=(12, 4), out=(4, 4),
    ),
    "multi-head attention, packed, keys of another length": several(attention("x", "y", "y"), X, BLOCKS, **PACKED),
    "multi-head attention, packed, three inputs": several(attention("x", "y", "z"), X, BLOCKS, **PACKED),
}  # fmt: skip
