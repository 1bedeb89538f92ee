r"""What every loss is made of: the protocol `Loss`, and the machinery that all likelihoods share.

Outputs z have the shape [N, *out], examples first, and D = prod(out) outputs per example. A loss is a sum of terms
over the N examples and their positions, and it is split into one loss per example,

    value = (1/N) Σ_n l_n   for the reductions "mean" and "batchmean",         value = Σ_n l_n   for "sum",

so that every weight of a term (class weights, 1/D of a mean, ...) is inside l_n. In all families of this package

    Λ_n = ∂²l_n/∂z_n² = s ⊗ H(z),       H the Hessian of one unit term,  s ≥ 0 the curvature weight of each term,

so a family is H, a square root of H and a way to draw from the model (`Family`), and the rest is common (`assemble`).
Vectors are computed in at least float32 and returned in the dtype of z. Checks look at shapes and dtypes, and at values
of targets only where they are at hand, so nothing here waits for a device; tensors given as options are read once, when
the loss is made, where they have values to read: not under torch.compile, vmap or another transform. There a loss can
be made as well, and gradients with respect to its weights flow through the value, the score and the curvature. A weight
of exactly zero has the derivative 0 in square roots of the curvature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kfac_func._errors import BatchError, HyperparameterError, TargetError, explain
from kfac_func._tracing import readable

REDUCTIONS = ("mean", "sum", "batchmean")
SLACK = 1e-2  # by which targets may miss the values that have a meaning


class Loss(NamedTuple):
    r"""A loss as pure functions of the outputs z [N, *out] and the targets; l_n and Λ_n as in the module's docstring.

    value          (z, targets) -> scalar, what torch.nn.functional returns for the same options
    score          (z, targets) -> [N, *out], ∂l_n/∂z_n, the gradient of each example's own loss
    noise_shape    (z) -> shape of the uniform noise that one draw takes
    sample         (z, targets, noise) -> pseudo-targets drawn from the model, a deterministic function of noise in
                   [0, 1); noise should be float32 or better also for outputs of low precision
    sampled_score  (z, targets, drawn) -> [N, *out], c_n with E_drawn[c_n c_nᵀ] = Λ_n (targets give only the weights)
    columns        (z) -> D, the number of columns of B_n
    factor         (z, targets, columns=None) -> [K, N, *out], columns of B_n, B_n B_nᵀ = Λ_n: all D of them, or those
                   named by a range or by a 1-D integer tensor. Column k is zero outside its own position.
    root           (z, targets, vector) -> [N, *out], B_n v_n; the columns are never materialised
    signs          (z, targets, noise) -> [N, *out], B_n ε with independent random signs ε = ±1, −1 where noise < ½
    product        (z, targets, vector) -> [N, *out], Λ_n v_n, for products with the Gauss-Newton matrix
    hessian        (z, targets) -> [N, D, D], Λ_n in row-major order of out
    reduction      "mean", "sum" or "batchmean"
    weights        (z, targets) -> s, broadcastable to z, or a number: 0 where a position is ignored

    Every function of targets raises BatchError when z has no examples and TargetError when its arguments do not fit
    each other; `factor` raises HyperparameterError for a range of columns that do not exist. The numbers in a tensor
    of columns are not read: one that does not exist gives a zero column.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    noise_shape: Callable[[Tensor], tuple[int, ...]]
    sample: Callable[[Tensor, Tensor, Tensor], Tensor]
    sampled_score: Callable[[Tensor, Tensor, Tensor], Tensor]
    columns: Callable[[Tensor], int]
    factor: Callable[..., Tensor]
    root: Callable[[Tensor, Tensor, Tensor], Tensor]
    signs: Callable[[Tensor, Tensor, Tensor], Tensor]
    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    hessian: Callable[[Tensor, Tensor], Tensor]
    reduction: str
    weights: Callable[[Tensor, Tensor], Tensor | float] = lambda z, targets: 1.0


class Family(NamedTuple):
    r"""What one likelihood adds: Λ_n = s ⊗ H, with H = R Rᵀ = E_drawn[r rᵀ] for a unit term.

    check     (z, targets) raises when they do not fit
    value     (z, targets) -> scalar
    weights   (z, targets) -> s, broadcastable to z, or a number
    noise_shape (z), sample (z, noise) -> drawn, residual (z, drawn) -> r
    root      (z, e) -> R e
    curve     (z, v) -> H v
    """

    check: Callable[[Tensor, Tensor], None]
    value: Callable[[Tensor, Tensor], Tensor]
    weights: Callable[[Tensor, Tensor], Tensor | float]
    noise_shape: Callable[[Tensor], tuple[int, ...]]
    sample: Callable[[Tensor, Tensor], Tensor]
    residual: Callable[[Tensor, Tensor], Tensor]
    root: Callable[[Tensor, Tensor], Tensor]
    curve: Callable[[Tensor, Tensor], Tensor]


