"""What every gradient transformation must obey; the table is in `transforms.py` beside this file."""

from __future__ import annotations

import functools
import inspect
import io
from typing import Any

import pytest
import torch

from kfac_func import transforms
from kfac_func._errors import HyperparameterError, KeywordError, StateError, TreeMismatchError
from kfac_func._tree import leaves, replace_leaves, tree_map, unique_paths
from kfac_func.transforms import (
    adam,
    adamw,
    add_decayed_weights,
    apply_updates,
    average_params,
    chain,
    clip_by_global_norm,
    clip_by_kl,
    ema,
    masked,
    multi_steps,
    named_chain,
    reduce_on_plateau,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    sgd,
    trace,
)
from tests.contracts.transforms import ROWS, Row, falling, named, nested, tree

STEPS = 3


each_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def storages(*trees: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in leaves(trees)}


def assert_equal(got: Any, wanted: Any, tolerance: float = 0.0) -> None:
    """The same structure and values; exactly so, bit by bit, unless there is a tolerance."""
    got, wanted = unique_paths(got), unique_paths(wanted)
    assert got.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(got[path], wanted[path], rtol=tolerance, atol=tolerance)


def run(row: Row, steps: int = STEPS, **options: Any) -> tuple[list[Any], Any]:
    """All updates and the last state of a short run with a new gradient at each step."""
    tx = row.make(**{**row.options, **options})
    params, state, history = tree(0), tx.init(tree(0)), []
    for step in range(steps):
        updates, state = tx.update(tree(1 + step), state, params, **row.extras(step))
        history.append(updates)
    return history, state


@each_row
def test_nothing_is_mutated_or_shared(row):
    tx = row.make(**row.options)
    params, state = tree(0), tx.init(tree(0))
    assert not storages(tx.init(params)) & storages(params)
    for step in range(STEPS):
        grads = tree(1 + step)
        inputs = (params, state, grads)
        before = [(leaf, leaf.clone(), leaf._version) for leaf in leaves(inputs)]
        updates, new_state = tx.update(grads, state, params, **row.extras(step))
        assert all(torch.equal(leaf, copy) and leaf._version == version for leaf, copy, version in before)
        assert not storages(updates) & storages(inputs, new_state)
        state = new_state


@each_row
def test_old_states_stay_usable(row):
    tx = row.make(**row.options)
    _, old = run(row, 1)
    first = tx.update(tree(2), old, tree(0), **row.extras(1))
    tx.update(tree(3), first[1], tree(0), **row.extras(2))
    assert_equal(tx.update(tree(2), old, tree(0), **row.extras(1)), first)


@each_row
def test_none_stays_none_and_freezes_its_state(row):
    tx = row.make(**row.options)
    _, old = run(row, 1)
    updates, state = tx.update({**tree(2), "b": None}, old, tree(0), **row.extras(1))
    assert updates["b"] is None
    assert all(updates[key] is not None for key in ("w", "deep"))
    frozen, kept = ({p: x for p, x in unique_paths(s).items() if p.endswith("b")} for s in (state, old))
    assert_equal(frozen, kept)
    assert_equal(apply_updates(tree(0), updates)["b"], tree(0)["b"])


@each_row
def test_order_of_keys_does_not_matter(row):
    tx = row.make(**row.options)
    _, state = run(row, 1)
    reversed_grads, extras = dict(reversed(tree(2).items())), row.extras(1)
    assert_equal(tx.update(reversed_grads, state, tree(0), **extras), tx.update(tree(2), state, tree(0), **extras))


@each_row
def test_params_by_keyword_and_what_every_transformation_takes(row):
    tx = row.make(**row.options)
    _, state = run(row, 1)
    wanted = tx.update(tree(2), state, tree(0), **row.extras(1))
    extras = {**row.extras(1), "stats": object(), "inplace": True}
    assert_equal(tx.update(tree(2), state, params=tree(0), **row.extras(1)), wanted)
    assert_equal(tx.update(tree(2), state, tree(0), **extras), wanted)
    with pytest.raises(KeywordError, match="unheard_of="):
        tx.update(tree(2), state, tree(0), **extras, unheard_of=1)


@each_row
def test_vmap_equals_a_loop(row):
    tx = row.make(**row.options)
    params = tree(0, batch=(4,))
    grads = [tree(1 + step, batch=(4,)) for step in range(STEPS)]
    state, history = torch.func.vmap(tx.init)(params), []
    for step, grad in enumerate(grads):
        extras = {**row.extras(step), **row.unread(step)}
        updates, state = torch.func.vmap(functools.partial(tx.update, **extras))(grad, state, params)
        history.append(updates)
    for member in range(4):
        own = tx.init(tree_map(lambda x, i=member: x[i], params))
        for step, (grad, updates) in enumerate(zip(grads, history, strict=True)):
            mine = tree_map(lambda x, i=member: x[i], (grad, params, updates))
            wanted, own = tx.update(mine[0], own, mine[1], **row.extras(step))
            assert_equal(mine[2], wanted, 1e-12)
        assert_equal(tree_map(lambda x, i=member: x[i], state), own, 1e-12)


@each_row
def test_state_is_tensors_and_can_be_saved(row):
    tx = row.make(**row.options)
    _, state = run(row)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves(state))
    pickled, plain = io.BytesIO(), io.BytesIO()
    torch.save(state, pickled)
    torch.save(unique_paths(state), plain)
    whole = torch.load(io.BytesIO(pickled.getvalue()), weights_only=False)
    rebuilt = replace_leaves(tx.init(tree(0)), torch.load(io.BytesIO(plain.getvalue()), weights_only=True))
    wanted = tx.update(tree(9), state, tree(0), **row.extras(STEPS))
    for loaded in (whole, rebuilt):
        assert_equal(tx.update(tree(9), loaded, tree(0), **row.extras(STEPS)), wanted)


