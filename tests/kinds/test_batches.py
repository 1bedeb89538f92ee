"""Batches as loaders make them, with inputs that are no examples and happen to be as long as the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kfac_func as kf
from kfac_func._errors import BatchError, PlanMismatchError
from tests.kinds import truth
from tests.zoo import close, randn

N = 5
CE, MSE = kf.losses.cross_entropy(), kf.losses.mse("batchmean", scale=0.5)
LABELS, Y = torch.tensor([0, 2, 1, 1, 0]), randn(N, 2, seed=9)
IDS = torch.arange(N * N).mul(7).remainder(9).reshape(N, N)  # as many tokens as examples


class Causal(nn.Module):
    """Attention with a mask, positions and a bias by distance, all of them among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.q, self.head = (
            nn.Embedding(9, 4),
            nn.Embedding(7, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )

    def forward(self, input_ids: Tensor, cache_position: Tensor, causal: Tensor, distances: Tensor) -> Tensor:
        e = self.table(input_ids) + self.places(cache_position)
        scores = (self.q(e) @ e.mT + distances).masked_fill(~causal, -1e9)
        return self.head((scores.softmax(-1) @ e).mean(1))


EXTRAS = {"cache_position": torch.arange(N), "causal": torch.ones(N, N).tril().bool(), "distances": randn(N, N, seed=1)}


@pytest.mark.parametrize("count", [N, 3])
@pytest.mark.parametrize("told", [False, True])
def test_masks_positions_and_tables_of_a_transformer(count, told, monkeypatch):
    torch.manual_seed(0)
    fn, params = kf.make_functional(Causal().double())
    model = kf.batched(fn, shared=["cache_position", "causal", "distances"]) if told else fn
    inputs, y = {"input_ids": IDS[:count], **EXTRAS}, LABELS[:count]
    if told:  # and positions that are shared by all have random signs
        assert dict(zip(sorted(inputs), kf.make_plan(model, params, inputs).cut.dims, strict=True))["input_ids"] == 0
    truth.check(monkeypatch, model, CE, params, (inputs, y))


class Cell(nn.Module):
    """One step of a recurrent net by hand; its states [layers, N, hidden] are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.kept, self.head = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        h, c = (part[0] for part in state)
        gate, new = (self.entered(x) + self.kept(h)).chunk(2, -1)
        return self.head(gate.sigmoid() * c + new.tanh())


def test_states_of_a_recurrent_net_have_their_examples_in_the_middle(monkeypatch):
    torch.manual_seed(0)
    fn, params = kf.make_functional(Cell().double())
    inputs = randn(N, 3, seed=2), (randn(1, N, 4, seed=3), randn(1, N, 4, seed=4))
    with pytest.raises(BatchError, match="in_dims"):
        kf.make_plan(fn, params, inputs)
    model = kf.batched(fn, in_dims=(0, (1, 1)))
    truth.check(monkeypatch, model, MSE, params, (inputs, Y))
    score, j = fn(params, inputs) - Y, truth.jacobian(fn, params, inputs)
    wanted = {path: torch.einsum("nd,nd...->n...", score, leaf) for path, leaf in j.items()}
    for route in ("tape", "vmap", "loop"):
        for size in (None, 2):
            made = kf.products.per_example_grads(model, MSE, route=route, chunk_size=size)
            truth.same(made(params, (inputs, Y)), wanted)


class Graph(nn.Module):
    """Messages along edges [2, E], and a readout of every node."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.own, self.head = nn.Linear(3, 4, bias=False), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        heard = torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, edges[1], self.sent(x)[edges[0]])
        return self.head((self.own(x) + heard).tanh())


@pytest.mark.parametrize("count", [N, 2 * N])
def test_a_graph_of_edges_is_one_whole(count, monkeypatch):
    torch.manual_seed(0)
    fn, params = kf.make_functional(Graph().double())
    edges = torch.arange(2 * count).mul(3).remainder(N).reshape(2, count)
    inputs = randn(N, 3, seed=2), edges
    truth.check(monkeypatch, kf.batched(fn, whole=True), MSE, params, (inputs, Y))
    with pytest.raises((BatchError, IndexError), match=r"whole=True|out of "):
        kf.make_plan(fn, params, inputs)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Embedding(9, 2)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return self.a(u).tanh() * self.b(v).sum(1)


def test_a_loader_that_makes_lists_or_dicts():
    torch.manual_seed(0)
    fn, params = kf.make_functional(Two().double())
    u = randn(N, 3, seed=1)
    rows = [((u[n], IDS[n]), LABELS[n] % 2) for n in range(N)]
    wanted = truth.diagonal(truth.curvature(fn, CE.value, params, (u, IDS), LABELS % 2))
    named = [({"u": u[n], "v": IDS[n]}, LABELS[n] % 2) for n in range(N)]
    for data in (rows, named):
        loader = DataLoader(data, batch_size=2)  # pyright: ignore[reportArgumentType]
        assert isinstance(next(iter(loader))[0], list if data is rows else dict)
        state = kf.fit_curvature(fn, CE, params, loader, curvature=kf.curvature.diagonal())
        dense = kf.linear_operator(state, params, damping=0.0).to_dense().diagonal()
        assert close(dense, torch.cat([wanted[path].flatten() for path in sorted(wanted)]))


@pytest.mark.usefixtures("unchecked")
def test_a_batch_as_a_dict_is_told_how_to_be_one():
    fn, params = kf.make_functional(Two().double())
    batch = {"u": randn(N, 3, seed=1), "v": IDS, "labels": LABELS % 2}
    calls: list[Any] = [
        lambda b: kf.value_grad_and_stats(fn, CE, estimator=kf.estimators.exact())(params, b)[1],
        lambda b: kf.products.per_example_norms(fn, CE)(params, b),
        lambda b: kf.fit_curvature(fn, CE, params, [b]),
        lambda b: kf.laplace.fit(fn, CE, params, [b]),
    ]
    for call in calls:
        with pytest.raises(BatchError, match=r"(?s)pair \(inputs, targets\).*batch\['labels'\]"):
            call(batch)
        call(({"u": batch["u"], "v": batch["v"]}, batch["labels"]))  # the way out


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 3, 2), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_max_pool1d(self.conv(x), 1).squeeze()).squeeze()


def test_a_net_that_squeezes_what_it_can(monkeypatch):
    """Plans are made with two examples and three; a batch of one has outputs without examples, which is told."""
    torch.manual_seed(0)
    fn, params = kf.make_functional(Squeezed().double())
    x, y = randn(N, 2, 6, seed=1), randn(N, seed=2)
    truth.check(monkeypatch, fn, MSE, params, (x, y))
    with pytest.raises(PlanMismatchError, match=r"wanted +\[1, 1\]"):
        kf.value_grad_and_stats(fn, MSE, estimator=kf.estimators.exact())(params, (x[:1], y[:1]))
