"""Influence in models that neither a tape nor a vmap can take, and over batches that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_func as kf
from kfac_func import errors
from tests.unit.products.test_models import LOSS, MODELS, flat
from tests.zoo import close

I = kf.influence  # noqa: E741


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore::kfac_func._errors.KFacWarning")
@pytest.mark.parametrize("name", ["lstm", "gpt", "encoder", "squeezed"])
def test_scores_are_those_of_the_gradients(name):
    m = MODELS[name]()
    state = kf.fit_curvature(
        m.fn, LOSS, m.params, [m.batch], unclaimed="diagonal", generator=torch.Generator().manual_seed(0)
    )
    g = flat(kf.products.per_example_grads(m.fn, LOSS, route="loop")(m.params, m.batch), 1)
    wanted = g @ torch.linalg.solve(kf.linear_operator(state, m.params, damping=0.1).to_dense(), g.mT)
    found = I.scores(m.fn, LOSS, m.params, state, [m.batch], [m.batch], damping=0.1)
    assert close(found, wanted)
    assert close(I.self_influence(m.fn, LOSS, m.params, state, [m.batch], damping=0.1), wanted.diagonal())
    rows = I.self_influence(m.fn, LOSS, m.params, state, [m.batch], damping=0.1, only=["head.weight"], route="loop")
    block = flat({path: x for path, x in kf.products.per_example_grads(m.fn, LOSS, route="loop")(
        m.params, m.batch).items() if path.startswith("head")}, 1)  # fmt: skip
    head = kf.linear_operator(state, m.params, damping=0.1)
    vector = {path: torch.zeros_like(leaf) for path, leaf in m.params.items()}
    again = []
    for row in block:
        bias, weight = row[:3], row[3:]
        v = vector | {"head.bias": bias, "head.weight": weight.reshape(m.params["head.weight"].shape)}
        solved = head.solve(v)
        again.append(sum((solved[path] * v[path]).sum() for path in v))
    assert close(rows, torch.stack(again))


FN, PARAMS = kf.make_functional(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
X, Y = torch.randn(20, 4).double(), torch.randint(3, (20,))


def test_a_loader_that_shuffles_is_refused():
    steady, shuffled = (DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=shuffle) for shuffle in (False, True))
    state = kf.fit_curvature(FN, LOSS, PARAMS, steady)
    query = (X[:1], Y[:1])
    rows = I.scores(FN, LOSS, PARAMS, state, steady, [query, query], damping=0.1)
    assert close(rows[0], rows[1])
    with pytest.raises(errors.HyperparameterError, match=r"(?s)RandomSampler.*shuffle=False"):
        I.scores(FN, LOSS, PARAMS, state, shuffled, [query, query], damping=0.1)


def test_a_mean_over_what_counts_depends_on_the_batches():
    fn, params = kf.make_functional(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5)).double())
    ids, y = torch.randint(7, (6, 4)), torch.randint(5, (6, 4))
    full = y.clone()
    y[:3, 1:] = -100
    mean, total = (kf.losses.cross_entropy(class_dim=-1, reduction=r) for r in ("mean", "batchmean"))

    def own(loss: Any, targets: torch.Tensor, cuts: list[slice]) -> torch.Tensor:
        state = kf.fit_curvature(fn, total, params, [(ids, full)])
        return I.self_influence(fn, loss, params, state, [(ids[cut], targets[cut]) for cut in cuts], damping=0.1)

    whole, halves = [slice(0, 6)], [slice(0, 3), slice(3, 6)]
    with pytest.raises(errors.HyperparameterError, match=r"(?s)weighs 4 times as much.*'batchmean'"):
        own(mean, y, halves)
    assert own(mean, y, whole).shape == (6,)
    assert close(own(mean, full, halves), own(mean, full, whole))
    assert close(own(total, y, halves), own(total, y, whole))
    state = kf.fit_curvature(fn, total, params, [(ids, full)])
    batches = [(ids[cut], y[cut]) for cut in halves]
    with pytest.raises(errors.HyperparameterError, match="cut into batches"):
        I.scores(fn, mean, params, state, batches, [(ids, full)], query_loss=total, damping=0.1)
