"""Norm constraint, quadratic model and adapted damping in one graph, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kfac_func as kf
from kfac_func import _tree
from tests.zoo import close, functional, randn

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning"),  # torch's own, when it lowers a diagonal
]
FN, PARAMS = functional(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)))
LOSS, BATCH = kf.losses.cross_entropy(), (randn(6, 3), torch.arange(6) % 2)
MODEL = kf.quadratic_model(FN, LOSS, l2=1e-3)


def preconditioned(*links: Any) -> Any:
    return kf.chain(kf.kfac(damping=0.1, refresh_every=1), *links)


CHAINS = {
    "clip": preconditioned(kf.clip_by_kl(0.1, 0.1), kf.normalize_by_fisher_norm(), kf.scale(-0.1)),
    "model": preconditioned(kf.scale_by_quadratic_model(MODEL)),
    "adapted": kf.adapt_damping(
        preconditioned(kf.scale_by_quadratic_model(MODEL)), model=MODEL, reject=True, calibrate=True
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_step_is_one_graph(name: str):
    """The second step: the first one gives the state its shape."""
    torch._dynamo.reset()
    tx = CHAINS[name]
    step = kf.value_grad_and_stats(FN, LOSS, estimator=kf.estimators.exact())
    plan = kf.make_plan(FN, PARAMS, BATCH[0])

    def one(params: Any, state: Any) -> Any:
        _, grads, stats = step(params, BATCH, plan=plan)
        batch = {} if name == "clip" else {"batch": BATCH}
        updates, state = tx.update(grads, state, params, stats=stats, **batch)
        return kf.apply_updates(params, updates), state

    backend = "aot_eager" if name == "adapted" else "eager"  # it holds the model and all that is said of it
    compiled = torch.compile(one, fullgraph=True, backend=backend)
    before = one(PARAMS, tx.init(PARAMS))
    mine, other = compiled(*before), one(*before)
    assert all(
        close(x, y) for x, y in zip(_tree.leaves(mine), _tree.leaves(other), strict=True) if x.is_floating_point()
    )
