"""Batches whose examples meet: logits between all of them, statistics of the batch, other orders, two towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func._errors import CaptureError, HyperparameterError, KFacWarning, StateError
from tests.kinds import truth
from tests.zoo import randn

N = 4
X, LABELS = randn(N, 3, seed=1), torch.tensor([0, 2, 1, 0])
LENGTHS, LONG = torch.tensor([2, 3, 1, 4]), randn(N, 4, 3, seed=2)
CE, P = kf.losses.cross_entropy(), kf.products
PARAMS = {"w": randn(5, 3, seed=3), "v": randn(3, 5, seed=4)}


def contrasted(p: dict, x: Tensor) -> Tensor:
    """Logits of every example with every other."""
    z = F.normalize(F.linear(F.linear(x, p["w"]).tanh(), p["v"]), dim=-1)
    return 4 * z @ z.mT


def two_views(p: dict, x: Tensor) -> Tensor:
    one, two = (F.linear(F.linear(view, p["w"]).tanh(), p["v"]) for view in (x, x.cos()))
    return one @ two.mT


def attended_by_the_batch(p: dict, x: Tensor) -> Tensor:
    h = F.linear(x, p["w"])
    return F.linear((h @ h.mT / 2).softmax(1) @ h, p["v"])


def standardised(p: dict, x: Tensor) -> Tensor:
    h = F.linear(x, p["w"])
    return F.linear(((h - h.mean(0)) / h.std(0)).tanh(), p["v"])


def told_the_rest(p: dict, x: Tensor) -> Tensor:
    """Every example with the maximum over all of them, as nets on sets do."""
    h = F.linear(x, p["w"])
    return F.linear(torch.tanh(h - h.amax(0)), p["v"])


def discriminated(p: dict, x: Tensor) -> Tensor:
    """Distances to the others as a feature, as discriminators have them."""
    h = F.linear(x, p["w"]).tanh()
    return F.linear(h + (-(h[:, None] - h).abs().sum(2)).exp().sum(1, keepdim=True), p["v"])


MIXED: dict[str, Callable[[dict, Tensor], Tensor]] = {
    f.__name__: f for f in (contrasted, two_views, attended_by_the_batch, standardised, told_the_rest, discriminated)
}
each = pytest.mark.parametrize("fn", MIXED.values(), ids=MIXED)


def targets(fn: Any) -> Tensor:
    return torch.arange(N) if fn in (contrasted, two_views) else LABELS


@each
def test_curvature_of_the_whole_batch_in_expectation(fn, monkeypatch):
    """Gradients are exact; the diagonal is, on the average over the signs of the examples."""
    layouts = truth.check(monkeypatch, fn, CE, PARAMS, (X, targets(fn)))
    assert set(layouts) == set(PARAMS)
    with pytest.raises(HyperparameterError, match=r"examples see each other(.|\n)*generator="):
        kf.value_grad_and_stats(fn, CE, estimator=kf.estimators.exact())(PARAMS, (X, targets(fn)))


@each
def test_who_promises_a_gradient_of_every_example_refuses(fn):
    batch = X, targets(fn)
    calls = [
        lambda: P.per_example_grads(fn, CE)(PARAMS, batch),
        lambda: P.fisher_diagonal(fn, CE)(PARAMS, batch),
        lambda: P.empirical_ntk(fn)(PARAMS, X),
        lambda: kf.laplace.fit(fn, CE, PARAMS, [batch], curvature=kf.curvature.diagonal()),
    ]
    for call in calls:
        with pytest.raises((CaptureError, StateError, HyperparameterError), match=r"see each other"):
            call()
    step: Any = kf.value_grad_and_stats(fn, CE)
    _, grads, stats = step(PARAMS, batch, generator=truth.seeded())
    tx = kf.kfac(kf.curvature.diagonal())
    with pytest.raises(StateError, match="see each other"):
        tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)


@each
def test_products_with_the_whole_batch_are_exact(fn):
    """The way out that those errors name."""
    batch, v = (X, targets(fn)), {path: torch.ones_like(leaf) for path, leaf in PARAMS.items()}
    found = torch.cat([leaf.flatten() for leaf in P.ggn_vp(fn, CE)(PARAMS, batch)(v).values()])
    dense = truth.curvature(fn, CE.value, PARAMS, *batch).whole(list(PARAMS))
    torch.testing.assert_close(found, dense.sum(1), rtol=1e-9, atol=1e-12)


class Sorted(nn.Module):
    """Sort by length, encode, undo the sort."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        lengths, order = lengths.sort(descending=True)
        seen = torch.arange(x.shape[1]) < lengths[:, None]
        h = (self.body(x[order]).tanh() * seen.unsqueeze(-1)).sum(1) / lengths[:, None]
        return self.head(torch.empty_like(h).index_copy(0, order, h))


def by_length(p: dict, inputs: tuple[Tensor, Tensor]) -> Tensor:
    return SORTED(p, inputs)


torch.manual_seed(0)
SORTED, OWN = kf.make_functional(Sorted().double())


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]], ids=["as it comes", "sorted already"])
def test_another_order_inside_is_seen_whatever_the_batch(order):
    batch = (LONG[order], LENGTHS[order]), LABELS[order]
    j, score = truth.jacobian(by_length, OWN, batch[0]), by_length(OWN, batch[0]).softmax(1) - F.one_hot(batch[1], 3)
    wanted = {path: torch.einsum("nd,nd...->n...", score, leaf) for path, leaf in j.items()}
    with pytest.raises(CaptureError, match="'vmap'"):
        P.per_example_grads(by_length, CE, route="tape")(OWN, batch)
    with pytest.warns(KFacWarning, match="route='"):
        truth.same(P.per_example_grads(by_length, CE)(OWN, batch), wanted)


def test_another_order_inside_has_the_curvature_in_expectation(monkeypatch):
    truth.check(monkeypatch, by_length, CE, OWN, ((LONG, LENGTHS), LABELS))


class Towers(nn.Module):
    """Questions meet all answers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answered = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, questions: Tensor, answers: Tensor) -> Tensor:
        return 3 * F.normalize(self.asked(questions), dim=-1) @ F.normalize(self.answered(answers), dim=-1).mT


@pytest.mark.parametrize("answers", [N, N + 2], ids=["as many", "more"])
def test_two_towers_share_their_answers(answers, monkeypatch):
    """The rows of one tower are examples, those of the other a table that all of them read."""
    torch.manual_seed(0)
    fn, params = kf.make_functional(Towers().double())
    batch = (X, randn(answers, 5, seed=5)), torch.arange(N)
    truth.check(monkeypatch, fn, CE, params, batch)
    wanted = truth.diagonal(truth.curvature(fn, CE.value, params, *batch))
    with pytest.warns(KFacWarning, match="'answered.weight'"):
        truth.same(P.fisher_diagonal(fn, CE)(params, batch), wanted)


def test_distances_to_prototypes_mix_nothing(monkeypatch):
    """torch's vmap of the backward pass of cdist is wrong for all vectors but the first."""
    fn = lambda p, x: -torch.cdist(F.linear(x, p["w"]).tanh(), p["v"].detach())  # noqa: E731
    assert not kf.make_plan(fn, PARAMS, X).mixing
    truth.check(monkeypatch, fn, CE, PARAMS, (X, LABELS))
