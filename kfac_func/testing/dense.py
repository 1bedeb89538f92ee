r"""Dense curvature by brute force: slow, obviously right, and without the mathematics of the library.

    J_n = ∂z_n/∂θ  [D, P]       H_n = ∂²L/∂z_n²  [D, D]       GGN = Σ_n J_nᵀ H_n J_n

J_n comes from reverse-mode differentiation of the whole model, H_n from two derivatives of `loss.value`. No layer
inputs, no Kronecker factors and no number N or T appear in it, so that none can be forgotten.

Every matrix is that of the loss L as it is, in its own reduction. Rows and columns are the parameters in the order of
the tree, every leaf flattened row by row (`slices` says which rows are whose). With `blocks=True` the result is a
dictionary of the diagonal blocks by block name instead, each in the row-major order of the block's array V = [W | b],
like `Structure.dense`; a leaf that no layer kind sees, or that is not used, is a block of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jacrev

from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import Model, PyTree
from kfac_func.estimators.vectors import Estimator, exact, uniform
from kfac_func.losses import Loss, example_weight
from kfac_func.testing.problem import CHUNK, Problem, accumulated, given, opened, pulled, replaced, unit_vectors

Dense: TypeAlias = Any
"""A matrix [P, P]; with `blocks=True`, a dictionary of matrices by block name."""

LIMIT = 10_000  # rows: 0.75 GiB in float64


def dense_ggn(
    fn: Model, loss: Loss, params: PyTree, batch: tuple[Any, Tensor], *, blocks: bool = False, limit: int = LIMIT
) -> Dense:
    r"""The generalised Gauss-Newton matrix of L(θ) = loss.value(fn(θ, inputs), targets), [P, P].

        Σ_n J_nᵀ H_n J_n,       J_n = ∂z_n/∂θ,   H_n = ∂²L/∂z_n²

    fn, loss  a pure function (params, inputs) -> z [N, *out] and a loss of `kf.losses`
    params    a tree of P floating-point numbers
    batch     (inputs, targets), N examples
    blocks    True: the diagonal blocks alone, by block name, each in the row-major order of V = [W | b]
    limit     the largest number of rows that a matrix may have

    In units of L: for the reductions "mean" and "batchmean" a mean over examples, for "sum" a sum. All outputs are
    differentiated with respect to all parameters, so models that mix positions or examples are right too. Costs N · D
    backward passes of the whole batch. Raises TreeMismatchError for leaves that are not floating-point tensors,
    BatchError without examples and for numbers that are not finite, HyperparameterError beyond the limit.
    Source: Schraudolph 2002; Martens 2014 (1412.1193), §8.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.eye(3), torch.zeros(3, 2)
        >>> kf.testing.dense_ggn(fn, kf.losses.mse("sum"), params, batch).diagonal()
        tensor([6., 6., 2., 2., 2., 2., 2., 2.])
        >>> kf.testing.dense_ggn(fn, kf.losses.mse("sum"), params, batch, blocks=True)["weight"].shape
        torch.Size([8, 8])
    """
    problem = opened(fn, loss, params, batch, blocks, limit)

    def products() -> Iterator[tuple[Tensor, Tensor]]:
        for n in range(len(problem.z)):
            jacobian = pulled(problem, n, unit_vectors(problem.z[n]))
            yield jacobian, _output_hessian(problem, n) @ jacobian

    return accumulated(problem, products())


def dense_fisher(
    fn: Model,
    loss: Loss,
    params: PyTree,
    batch: tuple[Any, Tensor],
    *,
    estimator: Estimator | None = None,
    generator: torch.Generator | None = None,
    blocks: bool = False,
    limit: int = LIMIT,
) -> Dense:
    r"""The Fisher information matrix of the model's predictive distribution, [P, P], or a drawn estimate of it.

        w Σ_n Σ_v (J_nᵀ c_{v,n}) (J_nᵀ c_{v,n})ᵀ,       Σ_v c_{v,n} c_{v,n}ᵀ = Λ_n

    with w = 1/N ("mean", "batchmean") or 1 ("sum"), and Λ_n the Fisher of the outputs of example n.

    estimator  where the output vectors c come from; default `kf.estimators.exact()`: the Fisher itself, which is the
               GGN for the losses of this library. `monte_carlo(m)` and `curvature_prop(m)` give an unbiased estimate
    generator  for estimators that draw; the same seed gives the vectors that `value_grad_and_stats` takes

    The other arguments, units, costs and errors are those of `dense_ggn`; HyperparameterError, too, when a draw has
    no generator. Source: Martens 2014 (1412.1193), §5 and §9.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.eye(3), torch.tensor([0, 1, 1])
        >>> loss = kf.losses.cross_entropy()
        >>> fisher = kf.testing.dense_fisher(fn, loss, params, batch)
        >>> torch.allclose(fisher, kf.testing.dense_ggn(fn, loss, params, batch), atol=1e-6)
        True
    """
    source = exact() if estimator is None else estimator
    problem = opened(fn, loss, params, batch, blocks, limit)
    shape = source.noise(loss, problem.z)
    noise = None if shape is None else uniform(shape, problem.z.device, generator, source.name)
    chunks = list(source.vectors(loss, problem.z, problem.targets, noise))
    if not chunks:
        raise HyperparameterError(
            explain(
                "the estimator makes no output vectors, so there is no matrix.",
                got=source.name,
                options="exact(), monte_carlo(), curvature_prop() or empirical()",
            )
        )
    return accumulated(problem, _squares(problem, loss, torch.cat(chunks)))


def dense_empirical_fisher(
    fn: Model, loss: Loss, params: PyTree, batch: tuple[Any, Tensor], *, blocks: bool = False, limit: int = LIMIT
) -> Dense:
    r"""The second moment of the gradients of every example's own loss, [P, P].

        w Σ_n ∇l_n ∇l_nᵀ,       L = w Σ_n l_n,   w = 1/N ("mean", "batchmean") or 1 ("sum")

    ∇l_n = J_nᵀ ∂L/∂z_n / w, with ∂L/∂z_n by differentiation of `loss.value`. The gradient is not subtracted. Arguments,
    units, costs and errors are those of `dense_ggn`. Not the Fisher: Kunstner, Balles & Hennig 2019 (1905.12558).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> fisher = kf.testing.dense_empirical_fisher(fn, kf.losses.mse(), params, (torch.eye(3), torch.zeros(3, 2)))
        >>> int(torch.linalg.matrix_rank(fisher))
        3
    """
    problem = opened(fn, loss, params, batch, blocks, limit)
    score = grad(problem.loss)(problem.z) / example_weight(loss, len(problem.z))
    return accumulated(problem, _squares(problem, loss, score.unsqueeze(0)))


def dense_hessian(
    fn: Model, loss: Loss, params: PyTree, batch: tuple[Any, Tensor], *, blocks: bool = False, limit: int = LIMIT
) -> Dense:
    r"""The Hessian ∂²L/∂θ² of the loss in the parameters, [P, P].

    Arguments, units and errors are those of `dense_ggn`; P backward passes through a gradient. Indefinite in general;
    the GGN leaves out Σ_n ∂L/∂z_n · ∂²z_n/∂θ².

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.eye(3), torch.zeros(3, 2)
        >>> hessian, ggn = (
        ...     f(fn, kf.losses.mse(), params, batch) for f in (kf.testing.dense_hessian, kf.testing.dense_ggn)
        ... )
        >>> torch.allclose(hessian, ggn, atol=1e-6)  # the model is linear
        True
    """
    problem = opened(fn, loss, params, batch, blocks, limit)
    theta = problem.theta

    def block(index: Tensor) -> Tensor:
        def value(part: Tensor) -> Tensor:
            return problem.value(theta.index_copy(0, index, part))

        return jacrev(grad(value), chunk_size=CHUNK)(theta[index])

    return given(problem, {name: block(index) for name, index in problem.wanted.items()})


def _output_hessian(problem: Problem, n: int) -> Tensor:
    """∂²L/∂z_n² [D, D] of the loss in the outputs of example n."""
    z_n = problem.z[n]
    hessian = jacrev(grad(lambda new: problem.loss(replaced(problem.z, n, new))))(z_n)
    return hessian.reshape(z_n.numel(), z_n.numel())


def _squares(problem: Problem, loss: Loss, c: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients J_nᵀ c_n of output vectors c [V, N, *out], example after example, twice; the second one times w."""
    weight = example_weight(loss, len(problem.z))
    for n in range(len(problem.z)):
        rows = pulled(problem, n, c[:, n])
        yield rows, weight * rows
