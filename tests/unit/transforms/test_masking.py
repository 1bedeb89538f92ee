"""Transformations for some of the leaves: what they see, what they do, and what is refused."""

from __future__ import annotations

import pytest
import torch

import kfac_func as kf
from kfac_func._errors import HyperparameterError, TreeMismatchError
from kfac_func._tree import leaves, leaves_with_paths, tree_map, unique_paths
from kfac_func.transforms import (
    adam,
    adamw,
    add_decayed_weights,
    average_params,
    averaged_params,
    chain,
    identity,
    masked,
    partition,
    scale,
    sgd,
    trace,
)
from tests.unit.transforms.problem import PARAMS, close, passed, reloaded, run

T = torch.tensor
TREE = {"head": {"weight": T([1.0, -2.0]), "bias": T([3.0])}, "tail": [T([4.0]), T(5.0)]}


def spy(seen):
    def init(params):
        seen.append(params)
        return ()

    def update(updates, state, params=None, *, stats=None, extra=None):
        seen.extend([updates, params, stats, extra])
        return updates, state

    return init, update


@pytest.mark.parametrize("mask", ["head*", ["head.bias", "*.weight"], lambda tree: "head.*"])
def test_the_inner_transformation_sees_its_leaves_only(mask):
    seen = []
    tx = masked(spy(seen), mask)
    updates, _ = tx.update(TREE, tx.init(TREE), TREE, stats="s", extra="e")
    own = {"head": TREE["head"], "tail": [None, None]}
    params, *got, stats, extra = seen
    for tree in (params, *got):
        assert tree["tail"] == [None, None]
        close(tree, own)
    assert (stats, extra) == ("s", "e")
    close(updates, TREE)


def test_a_mask_is_a_transformation_of_a_part():
    tx, alone = masked(trace(0.5), {"head": {"weight": True, "bias": False}, "tail": [False, True]}), trace(0.5)
    state, own = tx.init(TREE), alone.init((TREE["head"]["weight"], TREE["tail"][1]))
    for k in range(1, 4):
        grads = tree_map(lambda x, k=k: k * x, TREE)
        updates, state = tx.update(grads, state)
        (weight, last), own = alone.update((grads["head"]["weight"], grads["tail"][1]), own)
        close(updates, {"head": {"weight": weight, "bias": grads["head"]["bias"]}, "tail": [grads["tail"][0], last]}, 0)
    assert [path for path, _ in leaves_with_paths(state)] == ["inner.trace.head.weight", "inner.trace.tail.1"]
    close(tx.update(TREE, reloaded(state))[0], tx.update(TREE, state)[0], 0)


def test_none_inside_and_outside_of_a_mask_stays_none():
    tx = masked(trace(0.5), "head*")
    grads = {"head": {"weight": None, "bias": T([1.0])}, "tail": [None, T(1.0)]}
    updates, state = tx.update(grads, tx.init(TREE))
    assert updates["head"]["weight"] is None
    assert updates["tail"][0] is None
    close(updates, grads, 0)
    close(state.inner.trace["head"]["weight"], torch.zeros(2), 0)


def test_a_mask_is_asked_once_and_gradients_flow_through_it():
    asked = []

    def mask(tree):
        asked.append(tree)
        return "head.weight"

    def total(factor):
        tx = masked(scale(factor), mask)
        updates, state = tx.update(TREE, tx.init(TREE))
        updates, _ = tx.update(updates, state)
        return sum(leaf.sum() for leaf in leaves(updates))

    assert torch.func.grad(total)(T(3.0)).item() == 2 * 3.0 * (1 - 2)
    assert len(asked) == 1


