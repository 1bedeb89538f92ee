r"""Quadratic forms in a curvature: scalars vᵀFv and Gram matrices VᵀFV.

For F = w Σ_n J_nᵀ Λ_n J_n, v_jᵀ F v_k = w Σ_n (J_n v_j)ᵀ Λ_n (J_n v_k) takes one J v per vector and no pullback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import Model, PyTree
from kfac_func.estimators import Estimator
from kfac_func.losses import Loss, checked_loss
from kfac_func.losses.base import widen
from kfac_func.products.curvature import Product, metric
from kfac_func.products.linear import careful
from kfac_func.transforms import tree_vdot
from kfac_func.transforms.base import safe_sqrt


def quadratic_form(product: Product, vector: PyTree) -> Float[Tensor, ""]:
    """vᵀ M v for any product M, such as `hvp(...)(params, batch)`, in at least float32.

    vector    a tree like the parameters; a None leaf counts as zeros

    Raises what the product raises.

        >>> kf.products.quadratic_form(lambda v: [2 * x for x in v], [torch.ones(3)])
        tensor(6.)
    """
    return tree_vdot(vector, product(vector))


def quadratic_forms(product: Product, vectors: Sequence[PyTree]) -> Float[Tensor, "k k"]:
    """The Gram matrix VᵀMV [K, K] of K vectors in the metric of any symmetric product M: K products.

    Entry (j, k) is v_jᵀ M v_k. For the Gauss-Newton matrix and the Fisher `fisher_forms` takes half the time. Raises
    HyperparameterError without vectors, and what the product raises.

        >>> kf.products.quadratic_forms(lambda v: [2 * x for x in v], [[torch.ones(3)], [torch.arange(3.0)]])
        tensor([[ 6.,  6.],
                [ 6., 10.]])
    """
    products = [product(v) for v in _some(vectors)]
    return torch.stack([torch.stack([tree_vdot(v, moved) for moved in products]) for v in vectors])


def fisher_forms(
    fn: Model, loss: Loss, estimator: Estimator | None = None
) -> Callable[..., Callable[[Sequence[PyTree]], Tensor]]:
    r"""Gram matrices in the metric of the Fisher: `fisher_forms(fn, loss)(params, (inputs, targets))` runs the model
    once and gives [v_1, …, v_K] ↦ VᵀFV [K, K].

        (VᵀFV)_jk = w Σ_n (J_n v_j)ᵀ Λ_n (J_n v_k),     w = 1/N, or 1 for a loss with reduction "sum"

    estimator  as in `fisher_vp`; None or `exact()` gives the Gauss-Newton matrix
    vectors    a list of trees like the parameters; a None leaf counts as zeros

    Exactly symmetric, in at least float32. The first step takes further `generator` or `noise`, as in `fisher_vp`, and
    raises the same errors; HyperparameterError without vectors.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> forms = kf.products.fisher_forms(fn, kf.losses.mse())(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> forms([{"weight": None, "bias": torch.ones(2)}, {"weight": torch.ones(2, 3), "bias": None}])
        tensor([[ 2.,  6.],
                [ 6., 18.]])
    """
    fn, loss = careful(fn), checked_loss(loss)

    def made(
        params: PyTree,
        batch: Any,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Callable[[Sequence[PyTree]], Tensor]:
        at, curved = metric(fn, loss, estimator, params, batch, generator, noise)

        def forms(vectors: Sequence[PyTree]) -> Tensor:
            pushed = [at.push(v) for v in _some(vectors)]
            left = widen(torch.stack(pushed).flatten(1))
            gram = left @ widen(torch.stack([curved(u) for u in pushed]).flatten(1)).mT
            return (gram + gram.mT) / 2

        return forms

    return made


def kl_quadratic(fn: Model, loss: Loss) -> Callable[[PyTree, Any], Callable[[PyTree], Tensor]]:
    r"""The quadratic approximation of a Kullback-Leibler divergence: `kl_quadratic(fn, loss)(params, (inputs,
    targets))` runs the model once and gives v ↦ ½ vᵀFv.

        (1/N) Σ_n KL(p_θ(y | x_n) ‖ p_{θ+v}(y | x_n)) = ½ vᵀFv + O(‖v‖³),     the sum over n for reduction "sum"

    v     a tree like the parameters; a None leaf counts as zeros. The value is a scalar, in nats

    p is the likelihood whose negative log is the loss: of a `mse` with scale s per element, a Gaussian of variance
    1/(2s). A loss with weights, or one that averages over outputs, weighs its terms here too; "batchmean" sums them.
    Raises what `ggn_vp` raises. Source: Amari 1998; Martens 2020 (1412.1193), §5.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.ones(5, 3), torch.zeros(5, 2)
        >>> distance = kf.products.kl_quadratic(fn, kf.losses.mse(reduction="batchmean", scale=0.5))(params, batch)
        >>> distance({"weight": None, "bias": torch.tensor([0.1, 0.0])})
        tensor(0.0050)
    """
    fn, loss = careful(fn), checked_loss(loss)

    def made(params: PyTree, batch: Any) -> Callable[[PyTree], Tensor]:
        forms = fisher_forms(fn, loss)(params, batch)
        return lambda vector: 0.5 * forms([vector])[0, 0]

    return made


def fisher_rao_norm(fn: Model, loss: Loss) -> Callable[[PyTree, Any], Tensor]:
    r"""The Fisher-Rao norm of the parameters: `fisher_rao_norm(fn, loss)(params, (inputs, targets))`, a scalar.

        ‖θ‖_FR = √(θᵀFθ),     F = w Σ_n J_nᵀ Λ_n J_n at θ

    In the square root of the units of the loss. Its derivative is 0 where it is 0. Raises what `ggn_vp` raises.
    Source: Liang, Poggio, Rakhlin & Stokes 2019 (1711.01530), §3.

        >>> fn, loss = lambda p, x: x * p["w"], kf.losses.mse(reduction="batchmean", scale=0.5)
        >>> kf.products.fisher_rao_norm(fn, loss)({"w": torch.tensor([3.0])}, (torch.ones(4, 1), torch.zeros(4, 1)))
        tensor(3.)
    """
    fn, loss = careful(fn), checked_loss(loss)
    return lambda params, batch: safe_sqrt(fisher_forms(fn, loss)(params, batch)([params])[0, 0])


def _some(vectors: Sequence[PyTree]) -> Sequence[PyTree]:
    if not vectors:
        raise HyperparameterError(
            explain("there are no vectors to make a Gram matrix of.", wanted="a list of trees like the parameters")
        )
    return vectors
