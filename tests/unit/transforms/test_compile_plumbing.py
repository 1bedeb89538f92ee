"""Wrapped, masked and injected transformations in one graph each."""

from __future__ import annotations

import pytest
import torch

from kfac_func._tree import leaves
from kfac_func.transforms import (
    adam,
    apply_if_finite,
    average_params,
    chain,
    ema,
    inject_hyperparams,
    masked,
    multi_steps,
    partition,
    reduce_on_plateau,
    schedules,
    sgd,
    trace,
)

pytestmark = pytest.mark.compile

RATE = schedules.cosine_decay(0.1, 10)
LABELS = {"w": "adam", "*": "sgd"}

CASES = {
    "masked": (masked(trace(0.9), "b*"), {}),
    "partition": (partition({"adam": adam(0.1), "sgd": sgd(0.1, 0.9)}, LABELS), {}),
    "injected": (inject_hyperparams(sgd)(RATE, momentum=0.9, weight_decay=0.1), {}),
    "finite": (apply_if_finite(adam(0.1), 2), {}),
    "gathered": (multi_steps(adam(0.1), 2), {"emit": False}),
    "emitted": (multi_steps(adam(0.1), 2), {"emit": True}),
    "averages": (chain(ema(0.9), average_params()), {}),
    "plateau": (reduce_on_plateau(patience=1), {"value": torch.tensor(1.0)}),
}


def tree(seed):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 2, generator=g), "b": [torch.randn(3, generator=g), torch.randn((), generator=g)]}


@pytest.mark.parametrize(("tx", "extras"), CASES.values(), ids=CASES)
def test_a_step_is_one_graph_and_is_not_compiled_again(tx, extras):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(tx.update, fullgraph=True, backend=backend)
    one = two = tx.init(tree(0))
    for seed in range(1, 5):
        wanted, one = tx.update(tree(seed), one, tree(0), **extras)
        got, two = compiled(tree(seed), two, tree(0), **extras)
        for expected, found in zip(leaves((wanted, one)), leaves((got, two)), strict=True):
            torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
