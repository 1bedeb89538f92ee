"""The gradient as rows: the same direction, cheaper, for the very gradients of the step and for no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree
from kfac_func.blocks import Layout, Thin, pack, pays, thin
from kfac_func.estimators import statistics
from tests.zoo.cases import CASES
from tests.zoo.run import run

CURVATURES = {
    "kronecker": kf.curvature.kronecker(),
    "blocks": kf.curvature.kronecker(max_dim=3),
    "sides": kf.curvature.kronecker(sides="input"),
    "eigen": kf.curvature.eigen(),
    "kpsvd": kf.curvature.kpsvd(),
}
G = torch.Generator().manual_seed(0)
WIDE, TALL = (torch.randn(n, 9, generator=G, dtype=torch.float64) for n in (2, 40))
FN, PARAMS = kf.make_functional(nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7, bias=False)).double())
LOSS = kf.losses.mse()
STEP: Any = kf.value_grad_and_stats(FN, LOSS, estimator=kf.estimators.exact(), rows=True)


def taken(x: Tensor, **options: Any) -> tuple[Tensor, dict, Any]:
    return STEP(PARAMS, (x, x[:, :7].square()), **options)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep all rows that there are, whether they pay or not."""

    def any_rows(layout: Layout, rules: Any, examples: int) -> bool:
        del examples
        return layout.matrix and not any(rule.kind.diagonal or rule.where is None for rule in rules)

    monkeypatch.setattr(statistics, "pays", any_rows)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", CASES)
def test_the_rows_of_every_kind_sum_up_to_the_gradient(name: str):
    _, grads, stats = run(CASES[name], rows=True)
    leaves = _tree.unique_paths(grads)
    layouts = {layout.name: layout for layout in stats.rules.value.layouts}
    for block, known in stats.gradient.items():
        layout = layouts[block]
        left, right = (torch.eye(n, dtype=torch.float64) for n in (layout.outputs, layout.columns))
        eyes = (x.expand(layout.groups, *x.shape) if layout.groups > 1 else x for x in (left, right))
        torch.testing.assert_close(known.rows.times(*eyes), pack(layout, leaves), rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", CASES)
def test_a_direction_from_rows_is_the_one_from_the_sum(name: str, curvature: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    _, grads, stats = run(case, rows=True)
    tx = kf.kfac(CURVATURES[curvature], damping=0.1)
    used: list[Thin] = []
    times = Thin.times
    monkeypatch.setattr(Thin, "times", lambda self, *sides: used.append(self) or times(self, *sides))
    got, state = tx.update(grads, tx.init(case.params), case.params, stats=stats)
    assert len(used) == len(stats.gradient)
    want = kf.precondition(state, grads)
    torch.testing.assert_close(_tree.leaves(got), _tree.leaves(want), rtol=1e-9, atol=1e-11)


def test_rows_are_kept_where_a_layer_is_wider_than_the_batch_is_long():
    assert set(taken(WIDE)[2].gradient) == {"0.weight", "2.weight"}
    assert taken(TALL)[2].gradient == {}
    assert run(CASES["mlp"])[2].gradient == {}  # not without being asked
    layout, rules = taken(WIDE)[2].rules.value.layouts[0], [taken(WIDE)[2].blocks()["0.weight"].uses[0].rule]
    o, i = 8, 10
    longest = next(n for n in range(1, 99) if n * (o * o + i * i) >= o * i * (o + i))
    assert [pays(layout, rules, n) for n in (longest - 1, longest)] == [True, False]


def used_by(grads: Any, stats: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a step solves from rows."""
    used: list[Thin] = []
    times = Thin.times
    with monkeypatch.context() as patch:
        patch.setattr(Thin, "times", lambda self, *sides: used.append(self) or times(self, *sides))
        tx = kf.chain(kf.kfac(damping=0.1), kf.sgd(0.1))
        tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    return bool(used)


def test_other_gradients_than_those_of_the_step_are_solved_themselves(monkeypatch: pytest.MonkeyPatch):
    _, grads, stats = taken(WIDE)
    assert used_by(grads, stats, monkeypatch)
    assert not used_by({path: g.clone() for path, g in grads.items()}, stats, monkeypatch)
    assert not used_by(taken(WIDE.flip(0))[1], stats, monkeypatch)
    assert not used_by(grads, [stats, stats], monkeypatch)
    grads["0.weight"].mul_(0.5)  # by hand, after the step
    grads["2.weight"].mul_(0.5)
    assert not used_by(grads, stats, monkeypatch)


def test_a_link_before_hands_on_its_own_updates():
    _, grads, stats = taken(WIDE)
    tx = kf.chain(kf.scale(2.0), kf.kfac(damping=0.1))
    updates, (_, state) = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    want = kf.precondition(state, {path: 2 * g for path, g in grads.items()})
    torch.testing.assert_close(updates, want, rtol=1e-12, atol=1e-12)


def test_a_step_without_statistics_hands_on_the_gradient_alone():
    _, grads, stats = taken(WIDE)
    tx = kf.kfac(damping=0.1)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    value, grads, silent = taken(WIDE.flip(1), stats=False)
    plain = kf.value_grad_and_stats(FN, LOSS)(PARAMS, (WIDE.flip(1), WIDE.flip(1)[:, :7].square()), stats=False)
    assert plain[2] is None
    torch.testing.assert_close((value, grads), plain[:2], rtol=1e-12, atol=1e-12)
    one, two = (tx.update(grads, state, PARAMS, stats=given, refresh=False) for given in (silent, None))
    torch.testing.assert_close(_tree.leaves(one), _tree.leaves(two), rtol=1e-10, atol=1e-12)
    assert int(one[1].observed) == 1
    assert taken(TALL, stats=False)[2] is None


def test_several_batches_skip_those_that_say_nothing():
    _, grads, stats = taken(WIDE)
    silent = taken(WIDE.flip(1), stats=False)[2]
    tx = kf.kfac(damping=0.1)
    one, two = (tx.update(grads, tx.init(PARAMS), PARAMS, stats=given) for given in ([silent, stats], [stats]))
    torch.testing.assert_close(_tree.leaves(one), _tree.leaves(two), rtol=0, atol=0)


def test_rows_of_several_uses_stand_one_below_the_other():
    _, _, stats = taken(WIDE)
    (use,) = stats.blocks()["0.weight"].uses
    assert use.grads is not None
    one = use._replace(grads=use.grads[:1])
    single, double = (thin(stats.rules.value.layouts[0], uses) for uses in ([one], [one, one]))
    assert double.left.shape[0] == 2 * single.left.shape[0]
    torch.testing.assert_close(double.left.mT @ double.right, 2 * single.left.mT @ single.right)