LABELS = {
    "patterns": {"*.bias": "fast", "head*": "slow", "*": "fast"},
    "tree": {"head": {"weight": "slow", "bias": "fast"}, "tail": ["fast", "fast"]},
    "function": lambda tree: {"head.weight": "slow", "*": "fast"},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_a_partition_is_one_run_for_each_label(labels):
    tx, slow, fast = (
        partition({"slow": adam(0.1), "fast": sgd(0.5, 0.9), "idle": adam(1.0)}, labels),
        adam(0.1),
        sgd(0.5, 0.9),
    )
    state, one = tx.init(TREE), slow.init(TREE["head"]["weight"])
    rest = {"bias": TREE["head"]["bias"], "tail": TREE["tail"]}
    two = fast.init(rest)
    for _ in range(3):
        updates, state = tx.update(TREE, state, TREE)
        weight, one = slow.update(TREE["head"]["weight"], one)
        others, two = fast.update(rest, two)
        close(updates, {"head": {"weight": weight, "bias": others["bias"]}, "tail": others["tail"]}, 0)
    paths = [path for path, _ in leaves_with_paths(state)]
    assert [path for path in paths if path.startswith("inner.slow.0.mu")] == ["inner.slow.0.mu.head.weight"]
    close(tx.update(TREE, reloaded(state), TREE)[0], tx.update(TREE, state, TREE)[0], 0)


MEMBERS = {"slow": identity(), "fast": identity()}
NO_LABELS = {
    "no label": ({"head*": "slow", "tail.0": "fast"}, "'tail.1'.*\n.*no label"),
    "unknown": ({"head*": "slow", "*": "Fast"}, "'tail.0'.*\n.*'Fast'"),
    "no string": ({"head": {"weight": "slow", "bias": 1}, "tail": ["fast", "fast"]}, "'head.bias'"),
    "no leaf": ({"haed*": "slow", "*": "fast"}, "'haed*'"),
}


@pytest.mark.parametrize(("labels", "message"), NO_LABELS.values(), ids=NO_LABELS)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(HyperparameterError, match=message.replace("haed*", "haed.*")):
        partition(MEMBERS, labels).init(TREE)


def test_trees_that_do_not_fit_are_refused():
    with pytest.raises(TreeMismatchError, match="tail"):
        partition(MEMBERS, {"head": {"weight": "slow", "bias": "slow"}}).init(TREE)
    tx = partition(MEMBERS, {"*": "slow"})
    with pytest.raises(TreeMismatchError, match="'new' belongs to no leaf"):
        tx.update({**TREE, "new": T(1.0)}, tx.init(TREE))


def test_kfac_behind_a_mask_and_in_a_partition():
    grads, stats = passed()
    whole, _ = kf.kfac(damping=0.1).update(grads, kf.kfac(damping=0.1).init(PARAMS), stats=stats)
    tx = masked(kf.kfac(damping=0.1), "0.*")
    part, _ = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    close(part, {path: (whole if path.startswith("0") else grads)[path] for path in grads})
    assert all((part[path] - grads[path]).abs().max() > 0.01 for path in ("0.weight", "0.bias"))
    bare = masked(kf.kfac(), "*.weight")
    with pytest.raises(TreeMismatchError, match=r"'0\.bias'"):
        bare.update(grads, bare.init(PARAMS), stats=stats)

    tx = partition({"kfac": chain(kf.kfac(damping=0.1), sgd(0.1)), "adam": adam(0.01)}, {"0.*": "kfac", "*": "adam"})
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    adams, _ = adam(0.01).update(grads, adam(0.01).init(PARAMS))
    close(updates, {path: -0.1 * whole[path] if path.startswith("0") else adams[path] for path in grads})
    assert kf.observe(state, stats).inner["kfac"][0].observed == 2
    close(run(tx)[0], run(tx, state=reloaded(tx.init(PARAMS)))[0], 0)


def test_an_ensemble_behind_a_mask_is_a_loop_over_its_members():
    tx = partition(
        {"kfac": chain(masked(kf.kfac(damping=0.1), "0.*"), sgd(0.1)), "adam": adam(0.01)}, {"2.*": "adam", "*": "kfac"}
    )
    together = {path: torch.stack([leaf, 2 * leaf]) for path, leaf in PARAMS.items()}

    def two_steps(params):
        state = tx.init(params)
        for _ in range(2):
            grads, stats = passed(params)
            updates, state = tx.update(grads, state, params, stats=stats, refresh=True)
            params = kf.apply_updates(params, updates)
        return params, state

    moved, state = torch.func.vmap(two_steps)(together)
    for i in range(2):
        own, alone = two_steps({path: leaf[i] for path, leaf in together.items()})
        close({path: leaf[i] for path, leaf in moved.items()}, own)
        close(tree_map(lambda x, i=i: x[i], state), alone)


def test_weight_decay_for_some_of_the_leaves():
    params = {"w": T([1.0, 2.0], dtype=torch.float64), "b": T([3.0], dtype=torch.float64)}
    grads = tree_map(torch.ones_like, params)
    close(add_decayed_weights(0.5, "w").update(grads, add_decayed_weights(0.5, "w").init(params), params)[0],
          {"w": T([1.5, 2.0], dtype=torch.float64), "b": T([1.0], dtype=torch.float64)})  # fmt: skip
    for make, peer in ((sgd, torch.optim.SGD), (adamw, torch.optim.AdamW)):
        tx = make(0.1, weight_decay=lambda count: 0.5, mask="w")
        own, state = params, tx.init(params)
        theirs = tree_map(torch.clone, params)
        groups = [{"params": [theirs["w"]], "weight_decay": 0.5}, {"params": [theirs["b"]], "weight_decay": 0.0}]
        optimizer = peer(groups, lr=0.1)
        for _ in range(5):
            updates, state = tx.update(tree_map(torch.sin, own), state, own)
            own = kf.apply_updates(own, updates)
            for leaf in theirs.values():
                leaf.grad = torch.sin(leaf)
            optimizer.step()
        close(own, theirs, 1e-9)
    with pytest.raises(HyperparameterError, match="mask needs weight_decay"):
        sgd(0.1, mask="w")


def test_the_average_of_some_of_the_leaves():
    tx = masked(average_params(None), "head*")
    average = averaged_params(tx.update(TREE, tx.init(TREE), TREE)[1])
    assert average["tail"] == [None, None]
    close(average["head"], tree_map(lambda x: 2 * x, TREE["head"]))
    assert unique_paths(average).keys() == {"head.weight", "head.bias"}
