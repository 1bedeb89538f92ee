r"""Coarse spaces of two-level methods: which vectors z, and what goes together.

Sources: Tselepidis et al. 2020 (2011.00573); Koroko et al. 2023 (2303.18083).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_func._errors import HyperparameterError, StateError, explain
from kfac_func._tree import nodes
from kfac_func.blocks import Block, KroneckerState, Pairs, densify, merged
from kfac_func.linalg.galerkin import Vectors
from kfac_func.linalg.sums import Terms

Space: TypeAlias = Callable[[Vectors], Vectors]
"""ones (an array like V for every block, filled with 1) -> one vector [*shape] or several [k, *shape] per block."""

CoarseSpace = Literal["nicolaides", "residual", "spectral", "tselepidis"]
Form = Literal["residual", "additive"]
Resample = Literal["nearest", "area"]


class Level(NamedTuple):
    """The options of a coarse level."""

    space: str | Space
    form: str
    weights: tuple[float, float]
    krylov: bool
    resample: str

    @property
    def fixed(self) -> bool:
        """Whether the vectors depend on nothing but shapes, so that what F does to them can be averaged."""
        return not self.krylov and self.space not in ("residual", "spectral")

    @property
    def base(self) -> Space | None:
        """The function that gives the vectors, or those that Krylov enrichment starts from."""
        if callable(self.space):
            return self.space
        return nicolaides if self.space in ("nicolaides", "tselepidis") else None


def checked(level: Level) -> Level:
    """The options, if they have a meaning together."""
    known = callable(level.space) or level.space in get_args(CoarseSpace)
    for name, value, good, wanted in (
        ("coarse", level.space, known, f"{', '.join(map(repr, get_args(CoarseSpace)))} or a function"),
        ("form", level.form, level.form in get_args(Form), "'residual' or 'additive'"),
        ("resample", level.resample, level.resample in get_args(Resample), "'nearest' or 'area'"),
        ("weights", level.weights, len(level.weights) == 2 and all(map(isfinite, level.weights)), "two finite numbers"),
    ):
        if not good:
            raise HyperparameterError(explain(f"unknown {name} of two_level.", got=repr(value), wanted=wanted))
    if level.krylov and level.space not in ("nicolaides", "residual"):
        raise HyperparameterError(
            explain(
                f"krylov=True and coarse={level.space!r} contradict one another.",
                wanted="coarse='nicolaides' or coarse='residual'",
                options="leave out krylov; or return both vectors from a function",
            )
        )
    if level.space == "tselepidis" and level.form != "additive":
        raise HyperparameterError(
            explain(
                "coarse='tselepidis' and form='residual' contradict one another.",
                why="Kronecker factors between blocks say nothing of F ζ",
                options="form='additive'; or coarse='nicolaides', the same vectors with the exact F",
            )
        )
    return level


# ------------------------------------------------------------------ which vectors


def nicolaides(ones: Vectors) -> Vectors:
    """z = 1, one per block."""
    return ones


def spanned(space: Space, rows: dict[str, Pairs], blocks: dict[str, Block]) -> Vectors:
    """The vectors of a space that needs nothing but the shapes, normalised. Raises StateError for wrong ones."""
    shapes = {name: _shape(part, blocks[name]) for name, part in rows.items()}
    found = space({name: rows[name].left.new_ones(shape) for name, shape in shapes.items()})
    for name, z in found.items():
        shape = shapes.get(name, ())
        if not shape or z.ndim - len(shape) not in (0, 1) or z.shape[z.ndim - len(shape) :] != shape:
            raise StateError(
                explain(
                    f"the coarse space has vectors for {name!r} that do not fit.",
                    got=list(z.shape),
                    wanted=", ".join(f"{key!r}: {list(shape)}" for key, shape in list(shapes.items())[:10]),
                    options="one vector shaped like V, or several with one more dimension in front",
                )
            )
    return normalised({name: z.reshape(-1, *shapes[name]) for name, z in found.items()})


def _shape(rows: Pairs, block: Block) -> tuple[int, ...]:
    outputs, inputs = rows.left.shape[3:], rows.right.shape[-1:]
    return (*outputs, *inputs) if block.layout.matrix else tuple(outputs)


def spectral(states: dict[str, Any]) -> Vectors:
    """Per block the eigenvector of the smallest eigenvalue of G ⊗ A, from the state of whatever structure knows A and
    G; of a diagonal, the coordinate of the smallest entry. Raises StateError for others.
    """
    return {name: _lowest(name, state).unsqueeze(0) for name, state in states.items()}


def _lowest(name: str, state: Any) -> Tensor:
    squares = getattr(state, "squares", None)
    if isinstance(squares, Tensor):
        return F.one_hot(squares.flatten().argmin(), squares.numel()).to(squares.dtype).reshape(squares.shape)
    factors, terms = nodes(state, KroneckerState), nodes(state, Terms)
    if factors:
        a, g = (densify(x) for x in merged(factors[0])[:2])
    elif terms:
        a, g = terms[0].r[0], terms[0].s[0]
    else:
        raise StateError(
            explain(
                f"the spectral coarse space finds no Kronecker factors in block {name!r}.",
                got=type(state).__name__,
                options="an inner curvature of kronecker(), eigen(), kpsvd() or diagonal(); or another coarse space",
            )
        )
    (a_values, a_basis), (g_values, g_basis) = (torch.linalg.eigh(x) for x in (a, g))
    z = torch.einsum("...o,...i->...oi", g_basis[..., 0], a_basis[..., 0])
    if z.ndim == 2:
        return z
    lowest = (g_values[:, 0] * a_values[:, 0]).argmin()
    return z * F.one_hot(lowest, len(z)).to(z.dtype)[:, None, None]


def normalised(zs: Vectors) -> Vectors:
    """Every vector with largest entry 1; a zero vector stays zero."""
    return {name: z / _largest(z) for name, z in zs.items()}


def _largest(z: Tensor) -> Tensor:
    most = z.abs().flatten(1).amax(1)
    return torch.where(most > 0, most, 1.0)[(..., *[None] * (z.ndim - 1))]


def enriched(zs: Vectors, solve: Callable[[Vectors], Vectors]) -> Vectors:
    """{z, M⁻¹z} for every vector, M the inner curvature."""
    count = max(len(z) for z in zs.values())
    solved = [solve({name: z[k] for name, z in zs.items() if k < len(z)}) for k in range(count)]
    more = normalised({name: torch.stack([vs[name] for vs in solved[: len(z)]]) for name, z in zs.items()})
    return {name: torch.cat([z.to(more[name].dtype), more[name]]) for name, z in zs.items()}
