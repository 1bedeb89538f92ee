r"""The quadratic model of an objective on the span of a few directions: the exact GGN by one jvp per direction.

M(δ) = ½ δᵀ(F + γR)δ + ∇hᵀδ,    δ = Σ_k w_k v_k        A_jk = v_jᵀFv_k = (1/N) Σ_n (J_n v_j)ᵀ Λ_n (J_n v_k)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, TreeMismatchError, explain
from kfac_func._tracing import without_autocast
from kfac_func._typing import Model, PyTree
from kfac_func.capture import as_pair, finder, tensor_of
from kfac_func.losses import Loss, example_weight
from kfac_func.products.linear import careful, linearize
from kfac_func.transforms.masks import Mask, selected


class Form(NamedTuple):
    """A quadratic model on K directions V, float64.

    curvature  A [K, K] = VᵀFV             l2     γ VᵀRV [K, K]          damping  VᵀΛV [K, K]
    slope      b [K] = Vᵀ∇h                value  h(θ), on the examples that the model looks at
    """

    curvature: Float[Tensor, "k k"]
    l2: Float[Tensor, "k k"]
    damping: Float[Tensor, "k k"]
    slope: Float[Tensor, " k"]
    value: Float[Tensor, ""]

    def change(self, w: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """M(Vw) − M(0) = ½ wᵀ(A + γR)w + bᵀw, without damping."""
        return 0.5 * w @ (self.curvature + self.l2) @ w + self.slope @ w

    def minimizer(self, fixed: Sequence[Any]) -> Float[Tensor, " k"]:
        """w that minimises M(Vw) + ½ (Vw)ᵀΛ(Vw), with the coefficients that are not None held fixed.

        A direction that is zero, or depends on those before it, gets the coefficient 0.
        """
        matrix = self.curvature + self.l2 + self.damping
        given = [torch.as_tensor(0.0 if c is None else c, dtype=matrix.dtype, device=matrix.device) for c in fixed]
        w, free = torch.stack(given), [k for k, c in enumerate(fixed) if c is None]
        if not free:
            return w
        inner = torch.stack([torch.stack([matrix[j, k] for k in free]) for j in free])
        found = solve_semidefinite(inner, torch.stack([(self.slope + matrix @ w)[k] for k in free]))
        return torch.stack([-found[free.index(k)] if k in free else w[k] for k in range(len(fixed))])


class QuadraticModel(NamedTuple):
    """An objective h and its quadratic model: what `scale_by_quadratic_model` and `adapt_damping` share.

    form     (params, batch, directions, gradient of the loss, damping=0) -> Form; λ as one number or by leaf path
    value    (params, batch) -> h(θ), float64, on the whole batch
    penalty  params -> γ/2 θᵀRθ, float64
    """

    form: Callable[..., Form]
    value: Callable[[PyTree, Any], Tensor]
    penalty: Callable[[PyTree], Tensor]


def quadratic_model(
    fn: Model, loss: Loss, *, l2: float = 0.0, mask: Mask | None = None, examples: int | float = 1.0
) -> QuadraticModel:
    r"""The objective h(θ) = L(θ) + γ/2 θᵀRθ and its quadratic model, with the exact GGN of L as F.

        M(δ) = ½ δᵀ(F + γR)δ + ∇h(θ)ᵀδ          one jvp of `fn` per direction, no matrix

    fn, loss   as in `value_grad_and_stats`; F is that of the loss in its own normalisation
    l2, mask   γ ≥ 0 and the leaves that the diagonal R of zeros and ones covers: `mask` as in `masked`, default all.
               The gradients that are passed are those of L alone; γRθ is added here
    examples   look at the first examples of a batch only: so many of them (an int), or this part of them (a float in
               (0, 1]). The curvature of a model on few examples is noisy, its slope is not: it is made of the gradient

    Raises HyperparameterError for values without meaning, TreeMismatchError for directions unlike the parameters.
    Attention runs in its mathematical form, because fused kernels have no forward derivative.
    Source: Martens & Grosse 2015 (1503.05671), §6.4 and §7.

        >>> fn = lambda p, x: x * p["w"]
        >>> model = kf.quadratic_model(fn, kf.losses.mse())
        >>> batch = torch.ones(4, 1), torch.zeros(4, 1)
        >>> form = model.form({"w": torch.tensor([2.0])}, batch, [{"w": torch.ones(1)}], {"w": torch.tensor([4.0])})
        >>> form.minimizer([None]).item(), form.value.item()
        (-2.0, 4.0)
    """
    if not (isinstance(l2, (int, float)) and 0 <= l2 < float("inf")):
        raise HyperparameterError(explain("l2 must be a number, finite and not negative.", got=repr(l2)))
    if mask is not None and l2 == 0:
        raise HyperparameterError(
            explain(
                "mask and l2 contradict each other.", got="a mask and l2=0", options="l2=1e-5; or leave out the mask"
            )
        )
    if not (0 < examples <= 1 or (isinstance(examples, int) and examples >= 1)):
        raise HyperparameterError(
            explain("examples has a value that has no meaning.", got=examples, wanted="an int, or a float in (0, 1]")
        )

    fn = careful(fn)
    first = _firsts(fn, examples)

    def covered(params: PyTree) -> dict[str, Any]:
        return {path: l2 * meant for path, meant in selected(mask, params).items()} if l2 else {}

    def penalty(params: PyTree) -> Tensor:
        return 0.5 * _dots([_tree.leaves(params)], list(_tree.unique_paths(params)), covered(params))[0, 0]

    @without_autocast
    def value(params: PyTree, batch: Any) -> Tensor:
        inputs, targets = as_pair(batch)
        return loss.value(tensor_of(fn(params, inputs)), targets).to(torch.float64) + penalty(params)

    @without_autocast
    def form(params: PyTree, batch: Any, directions: Sequence[PyTree], gradient: PyTree, damping: Any = 0.0) -> Form:
        inputs, targets = first(params, batch)
        leaves, paths, pulled = _tree.leaves(params), list(_tree.unique_paths(params)), covered(params)
        vs, own = [_like(params, v) for v in directions], _like(params, gradient)
        z, dzs = _pushed(fn, params, inputs, vs)
        products = torch.func.vmap(lambda dz: loss.product(z, targets, dz))(dzs).flatten(1).to(torch.float64)
        curvature = example_weight(loss, len(z)) * dzs.flatten(1).to(torch.float64) @ products.mT
        decayed = _dots([leaves, *vs], paths, pulled)
        return Form(
            curvature=(curvature + curvature.mT) / 2,
            l2=decayed[1:, 1:],
            damping=_dots(vs, paths, damping),
            slope=_dots([own, *vs], paths, 1.0)[0, 1:] + decayed[0, 1:],
            value=loss.value(z, targets).to(torch.float64) + 0.5 * decayed[0, 0],
        )

    return QuadraticModel(form, value, penalty)


def _firsts(fn: Model, examples: int | float) -> Callable[[PyTree, Any], tuple[Any, Any]]:
    """(params, batch) -> the first examples of the batch. Raises HyperparameterError where they cannot be cut off."""
    found = finder(fn)

    def first(params: PyTree, batch: Any) -> tuple[Any, Any]:
        inputs, targets = as_pair(batch)
        if examples == 1.0 and isinstance(examples, float):
            return inputs, targets
        cut, mixing = found(params, inputs)
        if mixing or cut.whole:
            why = mixing or "the model takes it as a whole"
            raise HyperparameterError(
                explain("a part of the batch is another batch.", got=f"examples={examples}", why=why, options="1.0")
            )
        count = examples if isinstance(examples, int) else math.ceil(examples * cut.count(inputs))
        return cut.part(inputs, 0, count), _tree.tree_map(lambda x: x[:count], targets)

    return first


def _like(params: PyTree, tree: PyTree) -> list[Tensor]:
    """The leaves of a tree like the parameters, zeros where it has none."""
    found, wanted = _tree.unique_paths(tree), _tree.unique_paths(params)
    unlike = [path for path, leaf in found.items() if path not in wanted or leaf.shape != wanted[path].shape]
    if unlike:
        raise TreeMismatchError(
            explain(
                "a direction or gradient of the quadratic model is not like the parameters.",
                got=", ".join(f"{path!r} of shape {list(found[path].shape)}" for path in unlike[:5]),
                options="pass trees with the structure of the parameters; leaves may be None",
            )
        )
    return [found.get(path, torch.zeros_like(leaf)) for path, leaf in wanted.items()]


def _dots(trees: Sequence[list[Tensor]], paths: list[str], weights: Any) -> Float[Tensor, "k k"]:
    """Σ_leaf weight_leaf ⟨x_j, x_k⟩ over lists of leaves, float64; a leaf without a weight counts 0."""
    total = torch.zeros(len(trees), len(trees), dtype=torch.float64, device=trees[0][0].device)
    for path, *leaves in zip(paths, *trees, strict=True):
        weight = weights.get(path) if isinstance(weights, Mapping) else weights
        if weight is None or (isinstance(weight, (int, float)) and weight == 0):
            continue
        kind = torch.promote_types(leaves[0].dtype, torch.float32)
        rows = [leaf.reshape(-1).to(kind) for leaf in leaves]
        lower = [[torch.dot(x, y).to(total) for y in rows[: j + 1]] for j, x in enumerate(rows)]
        gram = [torch.stack([lower[max(j, k)][min(j, k)] for k in range(len(rows))]) for j in range(len(rows))]
        total = total + (weight.to(total) if isinstance(weight, Tensor) else weight) * torch.stack(gram)
    return total


def _pushed(fn: Model, params: PyTree, inputs: Any, vs: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """z and J v for every direction [K, N, *out]: forwards, or backwards twice where torch cannot."""

    def outputs(leaves: list[Tensor]) -> Tensor:
        return tensor_of(fn(_tree.with_leaves(params, leaves), inputs))

    def pushed(v: list[Tensor]) -> tuple[Tensor, Tensor]:
        tangents = [t.to(x.dtype) for t, x in zip(v, leaves, strict=True)]
        z, dz = torch.func.jvp(outputs, (leaves,), (tangents,))  # pyright: ignore[reportAssignmentType]
        return z, dz

    leaves = _tree.leaves(params)
    with contextlib.nullcontext() if torch.compiler.is_compiling() else sdpa_kernel(SDPBackend.MATH):
        try:
            runs = [pushed(v) for v in vs]
        except NotImplementedError:
            at = linearize(fn, params, inputs)
            return at.outputs, torch.stack([at.push(_tree.with_leaves(params, v)) for v in vs])
    return runs[0][0], torch.stack([dz for _, dz in runs])


def solve_semidefinite(matrix: Float[Tensor, "k k"], b: Float[Tensor, " k"], tolerance: float = 1e-10) -> Tensor:
    """x with M x = b for a small semidefinite M, by elimination; a row that depends on those before it gets x = 0.

    No value is read, so nothing waits for a device. `tolerance` is relative to the diagonal.

    >>> solve_semidefinite(torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.tensor([4.0, 4.0]))
    tensor([2., 0.])
    """
    scale, rows, alive = matrix.diagonal(), torch.arange(len(b), device=b.device), []
    for k in range(len(b)):
        pivot = matrix[k, k]
        alive.append(~(pivot <= tolerance * scale[k]))
        factor = torch.where(alive[k], matrix[:, k] / torch.where(alive[k], pivot, 1.0), 0.0)
        factor = torch.where(rows == k, 0.0, factor)
        matrix, b = matrix - factor[:, None] * matrix[k], b - factor * b[k]
    live = torch.stack(alive)
    return torch.where(live, b / torch.where(live, matrix.diagonal(), 1.0), 0.0)
