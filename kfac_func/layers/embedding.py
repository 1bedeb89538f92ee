"""Embeddings: a linear layer on one-hot rows, whose input moment is diagonal (token frequencies).

    y[n, s] = W[token[n, s]]        block V = ∂L/∂Wᵀ  [d, vocabulary]        A = diag(frequency of each token)

Positions that hold `padding_idx` give no gradient; their rows are zero in A and G, and
`KroneckerState.kept` does not count them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func.blocks import Diagonal, Factor, Kind
from kfac_func.layers.base import Call, Found, Handler, refuse


def _rows(tokens: Tensor, options: tuple) -> Tensor:
    size, padding, dtype = options
    flat = tokens.unsqueeze(1) if tokens.ndim == 1 else tokens.flatten(1)
    one_hot = flat.unsqueeze(-1) == torch.arange(size, device=tokens.device)
    if padding is not None:
        one_hot = one_hot & (flat != padding).unsqueeze(-1)
    return one_hot.to(dtype)


def _output_rows(g: Tensor, options: tuple) -> Tensor:
    return g.unsqueeze(2) if g.ndim == 3 else g.flatten(2, -2)


def _gradient(tokens: Tensor, g: Tensor, options: tuple) -> Tensor:
    size = options[0]
    g = g.float() if g.itemsize < 4 else g  # a frequent token adds up many rows
    zeros = g.new_zeros(size, g.shape[-1])
    return zeros.index_add(0, tokens.flatten(), g.flatten(0, -2)).mT


def _moment(tokens: Tensor, options: tuple, bias: bool, kept: Tensor | None = None) -> Factor:
    del bias  # an embedding has none
    size, padding, dtype = options
    flat = tokens.flatten()
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    weights = torch.ones_like(flat, dtype=wide) if padding is None else (flat != padding).to(wide)
    weights = weights if kept is None else weights * kept
    return Diagonal(weights.new_zeros(size).index_add(0, flat, weights))


def _kept(tokens: Tensor, options: tuple) -> Tensor:
    flat = tokens.unsqueeze(1) if tokens.ndim == 1 else tokens.flatten(1)
    return torch.ones_like(flat, dtype=torch.bool) if options[1] is None else flat != options[1]


embedding = Kind("embedding", _gradient, _rows, _output_rows, _moment, kept=_kept, diagonal=True)
"""`options` = (number of embeddings, padding index or None, dtype)."""


def _embedding(call: Call) -> Found | None:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    tokens, weight, padding, max_norm, _, by_frequency, sparse = call.bind(*names)
    ref = call.ref(weight)
    if ref is None or ref.part or len(ref.shape) != 2:
        return None
    for name, value in (("max_norm", max_norm), ("scale_grad_by_freq", by_frequency), ("sparse", sparse)):
        if value:
            why = {"max_norm": "it writes into the weight", "sparse": "the gradient would be a sparse tensor"}
            raise refuse(
                ref.path,
                "embedding",
                f"{name}={value}",
                why.get(name, "it scales gradients by counts of the batch"),
                f"build the embedding without {name}",
            )
    out = call.run()
    if out.numel() == 0:
        why = "there are no rows, so nothing can be said about its curvature"
        raise refuse(ref.path, "embedding", f"an output {list(out.shape)}", why, "leave the empty embedding out")
    if padding is not None and padding < 0:
        padding += weight.shape[0]
    hidden = None if padding is None or padding < 0 else (tokens == padding).unsqueeze(-1)
    return Found(
        kind=embedding,
        options=(weight.shape[0], None if hidden is None else padding, out.dtype),
        weight=ref,
        bias=None,
        inputs=tokens,
        output=out,
        positions=tokens.numel(),
        order=(ref.order[1], ref.order[0]),
        outputs=out.shape[-1],
        restore=None if hidden is None else (lambda y: torch.where(hidden, out, y)),
    )


def _indexed(call: Call) -> Found | None:
    """w[tokens], an embedding as it is."""
    return _chosen(call, *call.args) if len(call.args) == 2 else None


def _selected(call: Call) -> Found | None:
    """index_select(w, 0, tokens)"""
    weight, dim, tokens = call.bind("input", "dim", "index")
    return _chosen(call, weight, tokens) if dim == 0 else None


def _chosen(call: Call, weight: object, tokens: object) -> Found | None:
    ref = call.ref(weight)
    if ref is None or ref.part or ref.order != (0, 1) or not isinstance(tokens, Tensor) or tokens.ndim == 0:
        return None
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.numel() == 0:
        return None
    out = call.run()
    return Found(
        kind=embedding,
        options=(ref.shape[0], None, out.dtype),
        weight=ref,
        bias=None,
        inputs=tokens.long() % ref.shape[0],
        output=out,
        positions=tokens.numel(),
        order=(1, 0),
        outputs=out.shape[-1],
    )


handlers: dict[object, Handler] = {
    F.embedding: _embedding,
    Tensor.__getitem__: _indexed,
    **dict.fromkeys((Tensor.index_select, torch.index_select), _selected),
}


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """F.embedding_bag as an embedding, and what is done with its rows [N, L, d], or [R, d] with offsets of the bags."""
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    counted = torch.ones_like(input, dtype=torch.bool) if padding_idx is None else input != padding_idx % len(weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if offsets is not None:
        starts = F.pad(counted.cumsum(0), (1, 0))[offsets]
        numbers = torch.arange(len(rows), device=rows.device)[counted]
        return F.embedding_bag(numbers, rows, starts, mode=mode, include_last_offset=include_last_offset)
    counted = counted.unsqueeze(-1)
    if mode == "max":
        return torch.where(counted.any(1), rows.masked_fill(~counted, -torch.inf).amax(1), 0.0)
    total = torch.where(counted, rows, 0.0).sum(1)
    return total / counted.sum(1).clamp(min=1) if mode == "mean" else total


expansions: dict[object, Callable[..., Tensor]] = {F.embedding_bag: embedding_bag}
