"""Whole chain steps in one graph."""

from __future__ import annotations

import pytest
import torch

from kfac_func._tree import leaves, tree_map
from kfac_func.transforms import adamw, apply_updates, chain, clip_by_global_norm, named_chain, schedules, sgd, trace

pytestmark = pytest.mark.compile

RATE = schedules.join([schedules.linear_warmup(0.0, 0.1, 2), schedules.cosine_decay(0.1, 10)], [2])
STAIRS = schedules.multistep(0.1, {2: 0.5})
FALL = schedules.exponential_decay(0.1, 0.5, end_value=0.01)

CHAINS = {
    "clip_sgd": chain(clip_by_global_norm(0.5), sgd(STAIRS, momentum=0.9, nesterov=True, weight_decay=FALL)),
    "adamw": adamw(RATE, weight_decay=0.1),
    "named": named_chain(("momentum", trace(0.9)), ("descent", sgd(0.1))),
    "foreign": chain(trace(0.9), (lambda params: (), lambda updates, state, params=None: (updates, state))),
}


def tree(seed):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 2, generator=g), "b": [torch.randn(3, generator=g), torch.randn((), generator=g)]}


@pytest.mark.parametrize("tx", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("members", [None, 4], ids=["one", "vmapped"])
def test_a_step_is_one_graph_and_is_not_compiled_again(tx, members):
    torch._dynamo.reset()
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    def stack(seed):
        def repeat(leaf):
            return leaf if members is None else torch.stack([leaf * (1 + i) for i in range(members)])

        return tree_map(repeat, tree(seed))

    init = tx.init
    if members is not None:
        step, init = torch.func.vmap(step), torch.func.vmap(init)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    params = stack(0)
    one = two = (params, init(params))
    for seed in range(1, 5):
        one, two = step(*one, stack(seed)), compiled(*two, stack(seed))
        for wanted, got in zip(leaves(one), leaves(two), strict=True):
            torch.testing.assert_close(got, wanted)
    once_more = (
        0 if members is None else 1
    )  # vmap(init) expands the counters, so their strides change at the first step
    assert 1 <= len(compiles) <= 1 + once_more


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it imports the compiler
def test_a_step_through_the_default_compiler():
    torch._dynamo.reset()
    tx = adamw(RATE, weight_decay=0.1)
    compiled = torch.compile(tx.update, fullgraph=True)
    state = other = tx.init(tree(0))
    for seed in range(1, 4):
        wanted, state = tx.update(tree(seed), state, tree(0))
        got, other = compiled(tree(seed), other, tree(0))
        torch.testing.assert_close(leaves(got), leaves(wanted))
