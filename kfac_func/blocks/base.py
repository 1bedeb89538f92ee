"""The waist: what layer kinds promise and what curvature structures may ask, and nothing else.

    layer kinds ──►  block uses: inputs a, output gradients g  ──► curvature structures

A *block* is one weight with its optional bias. Every place where the model reads the weight is a *use*. A use carries
the raw layer input and the gradients [V, *output] of V output vectors; its `Kind` knows how to turn both into rows.
Notation of the whole house:

    W̄ = [W | b]                the block as a matrix [o, i + 1]; the homogeneous 1 is last; [q, ...] for q groups
    N, S, T                     examples; shared positions of one use; positions of all uses of a block
    a, g                        rows of one example at one shared position
    V_n = Σ_s g[n,s] ā[n,s]ᵀ    the gradient of example n
    A = 1/(N T) Σ ā āᵀ          G = 1/(N T) Σ g gᵀ          F ≈ T · (G ⊗ A)

The numbers N and T are decided in `estimators/statistics.py` and arrive here as `Block.examples` and `Block.positions`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from torch import Tensor


class Diagonal(NamedTuple):
    """A symmetric matrix that is diagonal: its diagonal [..., d]."""

    values: Tensor


class Blocks(NamedTuple):
    """A symmetric matrix of dense blocks along its diagonal: k equal ones [..., k, b, b], then the rest [..., c, c]."""

    values: Tensor
    rest: Tensor


class Offsets(NamedTuple):
    """A symmetric matrix of patches whose kernel offsets do not mix: index (c, δ) = c·K + δ meets (c', δ') if δ = δ'.

    values [..., K, C, C] are the C x C matrices of the K offsets, rest [..., c, c] that of the last c ∈ {0, 1}
    coordinates (the homogeneous 1).
    """

    values: Tensor
    rest: Tensor


Factor = Tensor | Diagonal | Blocks | Offsets


class Layout(NamedTuple):
    """How the parameter leaves of a block form the array V that structures see. Hashable.

    A matrix block is V [o, i(+1)], or [q, o, i(+1)] when grouped; `order` permutes the weight's dimensions to (q, o,
    i) order. A vector block (scale and shift, or an unclaimed leaf) is V [p], its leaves flattened one after the other.
    """

    name: str  # the tree path of the weight
    kind: str
    weight: str | None  # None: a bias alone, i.e. a layer whose only input is the constant 1
    bias: str | None
    shape: tuple[int, ...]  # of the weight leaf or its view (q, i, o, k...), that `order` permutes; of a lone bias
    order: tuple[int, ...] = ()
    groups: int = 1
    outputs: int = 0  # o per group; p for a vector block
    matrix: bool = True

    @property
    def leaves(self) -> tuple[str, ...]:
        """The tree paths of the block's parameters, weight first."""
        return tuple(path for path in (self.weight, self.bias) if path is not None)

    @property
    def columns(self) -> int:
        """i (+ 1 with a bias), the columns of a matrix block per group."""
        weight = 0 if self.weight is None else prod(self.shape) // max(1, self.groups * self.outputs)
        return weight + (self.bias is not None)

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of V."""
        if not self.matrix:
            return (self.outputs,)
        return (*[self.groups] * (self.groups > 1), self.outputs, self.columns)

    @property
    def empty(self) -> bool:
        """Whether V has no numbers at all (no outputs, or no inputs and no bias), so that there is nothing to solve."""
        return prod(self.size) == 0


class Where(NamedTuple):
    """Where a use keeps the examples: dimension `dim` has `fold` consecutive entries per example; None: not at all."""

    dim: int
    fold: int


class Kind(NamedTuple):
    """The rules of a layer kind. Every function takes arrays with the examples in the first dimension (after V, for g).

    rows(x, options) -> [B, S, (q), i]              the inputs, without the homogeneous 1
    output_rows(g, options) -> [V, B, S, (q), o]    the output gradients
    gradient(x, g, options) -> [(q), o, i] or [p]   Σ over all examples for one output vector (matrix kinds: without
                                                    the bias)
    moment(x, options, bias) -> Factor              Σ_b Σ_s ā āᵀ; of the rows `kept` [B·S] alone, for kinds without a
                                                    kernel
    per_example(x, g, options) -> [V, B, p]         vector kinds only: the gradients V_n of scale and shift
    kept(x, options) -> [B, S] of bool              matrix kinds with padding: the rows that are not padding
    offsets(options) -> K                           matrix kinds with a kernel: i = C·K columns in the order (C, K)
    grid(g) -> (height, width, …)                   matrix kinds with a map: the sizes of S, for g [V, B, *output]
    diagonal                                        whether `moment` is Diagonal

    A vector kind has `rows`, `output_rows`, `moment` None; a matrix kind has `per_example` None.
    """

    name: str
    gradient: Callable[..., Tensor]
    rows: Callable[..., Tensor] | None = None
    output_rows: Callable[..., Tensor] | None = None
    moment: Callable[..., Factor] | None = None
    per_example: Callable[..., Tensor] | None = None
    kept: Callable[..., Tensor] | None = None
    offsets: Callable[..., int] | None = None
    grid: Callable[..., tuple[int, ...]] | None = None
    diagonal: bool = False


class Part(NamedTuple):
    """The rows and the columns of the block's matrix that a use sees, as (start, how many there are in all); None: all
    of them.
    """

    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


class UseRule(NamedTuple):
    """What is static about one use. `transposed`: the use sees the transpose of the block's matrix (tied embedding
    and head).
    """

    kind: Kind
    options: tuple
    where: Where | None
    positions: int  # S, shared positions of one example (padding included)
    width: int = 0  # o, outputs per group of this use, those of rows that it does not see included
    transposed: bool = False
    part: Part = Part()


class Use(NamedTuple):
    """One use: the layer's input and the gradients [V, *output] (None: no output vectors, `forward_only`). `kept`: the
    rows [B, S] that count, where the loss ignores positions; None: all.
    """

    inputs: Tensor
    grads: Tensor | None
    rule: UseRule
    kept: Tensor | None = None


class Block(NamedTuple):
    """All uses of one block in one batch, with the normalisation N and T and the sharing setting (of A and G alone)."""

    layout: Layout
    uses: tuple[Use, ...]
    examples: int  # N
    positions: int  # T, over all uses
    sharing: str = "expand"
    crossed: bool = False  # gradients go from the output of one example to the rows of another
