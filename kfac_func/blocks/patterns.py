"""Which entries of the second moments of rows are kept: all, the diagonal, blocks, or those within a kernel offset."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func.blocks.base import Blocks, Diagonal, Factor, Offsets

Side = Literal["both", "input", "output"]
Oversize = Literal["blocks", "diagonal"]


class Pattern(NamedTuple):
    """What is kept of A and G.

    sua        spatially uncorrelated activations: entries of A between different kernel offsets are left out
    sides      "input" keeps A alone and "output" G alone; the other becomes the identity times its mean eigenvalue
    max_dim    a factor with more rows than this is not dense (None: all are)
    oversize   but "blocks" of at most max_dim rows along the diagonal, or "diagonal"
    centred    the mean rows are kept as well, so that covariances can take the place of second moments
    """

    sua: bool = False
    sides: Side = "both"
    max_dim: int | None = None
    oversize: Oversize = "blocks"
    centred: bool = False

    @property
    def name(self) -> str:
        """What differs from the full factors, for the names of structures."""
        return "".join(f", {key}={value}" for key, value in self._asdict().items() if value != Pattern()._asdict()[key])


def pattern(**options: Any) -> Pattern:
    """A checked pattern. Raises HyperparameterError for unknown values."""
    found = Pattern(**options)
    for name, choices in (("sides", get_args(Side)), ("oversize", get_args(Oversize))):
        if options[name] not in choices:
            raise HyperparameterError(
                explain(f"unknown {name}.", got=repr(options[name]), wanted=" or ".join(map(repr, choices)))
            )
    at_least(1, max_dim=found.max_dim)
    return found


class Form(NamedTuple):
    """The pattern of one factor: `kind` "dense", "diagonal", "identity", "blocks" of `size`, "offsets" (K = `size`)."""

    kind: str = "dense"
    size: int = 0


def moment(rows: Tensor, form: Form) -> Factor:
    """Σ row rowᵀ over rows [K, d] or [K, q, d], as far as `form` keeps it."""
    if form.kind in ("diagonal", "identity"):
        values = rows.square().sum(dim=0)
        return Diagonal(values if form.kind == "diagonal" else values.mean(-1, keepdim=True).expand_as(values).clone())
    if form.kind == "dense":
        return second_moment(rows)
    width = rows.shape[-1] // form.size * form.size
    main, rest = rows[..., :width], rows[..., width:]
    parts = main.unflatten(-1, (-1, form.size))
    parts = parts if form.kind == "blocks" else parts.mT
    values = torch.einsum("k...ni,k...nj->...nij", parts, parts)
    return (Blocks if form.kind == "blocks" else Offsets)(values, torch.einsum("k...i,k...j->...ij", rest, rest))


def form_for(pattern: Pattern, size: int, kept: bool, offsets: int = 1) -> Form:
    """The form of a factor of `size` rows: of inputs with K = `offsets` kernel offsets, or of outputs; `kept` as
    `sides` says.
    """
    if not kept:
        return Form("identity")
    if pattern.sua and offsets > 1:
        return Form("offsets", offsets)
    if pattern.max_dim is None or size <= pattern.max_dim:
        return Form()
    count = -(-size // pattern.max_dim)
    return Form("diagonal") if pattern.oversize == "diagonal" else Form("blocks", -(-size // count))


def form_of(factor: Factor) -> Form:
    """The form that made a factor."""
    if isinstance(factor, Diagonal):
        return Form("diagonal")
    if isinstance(factor, Blocks):
        return Form("blocks", factor.values.shape[-1])
    return Form("offsets", factor.values.shape[-3]) if isinstance(factor, Offsets) else Form()


def second_moment(rows: Tensor) -> Tensor:
    """Σ over all leading dimensions of row rowᵀ: [..., (q), d] -> [(q), d, d], `rows` given as [K, d] or [K, q, d]."""
    if rows.ndim > 2:
        return torch.einsum("kqi,kqj->qij", rows, rows)
    if HALVED <= rows.shape[1] <= rows.shape[0]:
        return _by_halves(rows)
    return rows.mT @ rows


HALVED = 288  # columns from which three products of halves are faster than one of all, if there are as many rows


def _by_halves(rows: Tensor) -> Tensor:
    left, right = rows.tensor_split(2, dim=1)
    corner = left.mT @ right
    top = torch.cat([second_moment(left), corner], dim=1)
    return torch.cat([top, torch.cat([corner.mT, second_moment(right)], dim=1)])


def map_moment(rows: Tensor) -> Tensor:
    """Σ row rowᵀ over rows [V, B, S, o] that are columns in memory, as the channels of a map [V, B, o, *size] are:
    image by image, without a copy, where images are large and channels few.
    """
    images, (positions, channels) = rows.flatten(0, 1), rows.shape[-2:]
    if channels <= CHANNELS and positions >= channels:
        return (images.mT @ images).sum(dim=0)
    return second_moment(images.flatten(0, 1))


CHANNELS = 64  # up to which a product per image is faster than one of all after a copy
