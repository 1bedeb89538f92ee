"""Uses shared by all examples and leaves without a kind: only sums over the batch are known, so vectors need mean zero.

Averages are over all 2^N sign patterns or all C^N labels of the N = 3 examples.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import squares
from kfac_func.estimators import Estimator, statistics
from tests import oracles
from tests.zoo import Case, close, measured, position_case, randn, unclaimed_case

EXACT, EMPIRICAL = kf.estimators.exact(), kf.estimators.empirical()


def _average(weighted: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    return {k: cast(Tensor, sum(weight * found[k] for weight, found in weighted)) for k in weighted[0][1]}


def _over_signs(monkeypatch: pytest.MonkeyPatch, case: Case, estimator: Estimator, **options: Any) -> Any:
    """Moments averaged over all 2^N sign patterns of the examples."""
    found = []
    for u in oracles.patterns(len(case.targets), (0.25, 0.75)):
        monkeypatch.setattr(statistics, "uniform", lambda *args, u=u: u)
        found.append(
            (0.5 ** len(case.targets), {k: squares(b) for k, b in measured(case, estimator, **options).items()})
        )
    monkeypatch.undo()
    return _average(found)


def _both(p: dict, x: Tensor) -> Tensor:
    places = torch.linspace(-1, 1, 12, dtype=x.dtype).reshape(3, 4)
    return torch.tanh(F.linear(x, p["w"]) + F.linear(places, p["w"])).mean(1)


def _both_case() -> Case:
    """One weight on the inputs of every example and on positions that all examples share."""
    blocks, loss = {"w": oracles.Spec("w")}, kf.losses.mse()
    return Case(
        _both, {"w": randn(6, 4)}, randn(3, 3, 4, seed=1), randn(3, 6, seed=2), loss, F.mse_loss, blocks, {"w": 6}
    )


SHARED = {
    "position": (position_case(), {}),
    "unclaimed": (unclaimed_case(), {"unclaimed": "diagonal"}),
    "both": (_both_case(), {}),
}
shared = pytest.mark.parametrize("name", SHARED)


@shared
@pytest.mark.parametrize(
    "estimator", [EXACT, kf.estimators.exact(chunk_size=1), EMPIRICAL], ids=["exact", "chunks", "empirical"]
)
def test_signs_give_the_dense_diagonal(monkeypatch, name, estimator):
    case, options = SHARED[name]
    found = _over_signs(monkeypatch, case, estimator, **options)
    if estimator.own:
        own = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, case.value)
        wanted = {k: oracles.laid_out(spec, own, 1).square().mean(0) for k, spec in case.blocks.items()}
    else:
        dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
        wanted = {k: dense.block(spec).diagonal() for k, spec in case.blocks.items()}
    assert set(found) == set(wanted)
    assert all(close(found[k].flatten(), wanted[k]) for k in wanted)


@pytest.mark.parametrize("estimator", [EXACT, EMPIRICAL], ids=["exact", "empirical"])
def test_signs_under_a_sum(monkeypatch, estimator):
    """F of a sum is N times that of the mean."""
    case, total = position_case(), position_case()._replace(loss=kf.losses.cross_entropy(reduction="sum"))
    one, two = (_over_signs(monkeypatch, c, estimator) for c in (case, total))
    assert all(close(two[k], 3 * one[k]) for k in one)


@shared
def test_without_signs_the_diagonal_is_wrong(name):
    """The mutation: an estimator that claims to have vectors of mean zero gets no signs."""
    case, options = SHARED[name]
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    block = {"position": "place", "unclaimed": "gain", "both": "w"}[name]
    found = measured(case, EXACT._replace(zero_mean=True), **options)[block]
    assert not close(squares(found).flatten(), dense.block(case.blocks[block]).diagonal(), 1e-3)


@pytest.mark.parametrize("name", ["position", "unclaimed"])
def test_monte_carlo_over_all_labels_of_the_batch(name):
    """Draws have mean zero by themselves: all C^N labels of the batch, weighted by their probability."""
    case, options = SHARED[name]
    p = case.fn(case.params, case.inputs).softmax(1)
    middle, found = p.cumsum(1) - p / 2, []
    for label in itertools.product(range(p.shape[1]), repeat=len(p)):
        index = torch.tensor(label)[:, None]
        blocks = measured(case, kf.estimators.monte_carlo(), noise=middle.gather(1, index).T, **options)
        found.append((float(p.gather(1, index).prod()), {k: squares(b) for k, b in blocks.items()}))
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    averaged = _average(found)
    assert all(close(averaged[k].flatten(), dense.block(spec).diagonal()) for k, spec in case.blocks.items())


def test_factor_of_a_shared_use():
    """G of the position embedding, over all signs: the mean over examples and positions of g gᵀ."""
    case = position_case()
    params = case.params | {"added": torch.zeros(4, 6, dtype=torch.float64)}

    def added(p, x):
        h = torch.tanh(F.linear(x, p["w"], p["b"]) + p["place"] + p["added"])
        return F.linear(h, p["head"]).mean(1)

    dense = oracles.ggn(added, params, case.inputs, case.targets, case.value).block(
        oracles.Spec("added", form="vector")
    )
    wanted = dense.reshape(4, 6, 4, 6).diagonal(dim1=0, dim2=2).sum(-1) / 4
    step = kf.value_grad_and_stats(case.fn, case.loss, estimator=EXACT)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for u in oracles.patterns(3, (0.25, 0.75)):
            patch.setattr(statistics, "uniform", lambda *args, u=u: u)
            stats = step(case.params, case.batch)[2]
            assert stats is not None
            found.append(kf.curvature.kronecker().measure(stats.blocks()["place"]))
    assert close(cast(Tensor, sum(m.g / 8 for m in found)), wanted)
    assert close(found[-1].a.values, torch.full((4,), 0.25, dtype=torch.float64))


def _examples_first(p: dict, x: Tensor) -> Tensor:
    return torch.tanh(x.flatten(0, 1) @ p["w"]).unflatten(0, x.shape[:2]).sum(1)


def _positions_first(p: dict, x: Tensor) -> Tensor:
    return torch.tanh(x.mT.movedim(2, 0).flatten(0, 1) @ p["w"]).unflatten(0, (x.shape[1], x.shape[0])).sum(0)


def _flattened(fn: Any) -> Case:
    data, spec = (randn(7, 3, 4), randn(7, 6, seed=1)), oracles.Spec("w", form="in_out")
    return Case(fn, {"w": randn(4, 6, seed=2)}, *data, kf.losses.mse(), F.mse_loss, {"w": spec}, {"w": 3})


def test_rows_of_one_example_together():
    case = _flattened(_examples_first)
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value).block(case.blocks["w"])
    assert close(squares(measured(case)["w"]).flatten(), dense.diagonal())
    assert measured(case)["w"].positions == 3


def test_rows_of_one_position_together_are_those_of_nobody(monkeypatch):
    """Nothing says which example a row belongs to, so nothing is guessed: curvature is that of the whole batch."""
    case = _flattened(_positions_first)
    assert close(case.fn(case.params, case.inputs), _examples_first(case.params, case.inputs))
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value).block(case.blocks["w"])
    assert close(_over_signs(monkeypatch, case, EXACT)["w"].flatten(), dense.diagonal())
