"""The rows of a use: inputs [B, S, (q), i] and output gradients [V, B, S, (q), o], one per example and shared
position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func.blocks.base import Use, Where


def examples_first(x: Tensor, where: Where | None, lead: int = 0) -> Tensor:
    return x.unsqueeze(lead) if where is None else x.movedim(lead + where.dim, lead)


def _unfold_examples(rows: Tensor, where: Where | None, lead: int = 0) -> Tensor:
    """[B·f, S, ...] -> [B, f·S, ...] where one example owns f consecutive entries; B = 1 for a shared use."""
    fold = rows.shape[lead] if where is None else where.fold
    return rows if fold == 1 else rows.unflatten(lead, (-1, fold)).flatten(lead + 1, lead + 2)


def precise(x: Tensor) -> Tensor:
    """Second moments of half-precision rows are taken in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def alike(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients in one precision: autocast gives a layer another one than its inputs have."""
    if x.dtype == g.dtype or not x.is_floating_point():
        return x, g
    wide = torch.promote_types(x.dtype, g.dtype)
    return x.to(wide), g.to(wide)


def placed(x: Tensor, at: tuple[int, int] | None) -> Tensor:
    """The last dimension in its place among all; zeros elsewhere."""
    return x if at is None else F.pad(x, (at[0], at[1] - at[0] - x.shape[-1]))


def input_rows(use: Use, sharing: str) -> Tensor:
    """The inputs of a use as rows [B, S, (q), i], without the homogeneous 1; S = 1 (their mean) for sharing
    "reduce".
    """
    rule = use.rule
    assert rule.kind.rows is not None
    rows = rule.kind.rows(examples_first(use.inputs, rule.where), rule.options)
    rows = placed(precise(_unfold_examples(rows, rule.where)), rule.part.columns)
    if sharing == "expand":
        return rows
    kept = kept_rows(use)
    if kept is None:
        return rows.mean(dim=1, keepdim=True)
    kept = kept.to(rows.dtype).reshape(*kept.shape, *[1] * (rows.ndim - 2))
    return (rows * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)


def kept_rows(use: Use) -> Tensor | None:
    """The rows [B, S] of a use that are not padding; None when all count."""
    rule = use.rule
    if rule.kind.kept is None:
        return use.kept
    own = _unfold_examples(rule.kind.kept(examples_first(use.inputs, rule.where), rule.options), rule.where)
    return own if use.kept is None else own & use.kept


def output_rows(use: Use, sharing: str) -> Tensor:
    """The output gradients of a use as rows [V, B, S, (q), o]; S = 1 (their sum) for sharing "reduce"."""
    rule = use.rule
    assert rule.kind.output_rows is not None
    assert use.grads is not None
    rows = rule.kind.output_rows(examples_first(use.grads, rule.where, lead=1), rule.options)
    rows = placed(precise(_unfold_examples(rows, rule.where, lead=1)), rule.part.rows)
    return rows.sum(dim=2, keepdim=True) if sharing == "reduce" else rows


def with_constant(rows: Tensor, bias: bool) -> Tensor:
    """Append the homogeneous 1 to input rows."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1) if bias else rows
