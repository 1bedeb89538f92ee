"""The state of a run: files, old copies, dtypes, wrong owners, and what `describe` says about it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import StateError, TreeMismatchError

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 3, generator=G), torch.randint(4, (6,), generator=G)
LOSS = kf.losses.cross_entropy()


def problem(dtype: torch.dtype = torch.float32) -> tuple[dict, torch.Tensor, Any]:
    torch.manual_seed(0)
    fn, params = kf.make_functional(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4)).to(dtype)
    )
    return params, X.to(dtype), kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.monte_carlo())


def chain(split: Any = "pi") -> kf.GradientTransformation:
    return kf.chain(kf.kfac(damping=0.1, refresh_every=3, split=split), kf.sgd(0.1, momentum=0.9))


def run(tx: Any, params: dict, state: Any, steps: range, x: torch.Tensor, step: Any) -> tuple[dict, Any]:
    for k in steps:
        _, grads, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(k))
        updates, state = tx.update(grads, state, params, stats=stats if k % 4 else None)
        params = kf.apply_updates(params, updates)
    return params, state


def through_a_file(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(one: Any, other: Any) -> None:
    """Bit for bit, leaf by leaf: states of two transformations differ in the functions that they carry."""
    assert [leaf.path for leaf in _tree.leaves_with_paths(one)] == [
        leaf.path for leaf in _tree.leaves_with_paths(other)
    ]
    torch.testing.assert_close(_tree.leaves(one), _tree.leaves(other), rtol=0, atol=0)


@pytest.mark.parametrize("split", ["pi", "exact"])
@pytest.mark.parametrize("saved_at", [0, 1, 5])
def test_a_run_goes_on_from_a_file_bit_for_bit(split, saved_at):
    params, x, step = problem()
    tx = chain(split)
    middle = run(tx, params, tx.init(params), range(saved_at), x, step)
    wanted = run(tx, *middle, range(saved_at, 25), x, step)
    params, state = through_a_file(middle)
    same(run(chain(split), params, state, range(saved_at, 25), x, step), wanted)


def test_a_file_needs_its_transformation_before_anything_else():
    params, x, step = problem()
    tx = chain()
    params, state = run(tx, params, tx.init(params), range(3), x, step)
    loaded = through_a_file(state)
    _, grads, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(9))
    assert "no curvature attached" in kf.describe(loaded)
    for call in (lambda: kf.precondition(loaded, grads), lambda: kf.observe(loaded, stats)):
        with pytest.raises(StateError, match=r"call tx\.update"):
            call()
    _, met = tx.update(grads, loaded, params)
    same(kf.precondition(met, grads), kf.precondition(state, grads))


def test_a_file_keeps_the_whole_description():
    def fn(p: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, p["w"]) * p["scale"]

    params = {"w": torch.ones(4, 3), "scale": torch.ones(4), "idle": torch.ones(1)}
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact(), unclaimed="identity")
    state = kf.observe(kf.kfac().init(params), step(params, (X, Y))[2])
    rows, again = (kf.describe(one).splitlines()[1:] for one in (state, through_a_file(state)))
    assert rows == again
    assert len(rows) == 5


def test_old_states_stay_usable():
    params, x, step = problem()
    tx = chain()
    start = run(tx, params, tx.init(params), range(2), x, step)
    one = run(tx, *start, range(2, 12), x, step)
    run(tx, *one, range(12, 20), x, step)
    same(run(tx, *start, range(2, 12), x, step), one)


def test_states_hold_tensors_only():
    params, x, step = problem()
    tx = chain()
    for state in (tx.init(params), run(tx, params, tx.init(params), range(3), x, step)[1]):
        assert all(type(leaf) is torch.Tensor for leaf in _tree.leaves(state))
        inner = _tree.nodes(state, kf.KFacState)[0]
        assert (inner.step.dtype, inner.step.device.type) == (torch.int64, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_models_of_any_precision_have_factors_of_at_least_float32(dtype):
    params, x, step = problem(dtype)
    value, grads, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(0))
    tx = kf.kfac(damping=0.1)
    updates, state = tx.update(grads, tx.init(params), params, stats=stats)
    wide = torch.promote_types(dtype, torch.float32)
    assert value.isfinite()
    for name, leaf in params.items():
        assert grads[name].dtype == updates[name].dtype == leaf.dtype
        assert updates[name].isfinite().all()
    assert {leaf.dtype for leaf in _tree.leaves((state.curvature, state.factored))} == {wide}
    double = problem(torch.float64)
    _, wanted, stats = double[2](double[0], (double[1], Y), generator=torch.Generator().manual_seed(0))
    direction, _ = tx.update(wanted, tx.init(double[0]), stats=stats)
    near = {torch.float64: 0.0, torch.float32: 1e-4}.get(dtype, 0.05)
    for name in params:
        error = (updates[name].double() - direction[name]).norm() / direction[name].norm()
        assert error <= near, (name, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_another_precision_keep_theirs(dtype):
    params, x, step = problem()
    _, grads, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(0))
    state = kf.observe(kf.kfac(damping=0.1).init(params), stats)
    wanted = kf.precondition(state, grads)
    for name, v in kf.precondition(state, {name: grad.to(dtype) for name, grad in grads.items()}).items():
        assert v.dtype == dtype
        torch.testing.assert_close(v.float(), wanted[name], rtol=0.05, atol=0.02)


def test_a_model_under_autocast_has_gradients_in_the_dtype_of_its_parameters():
    params, x, step = problem()
    with torch.autocast("cpu", torch.bfloat16):
        _, grads, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(0))
    tx = kf.kfac(damping=0.1)
    updates, state = tx.update(grads, tx.init(params), params, stats=stats)
    assert {leaf.dtype for leaf in _tree.leaves((grads, updates))} == {torch.float32}
    assert {leaf.dtype for leaf in _tree.leaves(state.curvature)} == {torch.float32}


def other_stats() -> kf.Stats:
    fn, params = kf.make_functional(nn.Linear(3, 4))
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.empirical())
    return step(params, (X, Y))[2]


def test_states_and_trees_of_another_model_are_refused():
    params, x, step = problem()
    _, grads, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(0))
    tx = kf.kfac()
    _, state = tx.update(grads, tx.init(params), stats=stats)
    for call in (lambda: kf.observe(state, other_stats()), lambda: tx.update(grads, state, stats=other_stats())):
        with pytest.raises(StateError, match="other blocks") as caught:
            call()
        assert "0.weight" in str(caught.value)
    with pytest.raises(TreeMismatchError, match="'9\\.weight'"):
        kf.precondition(state, grads | {"9.weight": x})


def of_width(width: int) -> tuple[dict, Any, kf.Stats]:
    torch.manual_seed(0)
    fn, params = kf.make_functional(nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 4)))
    _, grads, stats = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.empirical())(params, (X, Y))
    assert stats is not None
    return params, grads, stats


@pytest.mark.parametrize("make", [kf.kfac, kf.ekfac, kf.exact_natural_gradient])
def test_another_width_is_told_by_leaf_and_shape(make):
    (params, _, own), (_, grads, stats) = of_width(8), of_width(9)
    tx = make(damping=0.1)
    state = kf.observe(tx.init(params), own)
    with pytest.raises(StateError, match="other blocks") as caught:
        tx.update(grads, state, stats=stats)
    got, wanted = (line.split(None, 1)[1] for line in str(caught.value).splitlines()[1:3])
    assert got == (
        "'0.weight' + '0.bias' (linear, V [9, 4]), '1.weight' + '1.bias' (layer_norm, V [18]), "
        "'2.weight' + '2.bias' (linear, V [4, 10])"
    )
    assert wanted == got.replace("[9, 4]", "[8, 4]").replace("[18]", "[16]").replace("[4, 10]", "[4, 9]")
    for call in (lambda: tx.update(grads, state), lambda: kf.precondition(state, grads)):
        with pytest.raises(TreeMismatchError, match=r"'0.weight' of shape \[9, 3\](.|\n)*V \[8, 4\]"):
            call()


def stored(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OTHERS = {"ekfac": kf.ekfac, "kpsvd": kf.kpsvd, "diagonal": lambda: kf.kfac(kf.curvature.diagonal())}


@pytest.mark.parametrize("file", [False, True], ids=["in memory", "from a file"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_recipe_is_refused(name, file):
    params, grads, stats = of_width(8)
    tx, other = (kf.chain(one, kf.sgd(0.1)) for one in (kf.kfac(), OTHERS[name]()))
    for state in (tx.init(params), tx.update(grads, tx.init(params), params, stats=stats)[1]):
        with pytest.raises(StateError, match="another curvature") as caught:
            other.update(grads, stored(state) if file else state, params, stats=stats)
        assert "got      blockwise(kronecker[cholesky], diagonal)" in str(caught.value)


def test_options_of_a_structure_may_change():
    params, grads, stats = of_width(8)
    _, state = kf.kfac().update(grads, kf.kfac().init(params), params, stats=stats)
    one, two = (kf.kfac(kf.curvature.kronecker(solver)) for solver in ("cholesky", "eigh"))
    wanted, _ = one.update(grads, stored(state), params, refresh=True)
    found, after = two.update(grads, stored(state), params, refresh=True)
    assert after.rules.value.curvature.name == "blockwise(kronecker[eigh], diagonal)"
    for path, leaf in wanted.items():
        torch.testing.assert_close(found[path], leaf, rtol=1e-3, atol=1e-5)


NO_STATE = [(), {"a": torch.ones(1)}, kf.sgd(0.1, momentum=0.9).init({"w": torch.ones(1)})]


@pytest.mark.parametrize("state", NO_STATE, ids=["empty", "dict", "sgd"])
def test_without_a_kfac_state_inside_there_is_nothing_to_do(state):
    stats = other_stats()
    for call in (lambda: kf.observe(state, stats), lambda: kf.precondition(state, {}), lambda: kf.describe(state)):
        with pytest.raises(StateError, match="no K-FAC state"):
            call()


def test_several_states_are_observed_together_and_not_solved():
    params, x, step = problem()
    _, grads, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(0))
    pair = kf.kfac(damping=0.1).init(params), kf.kfac(damping=0.2).init(params)
    found = kf.observe(pair, stats)
    assert [int(state.observed) for state in found] == [1, 1]
    with pytest.raises(StateError, match="several"):
        kf.precondition(found, grads)


def test_a_description_names_every_block():
    params, x, step = problem()
    tx = kf.kfac(damping=0.25, split="exact")
    assert kf.describe(tx.init(params)).splitlines()[1] == "no statistics yet: gradients pass unchanged"
    _, _, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(0))
    head, *rows, last = kf.describe(kf.observe(tx.init(params), stats)).splitlines()
    assert head == (
        "kfac: blockwise(kronecker[cholesky], diagonal), damping 0.25, split exact, 1 batches observed, 0 rejected"
    )
    assert [row.split() for row in rows] == [
        ["block", "kind", "V", "memory", "leaves"],
        ["0.weight", "linear", "o=5", "0.000416", "MB", "0.weight", "+", "0.bias"],
        ["2.weight", "layer_norm", "p=10", "8e-05", "MB", "2.weight", "+", "2.bias"],
        ["3.weight", "linear", "o=4", "0.00052", "MB", "3.weight", "+", "3.bias"],
    ]
    assert last == "memory: 0.00102 MB, of which averages 0.000428 MB"


def test_memory_is_counted_once_where_averages_and_factorisation_share_it():
    params, x, step = problem()
    _, _, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(0))
    state = kf.observe(kf.ekfac(damping=0.25).init(params), stats)
    storages = {leaf.data_ptr(): leaf.nbytes for leaf in _tree.leaves((state.curvature, state.factored))}
    assert f"memory: {sum(storages.values()) / 1e6:.3g} MB" in kf.describe(state)
