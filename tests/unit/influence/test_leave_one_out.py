"""Influence against training again with another weight of one example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from tests.zoo.cases import randn

L2, N = 0.05, 30


def linear(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"], p["b"])


def split(theta: Tensor) -> dict[str, Tensor]:
    """[o, i + 1] -> weight and bias."""
    return {"w": theta[:, :-1], "b": theta[:, -1]}


def example_losses(loss: str, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    z = linear(split(theta), x)
    if loss == "mse":
        return 0.5 * (z - y).square().sum(1)
    return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1)


def trained(loss: str, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """argmin Σ_n w_n l_n + ½ L2 ‖θ‖² by Newton's method to the last digit, for every row of weights [K, N]."""
    size = y.shape[1], x.shape[1] + 1

    def objective(flat: Tensor, w: Tensor) -> Tensor:
        return w @ example_losses(loss, flat.reshape(size), x, y) + 0.5 * L2 * flat.square().sum()

    def newton(flat: Tensor, w: Tensor) -> Tensor:
        slope, bend = torch.func.grad(objective)(flat, w), torch.func.hessian(objective)(flat, w)
        return flat - torch.linalg.solve(bend, slope)

    theta = torch.zeros(len(weights), size[0] * size[1], dtype=x.dtype)
    for _ in range(15):
        theta = torch.func.vmap(newton)(theta, weights)
    assert torch.func.vmap(torch.func.grad(objective))(theta, weights).abs().max() < 1e-13
    return theta.unflatten(1, size)


def regression() -> tuple[Tensor, Tensor]:
    x = randn(N, 4, seed=1) @ randn(4, 4, seed=2)
    return x, x @ randn(4, 3, seed=3) + randn(N, 3, seed=4)


def classification(outputs: int = 1) -> tuple[Tensor, Tensor]:
    x = randn(N, 4, seed=1)
    logits = 1.5 * x @ randn(4, outputs, seed=3) + randn(N, outputs, seed=4)
    return x, (logits > 0).double()


LIBRARY = {
    "mse": kf.losses.mse(reduction="batchmean", scale=0.5),
    "bce": kf.losses.bce_with_logits(reduction="batchmean"),
}
EQUAL = torch.full((1, N), 1 / N, dtype=torch.float64)


def influences(loss: str, x: Tensor, y: Tensor, queries: Any, curvature: str) -> Tensor:
    params = split(trained(loss, x, y, EQUAL)[0])
    made = getattr(kf.curvature, curvature)()
    state = kf.fit_curvature(linear, LIBRARY[loss], params, [(x, y)], curvature=made, damping=L2)
    return kf.influence.scores(linear, LIBRARY[loss], params, state, [(x, y)], [queries])


def rises(loss: str, x: Tensor, y: Tensor, queries: Any, taken: Tensor) -> Tensor:
    """The true rise [Q, K] of every query's loss when the examples keep the weights 1/N − taken [K, N]."""
    before, *after = (
        example_losses(loss, theta, *queries) for theta in trained(loss, x, y, torch.cat([EQUAL, EQUAL - taken]))
    )
    return torch.stack(after, dim=1) - before.unsqueeze(1)


EACH = torch.eye(N, dtype=torch.float64)


@pytest.mark.parametrize("curvature", ["eigen", "kronecker", "block_diagonal"])
def test_ridge_regression_first_order_is_exact(curvature):
    x, y = regression()
    queries = randn(5, 4, seed=5), randn(5, 3, seed=6)
    found = influences("mse", x, y, queries, curvature)
    errors = torch.stack(
        [(rises("mse", x, y, queries, taken * EACH) - taken * found).norm(dim=0) for taken in (1e-3, 5e-4, 2.5e-4)]
    )
    rates = errors[:-1] / errors[1:]
    assert errors[0].min() > 1e-9
    assert rates.min() > 3.9
    assert rates.max() < 4.1


def test_groups_add_up():
    x, y = regression()
    queries, group = (randn(5, 4, seed=5), randn(5, 3, seed=6)), [1, 4, 20]
    found = influences("mse", x, y, queries, "eigen")[:, group].sum(1)
    taken = EACH[group].sum(0, keepdim=True)
    errors = [(rises("mse", x, y, queries, t * taken)[:, 0] - t * found).norm() for t in (1e-3, 5e-4)]
    assert 3.9 < errors[0] / errors[1] < 4.1


def test_the_sign_and_the_unit_of_leaving_out():
    x, y = regression()
    found = influences("mse", x, y, (x, y), "eigen").diagonal() / N
    truth = rises("mse", x, y, (x, y), EACH / N).diagonal()
    assert (truth > 0).all()
    assert (found > 0).all()
    assert (found < truth).all()
    assert (found > 0.5 * truth).all()


def correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Spearman's."""
    return torch.corrcoef(torch.stack([x.flatten().argsort().argsort().double() for x in (ours, theirs)]))[0, 1]


@pytest.mark.parametrize(("curvature", "least"), [("block_diagonal", 0.97), ("eigen", 0.95)])
@pytest.mark.parametrize("outputs", [1, 2])
def test_logistic_regression_ranks_as_leaving_out_does(curvature, least, outputs):
    x, y = classification(outputs)
    queries = randn(6, 4, seed=5), torch.arange(6 * outputs).remainder(2).reshape(6, outputs).double()
    for asked, chosen in ((queries, torch.Tensor.flatten), ((x, y), torch.Tensor.diagonal)):
        found = influences("bce", x, y, asked, curvature)
        truth = rises("bce", x, y, asked, EACH / N)
        assert correlation(chosen(found), chosen(truth)) > least