@each_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(row, dtype):
    tx = row.make(**row.options)
    params, state = tree(0, dtype), tx.init(tree(0, dtype))
    dtypes = [leaf.dtype for leaf in leaves(state)]
    for step in range(STEPS):
        updates, state = tx.update(tree(1 + step, dtype), state, params, **row.extras(step))
        assert {leaf.dtype for leaf in leaves(updates)} == {dtype}
        assert [leaf.dtype for leaf in leaves(state)] == dtypes


@pytest.mark.parametrize(
    ("row", "option"),
    [pytest.param(row, option, id=f"{row.name}-{option}") for row in ROWS for option in row.changed],
)
def test_every_option_changes_the_updates(row, option):
    plain, _ = run(row)
    other, _ = run(row, **{option: row.changed[option]})
    assert any(not torch.allclose(a, b, rtol=1e-6) for a, b in zip(leaves(plain), leaves(other), strict=True))


NO_TRANSFORMATIONS = {
    transforms.apply_updates,
    transforms.averaged_params,
    transforms.global_norm,
    transforms.inject_hyperparams,
    transforms.selected,
    transforms.stateless,
    transforms.tree_get,
    transforms.tree_set,
    transforms.tree_vdot,
}


def test_the_table_is_complete():
    public = {
        value for name, value in vars(transforms).items() if inspect.isfunction(value) and not name.startswith("_")
    }
    constructors = public - NO_TRANSFORMATIONS - {transforms.average_params}  # which passes the updates unchanged
    changed = {make: set() for make in constructors - {chain, named_chain}}
    for row in ROWS:
        changed.get(row.make, set()).update(row.changed)
    assert changed == {make: set(inspect.signature(make).parameters) for make in changed}


WRONG_OPTIONS = [
    (scale, {"step_size": float("nan")}),
    (scale, {"step_size": torch.ones(2)}),
    (scale_by_learning_rate, {"learning_rate": -0.1}),
    (scale_by_learning_rate, {"learning_rate": float("inf")}),
    (trace, {"decay": 1.0}),
    (trace, {"decay": -0.1}),
    (scale_by_adam, {"b1": -0.1}),
    (scale_by_adam, {"b1": 1.0}),
    (scale_by_adam, {"b2": 1.5}),
    (scale_by_adam, {"eps": -1e-8}),
    (scale_by_adam, {"eps_root": -1.0}),
    (clip_by_global_norm, {"max_norm": 0.0}),
    (clip_by_global_norm, {"max_norm": -1.0}),
    (clip_by_kl, {"learning_rate": 0.1, "max_kl": 0.0}),
    (clip_by_kl, {"max_kl": 0.1, "learning_rate": -0.1}),
    (clip_by_kl, {"max_kl": 0.1, "learning_rate": float("inf")}),
    (add_decayed_weights, {"weight_decay": -0.1}),
    (sgd, {"learning_rate": -1}),
    (sgd, {"learning_rate": 0.1, "momentum": 1.0}),
    (sgd, {"learning_rate": 0.1, "weight_decay": -0.1}),
    (adam, {"learning_rate": -0.1}),
    (adamw, {"learning_rate": 0.1, "weight_decay": -0.1}),
    (ema, {"decay": 1.0}),
    (average_params, {"decay": -0.1}),
    (reduce_on_plateau, {"factor": 0.0}),
    (reduce_on_plateau, {"factor": 1.0}),
    (reduce_on_plateau, {"rtol": -0.1}),
    (reduce_on_plateau, {"atol": -1.0}),
    (reduce_on_plateau, {"min_scale": 1.5}),
]


@pytest.mark.parametrize(("make", "options"), WRONG_OPTIONS)
def test_options_without_meaning_are_refused(make, options):
    name = list(options)[-1]
    with pytest.raises(HyperparameterError, match=rf"^{name} has a value[^\n]*\n  got     .*\n  wanted  "):
        make(**options)


def test_tensor_options_are_never_read():
    for make, options in [(sgd, "learning_rate"), (trace, "decay"), (clip_by_global_norm, "max_norm")]:
        make(**{options: torch.tensor(-1.0, device="meta")})


MISFITS = {
    "structure": {"w": torch.ones(3, 2)},
    "shape": {**tree(1), "b": torch.ones(1)},
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: trace(0.9),
        scale_by_adam,
        lambda: add_decayed_weights(0.1),
        lambda: ema(0.9),
        average_params,
        lambda: multi_steps(scale(1.0), 2),
        lambda: masked(trace(0.9), ["w", "b"]),
    ],
)
def test_updates_unlike_the_params_are_refused(make, misfit):
    tx = make()
    with pytest.raises(TreeMismatchError, match="wanted"):
        tx.update(misfit, tx.init(tree(0)), tree(0))


def test_what_needs_params_says_so():
    for tx in (add_decayed_weights(0.1), add_decayed_weights(falling), average_params()):
        with pytest.raises(HyperparameterError, match="needs the parameters"):
            tx.update(tree(1), tx.init(tree(0)))


@pytest.mark.parametrize("make", [lambda: nested(0.9, 0.1), lambda: named(0.9)])
@pytest.mark.parametrize("state", [(), (1, 2), [1, 2, 3], {"zebra": 1}, None])
def test_states_of_another_chain_are_refused(make, state):
    with pytest.raises(StateError, match="does not belong to this chain"):
        make().update(tree(1), state, tree(0))
