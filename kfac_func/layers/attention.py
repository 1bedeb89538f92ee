"""Multi-head attention, written in the calls that other kinds recognise: linear, attention, linear.

    [q | k | v] = [x_q | x_k | x_v] W_inᵀ + b_in     y = concat_h(softmax(q_h k_hᵀ / √d + mask) v_h) W_outᵀ + b_out

The packed weight W_in stays one block. In self-attention it is one linear layer; else every distinct input goes
through the whole of it and gives its part, so that the gradients of the other parts are zero. With separate weights
b_in is a block of its own, of which every projection sees its part. bias_k and bias_v no kind can see: they are
unclaimed parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers that are added to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _merged(mask: Tensor | None, padding: Tensor | None, heads: int, more: int) -> Tensor | None:
    """[L, S] or [N·H, L, S], and [N, S], as one mask that adds to [N, H, L, S]; 0 for `more` keys at the end."""
    if mask is not None:
        mask = F.pad(mask if mask.ndim == 2 else torch.unflatten(mask, 0, (-1, heads)), (0, more))
    if padding is None:
        return mask
    padding = F.pad(padding, (0, more)).unsqueeze(-2).unsqueeze(-2)
    return padding if mask is None else mask + padding


def _attend(scores: Tensor, mask: Tensor | None, safe: bool) -> Tensor:
    """softmax(scores + mask); `safe`: 0 where the mask leaves nothing, as in scaled_dot_product_attention."""
    if mask is None:
        return scores.softmax(dim=-1)
    if not safe:
        return (scores + mask).softmax(dim=-1)
    empty = (mask == float("-inf")).all(dim=-1, keepdim=True)
    return (scores + mask.masked_fill(empty, 0)).softmax(dim=-1).masked_fill(empty, 0)


def _projected(inputs: tuple[Tensor, Tensor, Tensor], weight: Any, bias: Tensor | None) -> list[Tensor]:
    """q, k and v, from one packed weight or from three."""
    if isinstance(weight, tuple):
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weight, biases, strict=True)]
    first = [next(n for n, y in enumerate(inputs) if y is x) for x in inputs]
    whole = {n: F.linear(inputs[n], weight, bias).chunk(3, dim=-1) for n in dict.fromkeys(first)}
    return [whole[n][part] for part, n in enumerate(first)]


def _in_heads(x: Tensor, heads: int) -> Tensor:
    """[S, (N), E] -> [N, H, S, E/H]."""
    x = x if x.ndim == 3 else x.unsqueeze(1)
    return torch.unflatten(x, -1, (heads, -1)).permute(1, 2, 0, 3)  # Dynamo cannot trace Tensor.unflatten here


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `torch.nn.functional.multi_head_attention_forward` computes; inputs [L, (N), E]."""
    weight = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    parts = _projected((query, key, value), weight, in_proj_bias)
    q, k, v = (_in_heads(x, num_heads) for x in parts)
    k, v = (
        x if given is None else torch.unflatten(given, 0, (-1, num_heads))
        for x, given in ((k, static_k), (v, static_v))
    )
    if bias_k is not None and bias_v is not None:
        k, v = (
            torch.cat([x, _in_heads(b, num_heads).expand(x.shape[0], -1, -1, -1)], dim=2)
            for x, b in ((k, bias_k), (v, bias_v))
        )
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        mask = _additive(attn_mask, q)
    else:
        more = add_zero_attn + (bias_k is not None)
        mask = _merged(_additive(attn_mask, q), _additive(key_padding_mask, q), num_heads, more)
    attended = _attend((q / q.shape[-1] ** 0.5) @ k.mT, mask, safe=not need_weights)
    attended = F.dropout(attended, dropout_p, training)
    out = F.linear((attended @ v).permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    shown = (attended.mean(dim=1) if average_attn_weights else attended) if need_weights else None
    if query.ndim == 3:
        return out, shown
    return out.squeeze(1), None if shown is None else shown.squeeze(0)


expansions: dict[object, Callable[..., Any]] = {F.multi_head_attention_forward: multi_head_attention_forward}
