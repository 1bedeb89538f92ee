"""The chain link and the two primitives on its state: what passes, what is kept, what is averaged and refreshed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree
from kfac_func._errors import TreeMismatchError
from kfac_func.blocks import pack, unpack

X, Y = (torch.randn(6, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64) for d in (3, 2))


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)).to(dtype)


FN, PARAMS = kf.make_functional(model())
STEP: Any = kf.value_grad_and_stats(FN, kf.losses.mse("batchmean"), estimator=kf.estimators.exact())


def taken(scale: float = 1.0) -> tuple[dict, kf.Stats]:
    _, grads, stats = STEP(PARAMS, (scale * X, Y))
    return grads, stats


GRADS, STATS = taken()
LATER = taken(0.7)
BAD = taken(float("nan"))[1]


def same(one: object, other: object) -> None:
    """Bit for bit."""
    _tree.tree_map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True), one, other)


def test_the_link_is_the_primitives_in_turn():
    tx = kf.kfac(damping=0.1)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, stats=STATS)
    observed = kf.observe(tx.init(PARAMS), STATS)
    same(updates, kf.precondition(observed, GRADS))
    same(state._replace(step=observed.step), observed)
    assert int(state.step) == 1
    assert not torch.allclose(updates["0.weight"], GRADS["0.weight"])


def test_a_direction_scaled_by_what_follows_in_the_chain():
    tx = kf.chain(kf.kfac(damping=0.1), kf.sgd(0.5))
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, stats=STATS)
    same(updates, {name: -0.5 * v for name, v in kf.precondition(state, GRADS).items()})


def test_every_block_is_solved_by_its_own_factors():
    state = kf.observe(kf.kfac(damping=0.1, split="exact").init(PARAMS), STATS)
    dense = kf.curvature.blockwise(kf.curvature.kronecker(), kf.curvature.diagonal()).dense(state.curvature)
    shapes = {name: leaf.shape for name, leaf in PARAMS.items()}
    assert set(dense) == {"0.weight", "2.weight", "3.weight"}
    for layout in state.rules.value.layouts:
        f = dense[layout.name]
        v = pack(layout, GRADS)
        wanted = torch.linalg.solve(f + 0.1 * torch.eye(len(f)), v.flatten()).reshape(v.shape)
        found = kf.precondition(state, GRADS)
        torch.testing.assert_close({k: found[k] for k in layout.leaves}, unpack(layout, wanted, shapes))


INSIDE = {
    "itself": lambda state: state,
    "tuple": lambda state: (torch.ones(1), state),
    "dict": lambda state: {"a": None, "b": [state, {"c": torch.ones(2)}]},
    "chain": lambda state: (state, kf.sgd(0.1, momentum=0.9).init(PARAMS)),
}


@pytest.mark.parametrize("wrap", INSIDE.values(), ids=INSIDE)
def test_the_primitives_work_on_any_state(wrap):
    empty = kf.kfac(damping=0.1).init(PARAMS)
    found = kf.observe(wrap(empty), STATS)
    alone = kf.observe(empty, STATS)
    same(found, wrap(alone))
    same(kf.precondition(found, GRADS), kf.precondition(alone, GRADS))
    assert kf.describe(found) == kf.describe(alone)


def test_the_primitives_work_on_a_torchopt_state():
    torchopt = pytest.importorskip("torchopt")
    tx = torchopt.chain(kf.kfac(damping=0.1), torchopt.sgd(0.1))
    observed = kf.observe(tx.init(PARAMS), STATS)
    updates, _ = tx.update(GRADS, observed, params=PARAMS, inplace=False)
    same(updates, {name: -0.1 * v for name, v in kf.precondition(observed, GRADS).items()})


def test_before_the_first_statistics_gradients_pass_unchanged():
    tx = kf.kfac()
    updates, state = tx.update(GRADS, tx.init(PARAMS))
    same(updates, GRADS)
    assert all(updates[k].data_ptr() != GRADS[k].data_ptr() for k in GRADS)
    assert (int(state.step), int(state.observed)) == (1, 0)


def test_without_statistics_the_old_ones_serve():
    tx = kf.kfac(damping=0.1)
    _, state = tx.update(GRADS, tx.init(PARAMS), stats=STATS)
    updates, after = tx.update(LATER[0], state)
    same(updates, kf.precondition(state, LATER[0]))
    assert int(after.observed) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_only_counts_as_rejected(bad):
    tx = kf.kfac(damping=0.1)
    _, state = tx.update(GRADS, tx.init(PARAMS), stats=STATS)
    updates, after = tx.update(GRADS, state, stats=taken(bad)[1])
    same(after._replace(rejected=state.rejected, step=state.step), state)
    assert (int(after.rejected), int(after.observed), int(after.failed)) == (1, 1, 0)
    same(updates, kf.precondition(state, GRADS))


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize("start", [0, 13], ids=["at once", "after 13 steps"])
def test_a_first_batch_that_is_not_finite_leaves_no_trace(split, start):
    tx = kf.kfac(damping=0.1, split=split)
    state = tx.init(PARAMS)
    for _ in range(start):
        _, state = tx.update(GRADS, state)
    updates, after = tx.update(GRADS, state, stats=BAD)
    torch.testing.assert_close(updates, GRADS)
    assert (int(after.observed), int(after.rejected)) == (0, 1)
    updates, after = tx.update(GRADS, after, stats=STATS)
    wanted, fresh = tx.update(GRADS, tx.init(PARAMS), stats=STATS)
    same(updates, wanted)
    same(after.curvature, fresh.curvature)
    assert int(after.observed) == 1


def dead(scale: float) -> kf.Stats:
    """Statistics of a layer whose inputs are 0: without damping its factor A has no inverse."""
    fn, params = kf.make_functional(nn.Linear(3, 2, bias=False).double())
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    return step(params, (scale * X, Y))[2]


def test_a_factorisation_that_fails_keeps_the_one_before():
    tx = kf.kfac(damping=lambda count: torch.where(count > 0, 0.0, 0.1), decay=0.0)
    grads = {"weight": torch.ones(2, 3, dtype=torch.float64)}
    _, state = tx.update(grads, tx.init(grads), stats=dead(1.0))
    updates, after = tx.update(grads, state, stats=dead(0.0), refresh=True)
    same(after.factored, state.factored)
    assert (int(after.failed), int(after.rejected), int(after.observed)) == (1, 0, 2)
    assert updates["weight"].isfinite().all()


def test_a_first_factorisation_that_fails_counts_and_does_no_harm():
    tx = kf.kfac(damping=0.0)
    grads = {"weight": torch.ones(2, 3, dtype=torch.float64)}
    updates, state = tx.update(grads, tx.init(grads), stats=dead(0.0))
    assert int(state.failed) == 1
    assert updates["weight"].isfinite().all()


@pytest.mark.parametrize("average", ["debiased", "warmup", "constant"])
def test_two_batches_are_averaged(average):
    tx = kf.kfac(average=average, decay=0.9)
    one, other = (kf.observe(tx.init(PARAMS), stats).curvature for stats in (STATS, LATER[1]))
    both = kf.observe(kf.observe(tx.init(PARAMS), STATS), LATER[1]).curvature
    new = {"warmup": 0.5, "debiased": 1 / 1.9, "constant": 0.1}[average]
    torch.testing.assert_close(
        both.matrix["0.weight"].a, torch.lerp(one.matrix["0.weight"].a, other.matrix["0.weight"].a, new)
    )
    assert not torch.equal(one.matrix["0.weight"].a, other.matrix["0.weight"].a)


@pytest.mark.parametrize(
    "damping", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), lambda count: 0.3 + 0 * count]
)
def test_damping_is_a_number_a_tensor_or_a_schedule(damping):
    updates, state = (tx := kf.kfac(damping=damping)).update(GRADS, tx.init(PARAMS), stats=STATS)
    wanted, _ = (tx := kf.kfac(damping=0.3)).update(GRADS, tx.init(PARAMS), stats=STATS)
    torch.testing.assert_close(updates, wanted, rtol=1e-6, atol=1e-8)
    assert (state.damping.dtype, state.damping.shape) == (torch.float64, ())


def test_a_schedule_sees_the_count_of_updates():
    tx = kf.kfac(damping=lambda count: 1.0 + count, refresh_every=2)
    state, seen = tx.init(PARAMS), []
    for _ in range(4):
        _, state = tx.update(GRADS, state, stats=STATS)
        seen.append(float(state.damping))
    assert seen == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("every", "asked", "wanted"),
    [(3, None, [0, 1, 2, 4, 6]), (1, None, list(range(8))), (3, False, [0]), (50, True, list(range(8)))],
)
def test_when_factors_are_refreshed(every, asked, wanted):
    calls = []
    whole = kf.curvature.blockwise(kf.curvature.kronecker(), kf.curvature.diagonal())

    def factorize(*args):
        calls.append(args)
        return whole.factorize(*args)

    tx = kf.kfac(whole._replace(factorize=factorize), refresh_every=every)
    state, at = tx.init(PARAMS), []
    for step in range(8):
        before = len(calls)
        _, state = tx.update(GRADS, state, stats=STATS if step % 2 == 0 else None, refresh=asked)
        at += [step] * (len(calls) - before)
    assert at == wanted


OPTIONS = [
    {"damping": 0.2},
    {"split": "none"},
    {"split": "exact"},
    {"decay": 0.5},
    {"average": "warmup"},
    {"average": "constant"},
    {"refresh_every": 1},
    {"burn_in": 4},
    {"l2": 0.1},
    {"damping": {"0.*": 0.2, "**": 0.1}},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_changes_the_result(option):
    found = []
    for options in ({}, option):
        tx = kf.kfac(**{"damping": 0.1, "refresh_every": 2, "decay": 0.9, **options})
        state = tx.init(PARAMS)
        for stats in (STATS, LATER[1], LATER[1], STATS):
            updates, state = tx.update(GRADS, state, stats=stats)
        found.append(updates["0.weight"])
    assert not torch.allclose(*found)


def test_no_update_is_no_direction_and_the_solution_is_linear():
    state = kf.observe(kf.kfac(damping=0.1).init(PARAMS), STATS)
    one, other = GRADS, LATER[0]
    both = _tree.tree_map(lambda a, b: 2 * a - 3 * b, one, other)
    wanted = _tree.tree_map(lambda a, b: 2 * a - 3 * b, kf.precondition(state, one), kf.precondition(state, other))
    torch.testing.assert_close(kf.precondition(state, both), wanted)
    same(kf.precondition(state, _tree.tree_map(torch.zeros_like, one)), _tree.tree_map(torch.zeros_like, one))


def test_missing_gradients_stay_missing():
    state = kf.observe(kf.kfac(damping=0.1).init(PARAMS), STATS)
    whole = kf.precondition(state, GRADS)
    frozen = GRADS | {"0.weight": None, "0.bias": None}
    same(kf.precondition(state, frozen), whole | {"0.weight": None, "0.bias": None})
    with pytest.raises(TreeMismatchError, match=r"'0\.bias'"):
        kf.precondition(state, GRADS | {"0.bias": None})


def test_leaves_without_curvature_pass():
    def fn(p: dict, x: Tensor) -> Tensor:
        return FN({name: p[name] for name in PARAMS}, x) * p["scale"].exp()

    params = PARAMS | {"scale": torch.ones(2, dtype=torch.float64), "idle": torch.ones(1)}
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact(), unclaimed="identity")
    _, grads, stats = step(params, (X, Y))
    updates, state = (tx := kf.kfac()).update(grads, tx.init(params), stats=stats)
    for name in ("scale", "idle"):
        assert torch.equal(updates[name], grads[name])
        assert updates[name].data_ptr() != grads[name].data_ptr()
    last = [line.split() for line in kf.describe(state).splitlines()[-3:-1]]
    assert last == [["scale", "identity", "-", "-", "scale"], ["idle", "unused", "-", "-", "idle"]]
