"""A state is a tree of tensors: it survives flattening, files and vmap, and goes on as if nothing had happened."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import optree
import pytest
import torch

import kfac_func as kf
from kfac_func._tree import Static, leaves, leaves_with_paths, nodes, with_leaves
from tests.zoo import CASES, randn, run
from tests.zoo.run import EXACT

NAMES = ["mlp", "grouped", "tokens", "tied"]
SPLITS = ["pi", "exact"]


def _identical(one: Any, two: Any) -> bool:
    pairs = list(zip(leaves(one), leaves(two), strict=True))
    return len(pairs) > 0 and all(a.dtype == b.dtype and bool((a == b).all()) for a, b in pairs)


@cache
def _streams(name: str) -> list[tuple]:
    """Gradients and statistics of 24 different batches, every third step without statistics."""
    case, found = CASES[name], []
    for k in range(24):
        order = torch.randperm(len(case.targets), generator=torch.Generator().manual_seed(k))[:-1]
        _, grads, stats = run(case._replace(inputs=case.inputs[order], targets=case.targets[order]))
        found.append((grads, None if k % 3 == 2 else stats))
    return found


def _advance(tx: kf.GradientTransformation, state: Any, stream: list[tuple]) -> tuple[list, Any]:
    every = []
    for grads, stats in stream:
        updates, state = tx.update(grads, state, stats=stats)
        every.append(updates)
    return every, state


def _through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _through_leaves(state: Any) -> Any:
    return with_leaves(state, [leaf.clone() for leaf in leaves(state)])


def _through_optree(state: Any) -> Any:
    values, spec = optree.tree_flatten(state)
    return spec.unflatten(values)


@pytest.mark.parametrize("through", [_through_file, _through_leaves, _through_optree])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_twenty_more_updates_are_bit_identical(name, split, through):
    tx, stream = kf.kfac(damping=0.01, split=split, refresh_every=7), _streams(name)
    _, state = _advance(tx, tx.init(CASES[name].params), stream[:4])
    restored = through(state)
    assert _identical(state, restored)
    one, end = _advance(tx, state, stream[4:])
    two, other_end = _advance(tx, restored, stream[4:])
    assert len(one) == 20
    assert all(_identical(a, b) for a, b in zip(one, two, strict=True))
    assert _identical(end, other_end)


def test_the_states_before_the_first_statistics_survive_too():
    tx = kf.chain(kf.kfac(), kf.sgd(0.1, momentum=0.9))
    state = tx.init(CASES["mlp"].params)
    restored = _through_file(state)
    _, grads, stats = run(CASES["mlp"])
    one, two = (tx.update(grads, s, CASES["mlp"].params, stats=stats) for s in (state, restored))
    assert _identical(one, two)


def test_other_structures_survive():
    for structure in (kf.curvature.identity(), kf.curvature.diagonal(), kf.curvature.kronecker("eigh")):
        tx, stream = kf.kfac(structure), _streams("mlp")
        _, state = _advance(tx, tx.init(CASES["mlp"].params), stream[:2])
        one, two = (_advance(tx, s, stream[2:6])[0] for s in (state, _through_file(state)))
        assert all(_identical(a, b) for a, b in zip(one, two, strict=True))


def test_an_old_state_stays_usable():
    """Values: the state of step 3 gives step 4 again, whatever happened since."""
    tx, stream = kf.kfac(refresh_every=2), _streams("mlp")
    _, state = _advance(tx, tx.init(CASES["mlp"].params), stream[:3])
    kept = [leaf.clone() for leaf in leaves(state)]
    first, _ = _advance(tx, state, stream[3:8])
    assert _identical(kept, leaves(state))
    again, _ = _advance(tx, state, stream[3:8])
    assert all(_identical(a, b) for a, b in zip(first, again, strict=True))


def test_the_state_holds_tensors_only():
    tx = kf.kfac()
    state = kf.observe(tx.init(CASES["tokens"].params), run(CASES["tokens"])[2])
    assert all(isinstance(leaf.value, torch.Tensor) for leaf in leaves_with_paths(state))
    assert len(nodes(state, Static)) == 1


def test_vmap_over_an_ensemble_is_a_loop():
    """Three members at once: the step, the statistics and the update, against one after the other."""
    case, tx = CASES["mlp"], kf.kfac(damping=0.01, refresh_every=1)
    step = kf.value_grad_and_stats(case.fn, case.loss, estimator=EXACT)
    plan = kf.make_plan(case.fn, case.params, case.inputs)
    members = [optree.tree_map(lambda p, k=k: p + 0.1 * randn(*p.shape, seed=k), case.params) for k in range(3)]

    def one(params: Any) -> Any:
        _, grads, stats = step(params, case.batch, plan=plan)
        return tx.update(grads, tx.init(params), params, stats=stats)[0]

    stacked = optree.tree_map(lambda *x: torch.stack(x), *members)
    together = torch.func.vmap(one)(stacked)
    for k, member in enumerate(members):
        for got, wanted in zip(leaves(together), leaves(one(member)), strict=True):
            torch.testing.assert_close(got[k], wanted, rtol=1e-9, atol=1e-11)
