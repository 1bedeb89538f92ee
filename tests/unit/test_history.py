"""Parameters of a module (`dict(module.named_parameters())`): no state and no step hangs on their autograd graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func._tracing import settled
from kfac_func._tree import leaves

torch.manual_seed(0)
MODULE = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
FN, PARAMS = kf.make_functional(MODULE)
OWN = dict(MODULE.named_parameters())
BATCH, LOSS = (torch.randn(6, 4).double(), torch.randn(6, 3).double()), kf.losses.mse()
EXACT = kf.estimators.exact()


def exactly(one: Any, other: Any) -> None:
    assert all(map(torch.equal, leaves(one), leaves(other)))
    assert not any(leaf.requires_grad for leaf in leaves(one))


def test_a_leaf_is_settled_and_nothing_else():
    x = nn.Parameter(torch.ones(2))
    y = 2 * x
    other = torch.ones(2, requires_grad=True)
    assert settled(other) is other  # asked for: gradients through whole runs
    assert not settled(x).requires_grad
    assert settled(x).data_ptr() == x.data_ptr()
    assert settled(y) is y
    seen: list[Tensor] = []
    torch.func.grad(lambda t: (seen.append(settled(t)), (settled(t) ** 2).sum())[1])(torch.ones(2))
    assert torch.func.grad(lambda t: (settled(t) ** 2).sum())(torch.ones(2)).tolist() == [2.0, 2.0]
    found = torch.autograd.grad((settled(y) ** 2).sum(), x)[0]
    assert found.tolist() == [8.0, 8.0]


@pytest.mark.parametrize("curvature", [kf.curvature.kronecker, kf.curvature.eigen, kf.curvature.kpsvd])
def test_the_curvature_of_a_data_set(curvature):
    one, two = (
        kf.fit_curvature(FN, LOSS, params, [BATCH], curvature=curvature(), split="pi") for params in (OWN, PARAMS)
    )
    exactly(one, two)


def test_quadratic_models():
    """Rates, velocities, damping and ratios after three steps, with parameters that require gradients all the time."""
    model = kf.quadratic_model(FN, LOSS, l2=1e-3)
    inner = kf.chain(kf.kfac(), kf.scale_by_quadratic_model(model))
    tx = kf.adapt_damping(inner, kf.levenberg_marquardt(interval=1), model=model, reject=True, calibrate=True)
    step, found = kf.value_grad_and_stats(FN, LOSS, estimator=EXACT), []
    for own in (True, False):
        params = PARAMS
        state = tx.init(params)
        for _ in range(3):
            _, grads, stats = step(params, BATCH)
            given = {name: nn.Parameter(leaf.clone()) if own else leaf for name, leaf in params.items()}
            updates, state = tx.update(grads, state, given, stats=stats, batch=BATCH)
            params = kf.apply_updates(params, updates)
        found.append((params, state))
    exactly(*found)