def assemble(family: Family, reduction: str) -> Loss:
    """Make the whole protocol of `Loss` from one likelihood."""

    def opened(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | float]:
        family.check(z, targets)
        return widen(z), family.weights(widen(z), targets)

    def weights(z: Tensor, targets: Tensor) -> Tensor | float:
        return opened(z, targets)[1]

    def value(z: Tensor, targets: Tensor) -> Tensor:
        family.check(z, targets)
        return family.value(z, fitted(targets, z))

    def score(z: Tensor, targets: Tensor) -> Tensor:
        family.check(z, targets)
        return _score(family, reduction, z, targets)

    def sample(z: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        family.check(z, targets)
        check_shape("noise", noise, family.noise_shape(z))
        return family.sample(widen(z), noise)

    def sampled_score(z: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
        wide, s = opened(z, targets)
        check_shape("drawn pseudo-targets", drawn, family.noise_shape(z))
        return (_root(s) * family.residual(wide, drawn)).to(z.dtype)

    def factor(z: Tensor, targets: Tensor, columns: Tensor | range | None = None) -> Tensor:
        wide, s = opened(z, targets)
        chosen = _column_numbers(columns, z)
        return (_root(s) * torch.func.vmap(lambda e: family.root(wide, e))(_basis(chosen, wide))).to(z.dtype)

    def root(z: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        wide, s = opened(z, targets)
        check_shape("vector", vector, tuple(z.shape))
        return (_root(s) * family.root(wide, vector.to(wide.dtype))).to(z.dtype)

    def signs(z: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        family.check(z, targets)
        check_shape("noise", noise, tuple(z.shape))
        return root(z, targets, 1 - 2 * (noise < 0.5).to(z.dtype))

    def product(z: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        wide, s = opened(z, targets)
        check_shape("vector", vector, tuple(z.shape))
        return (s * family.curve(wide, vector.to(wide.dtype))).to(z.dtype)

    def hessian(z: Tensor, targets: Tensor) -> Tensor:
        wide, s = opened(z, targets)
        columns = s * torch.func.vmap(lambda e: family.curve(wide, e))(_basis(_column_numbers(None, z), wide))
        return columns.reshape(len(columns), z.shape[0], len(columns)).movedim(0, 2).to(z.dtype)

    draws = family.noise_shape, sample, sampled_score
    return Loss(value, score, *draws, outputs_per_example, factor, root, signs, product, hessian, reduction, weights)


def _root(s: Tensor | float) -> Tensor | float:
    """√s, with the derivative 0 at s = 0: what is ignored stays ignored."""
    if not isinstance(s, Tensor):
        return s**0.5
    zero = s == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, s).sqrt())


def _score(family: Family, reduction: str, z: Tensor, targets: Tensor) -> Tensor:
    wide = widen(z)
    gradient = torch.func.grad(family.value)(wide, fitted(targets, wide))
    return (gradient if reduction == "sum" else z.shape[0] * gradient).to(z.dtype)


def diagonal_family(
    value: Callable[[Tensor, Tensor], Tensor],
    weights: Callable[[Tensor, Tensor], Tensor | float],
    sample: Callable[[Tensor, Tensor], Tensor],
    residual: Callable[[Tensor, Tensor], Tensor],
    deviation: Callable[[Tensor], Tensor],
) -> Family:
    """A family whose outputs are independent: H = diag(deviation(z)²), one draw and one target per output."""

    def check(z: Tensor, targets: Tensor) -> None:
        check_outputs(z, 1, "[N, ...], examples first")
        if not targets.is_floating_point():
            raise TargetError(
                explain("targets must be floating-point.", got=targets.dtype, options="targets.to(outputs.dtype)")
            )
        check_shape("targets", targets, tuple(z.shape), options="targets.reshape(outputs.shape), if in the same order")

    products = (lambda z, e: deviation(z) * e), (lambda z, v: deviation(z) ** 2 * v)
    return Family(check, value, weights, lambda z: tuple(z.shape), sample, residual, *products)


def example_weight(loss: Loss, examples: int) -> float:
    """The weight of every example's own loss in the value: 1 for "sum", else 1/N.

    >>> example_weight(kf.losses.mse(), 4)
    0.25
    """
    return 1.0 if loss.reduction == "sum" else 1 / examples


def outputs_per_example(z: Tensor) -> int:
    """D, the number of outputs of one example of z [N, *out]."""
    return math.prod(z.shape[1:])


def widen(z: Tensor) -> Tensor:
    """The outputs in at least float32."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def fitted(targets: Tensor, z: Tensor) -> Tensor:
    """Targets that are numbers in a dtype of the outputs: never narrower, and no wider than float32 or the outputs.

    >>> fitted(torch.ones(2, dtype=torch.float64), torch.ones(2)).dtype
    torch.float32
    """
    if not targets.is_floating_point():
        return targets
    dtype = torch.promote_types(targets.dtype, z.dtype)
    return targets.to(min(dtype, widen(z).dtype, key=lambda kind: kind.itemsize))


def check_reduction(reduction: str) -> None:
    """Raise HyperparameterError unless the reduction is one of "mean", "sum" and "batchmean"."""
    if reduction in REDUCTIONS:
        return
    raise HyperparameterError(
        explain(
            f"unknown reduction {reduction!r}.",
            wanted=" or ".join(repr(name) for name in REDUCTIONS),
            why='curvature is that of a scalar, so "none" has no meaning here' if reduction == "none" else None,
        )
    )


def check_weight(name: str, weight: Tensor | None) -> None:
    """Raise HyperparameterError unless an optional weight is a floating tensor and, where it can be read, finite and
    not negative.
    """
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else repr(weight)
        options = 'a tensor of floats; reduction="..." by its name'
        raise HyperparameterError(explain(f"{name} must be a floating-point tensor.", got=got, options=options))
    if readable(weight) and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise HyperparameterError(
            explain(
                f"{name} must be finite and not negative.",
                got=f"a smallest entry of {weight.min().item()} and a largest of {weight.max().item()}",
                why="the curvature of the loss would have no square root",
            )
        )


def check_outputs(z: Tensor, dims: int, wanted: str) -> None:
    """Raise unless z is a floating tensor, not empty, with at least `dims` dimensions, examples first."""
    if not z.is_floating_point():
        raise TargetError(explain("the outputs must be real floating-point numbers.", got=z.dtype))
    if z.dim() < dims:
        raise BatchError(
            explain(
                "the outputs have no batch dimension.",
                got=list(z.shape),
                wanted=wanted,
                options="outputs.unsqueeze(0) for a single example",
            )
        )
    if 0 in z.shape:
        raise BatchError(explain("the batch is empty.", got=list(z.shape), wanted=wanted))


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...], options: str | None = None) -> None:
    """Raise TargetError unless a tensor has the wanted shape; nothing is broadcast."""
    if tuple(tensor.shape) != wanted:
        raise TargetError(
            explain(f"the {name} do not fit the outputs.", got=list(tensor.shape), wanted=list(wanted), options=options)
        )


def _column_numbers(columns: Tensor | range | None, z: Tensor) -> Int[Tensor, " k"]:
    total = outputs_per_example(z)
    if isinstance(columns, Tensor):
        if columns.dim() != 1 or columns.is_floating_point() or columns.dtype == torch.bool:
            raise HyperparameterError(
                explain(
                    "columns must be numbered by a 1-D tensor of integers.",
                    got=f"{columns.dtype} of shape {list(columns.shape)}",
                    options="mask.nonzero().squeeze(1) for a boolean mask",
                )
            )
        return columns.to(z.device)
    chosen = range(total) if columns is None else columns
    if len(chosen) and (min(chosen[0], chosen[-1]) < 0 or max(chosen[0], chosen[-1]) >= total):
        raise HyperparameterError(explain("some columns do not exist.", got=chosen, wanted=f"numbers in [0, {total})"))
    return torch.arange(chosen.start, chosen.stop, chosen.step, device=z.device)


def _basis(numbers: Int[Tensor, " k"], z: Float[Tensor, "n *out"]) -> Float[Tensor, "k *out"]:
    """The unit vectors with these numbers, in the shape of one example."""
    places = torch.arange(outputs_per_example(z), device=z.device)
    return (numbers[:, None] == places).to(z.dtype).reshape(len(numbers), *z.shape[1:])
