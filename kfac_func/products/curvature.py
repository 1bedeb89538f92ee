r"""Products with curvature matrices, never formed: the Hessian, the Gauss-Newton matrix and the Fisher.

    H = ∂²L/∂θ²            F = w Σ_n J_nᵀ Λ_n J_n            w = 1/N, or 1 for a loss with reduction "sum"

L, Λ_n and F are those of the loss in its own normalisation, as in `value_grad_and_stats`. Every function here is made
in two steps: `made = ggn_vp(fn, loss)`, then `product = made(params, batch)` runs the model once and linearises it, and
every `product(v)` reuses that graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import BatchError, HyperparameterError, explain
from kfac_func._tracing import known_bad
from kfac_func._typing import Model, PyTree
from kfac_func.capture import as_pair, tensor_of
from kfac_func.estimators import Estimator, exact
from kfac_func.estimators.vectors import noise_for
from kfac_func.losses import Loss, checked_loss, example_weight
from kfac_func.products.linear import Linear, careful, like, linearize, mathematical, some, transpose

Product = Callable[[PyTree], PyTree]
"""A linear map from trees like the parameters to such trees."""


def hvp(fn: Model, loss: Loss) -> Callable[[PyTree, Any], Product]:
    r"""Hessian-vector products: `hvp(fn, loss)(params, (inputs, targets))` runs the model once and gives v ↦ H v.

        H v = ∂/∂θ ⟨∂L/∂θ, v⟩,     L the value of the loss on the batch

    v     a tree like the parameters; a None leaf counts as zeros. The product is a tree like the parameters, in their
          dtypes, in units of the loss per squared unit of a parameter

    Composes with vmap over stacked vectors and with grad. Attention runs in its mathematical form. The padding row of
    an embedding, and what the model detaches, are constants as for the gradient. Raises BatchError for an empty batch
    or a gradient with NaN, TreeMismatchError for a v unlike the parameters, HyperparameterError for
    a v with NaN, CaptureError for a model that writes into its parameters. Source: Pearlmutter 1994.

        >>> fn = lambda p, x: x * p["w"]
        >>> product = kf.products.hvp(fn, kf.losses.mse())({"w": torch.ones(1)}, (torch.ones(4, 1), torch.zeros(4, 1)))
        >>> product({"w": torch.tensor([3.0])})
        {'w': tensor([6.])}
    """
    fn, loss = careful(fn), checked_loss(loss)

    def made(params: PyTree, batch: Any) -> Product:
        inputs, targets = as_pair(batch)
        some(fn, inputs)

        def value(leaves: list[Tensor]) -> Tensor:
            return loss.value(tensor_of(fn(_tree.with_leaves(params, leaves), inputs)), targets)

        with mathematical():
            gradient, pullback = transpose(torch.func.grad(value), _tree.leaves(params))
        if known_bad(gradient):
            raise BatchError(
                explain(
                    "the gradient of the loss is not finite.",
                    why="every product with the Hessian would be NaN",
                    options="look for NaN in the parameters, in the inputs and in the targets",
                )
            )
        return lambda vector: _tree.with_leaves(params, pullback(like(params, vector)))

    return made


def ggn_vp(fn: Model, loss: Loss) -> Callable[[PyTree, Any], Product]:
    r"""Gauss-Newton-vector products: `ggn_vp(fn, loss)(params, (inputs, targets))` runs the model once and gives
    v ↦ G v.

        G v = w Σ_n J_nᵀ Λ_n J_n v,     Λ_n = ∂²l_n/∂z_n²,     w = 1/N, or 1 for a loss with reduction "sum"

    v     a tree like the parameters; a None leaf counts as zeros. The product is a tree like the parameters, in their
          dtypes, in units of the loss per squared unit of a parameter

    This is the Fisher for all losses of this library. Composes with vmap over stacked vectors and with grad. Raises
    BatchError for an empty batch, outputs that are no tensor [N, ...] or have NaN, CaptureError for a model that writes
    into its parameters, TargetError for targets that do not fit, TreeMismatchError for a v unlike the parameters,
    HyperparameterError for a v with NaN.
    Source: Schraudolph 2002; Martens 2020 (1412.1193), §8.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> product = kf.products.ggn_vp(fn, kf.losses.mse())(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> product({"weight": None, "bias": torch.ones(2)})["weight"]
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    return fisher_vp(fn, loss)


def fisher_vp(fn: Model, loss: Loss, estimator: Estimator | None = None) -> Callable[..., Product]:
    r"""Fisher-vector products: `fisher_vp(fn, loss, estimator)(params, (inputs, targets))` runs the model once and
    gives v ↦ F v.

        F v = w Σ_n Σ_c J_nᵀ c_n c_nᵀ J_n v,     w = 1/N, or 1 for a loss with reduction "sum"

    estimator  where the output vectors c come from. None or `exact()`: Σ_c c cᵀ = Λ_n itself, without the vectors;
               `monte_carlo(m)`, `curvature_prop(m)`: drawn once, so that the operator is fixed; `empirical()`: the
               gradient of each example's own loss, (1/N) Σ_n g_n g_nᵀ
    v          as in `ggn_vp`, and so are composition and errors

    The first step takes further `generator`, a torch.Generator for estimators that draw, or `noise`, the uniform
    numbers in [0, 1) themselves (under vmap). Raises further HyperparameterError when a draw has neither, and for
    `forward_only`, which has no output vectors.
    Source: Martens 2020 (1412.1193), §5 and §11; Kunstner et al. 2019 (1905.12558).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> made = kf.products.fisher_vp(fn, kf.losses.cross_entropy(), kf.estimators.monte_carlo())
        >>> batch = torch.ones(5, 3), torch.zeros(5, dtype=torch.long)
        >>> product = made(params, batch, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(product(params)["weight"], product(params)["weight"])
        True
    """
    fn, loss = careful(fn), checked_loss(loss)

    def made(
        params: PyTree,
        batch: Any,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Product:
        at, curved = metric(fn, loss, estimator, params, batch, generator, noise)
        return lambda vector: at.pull(curved(at.push(vector)))

    return made


class Factor(NamedTuple):
    """A square root B of the Gauss-Newton matrix G = B Bᵀ.

    times       u [N, *out] ↦ B u, a tree like the parameters
    transposed  v, a tree like the parameters ↦ Bᵀ v [N, *out]
    """

    times: Callable[[Tensor], PyTree]
    transposed: Callable[[PyTree], Tensor]


def ggn_factor(fn: Model, loss: Loss) -> Callable[[PyTree, Any], Factor]:
    r"""A square root of the Gauss-Newton matrix: `ggn_factor(fn, loss)(params, (inputs, targets))` runs the model once
    and gives B and Bᵀ.

        G = B Bᵀ,     B u = √w Σ_n J_nᵀ B_n u_n,     (Bᵀ v)_n = √w B_nᵀ J_n v,     B_n B_nᵀ = Λ_n

    u     [N, *out], one number per output; white u give B u the covariance G
    v     a tree like the parameters; a None leaf counts as zeros

    Both are linear and compose with vmap and grad. Raises what `ggn_vp` raises, and TargetError for a u of another
    shape. Source: kfac_jax's multiply_ggn_factor; Martens & Grosse 2015 (1503.05671), §2.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.ones(5, 3), torch.zeros(5, 2)
        >>> factor = kf.products.ggn_factor(fn, kf.losses.mse())(params, batch)
        >>> both = factor.times(factor.transposed(params))
        >>> torch.allclose(both["bias"], kf.products.ggn_vp(fn, kf.losses.mse())(params, batch)(params)["bias"])
        True
    """
    fn, loss = careful(fn), checked_loss(loss)

    def made(params: PyTree, batch: Any) -> Factor:
        inputs, targets = as_pair(batch)
        at = linearize(fn, params, inputs)
        z, scale = at.outputs, example_weight(loss, len(at.outputs)) ** 0.5

        def root(u: Tensor) -> Tensor:
            return scale * loss.root(z, targets, u)

        _, transposed = transpose(root, torch.zeros_like(z))
        return Factor(lambda u: at.pull(root(u)), lambda v: transposed(at.push(v)))

    return made


def metric(
    fn: Model,
    loss: Loss,
    estimator: Estimator | None,
    params: PyTree,
    batch: Any,
    generator: torch.Generator | None,
    noise: Tensor | None,
) -> tuple[Linear, Callable[[Tensor], Tensor]]:
    """The model at a point, and the curvature of its outputs there: u ↦ w Λ u, or w Σ_c c cᵀ u, [N, *out]."""
    inputs, targets = as_pair(batch)
    source = exact() if estimator is None else estimator
    at = linearize(fn, params, inputs)
    z, weight = at.outputs, example_weight(loss, len(at.outputs))
    if source.whole:
        return at, lambda u: weight * loss.product(z, targets, u)
    noise = noise_for(source, loss, z, generator, noise)
    chunks = [c.reshape(*c.shape[:2], -1) for c in source.vectors(loss, z, targets, noise)]
    if not chunks:
        raise HyperparameterError(
            explain(
                f"the estimator {source.name} has no output vectors, so there is no matrix to multiply with.",
                options="exact(), monte_carlo(), curvature_prop() or empirical()",
            )
        )
    c = torch.cat(chunks)

    def product(u: Tensor) -> Tensor:
        along = torch.einsum("vnd,nd->vn", c, u.reshape(c.shape[1:]))
        return weight * torch.einsum("vnd,vn->nd", c, along).reshape(z.shape)

    return at, product
