"""Influence against dense matrices: g_qᵀ M⁻¹ g_n with brute-force gradients."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from tests import oracles
from tests.zoo.cases import CASES, Case, subset
from tests.zoo.run import close

MODELS = ("mlp", "mean_square", "bernoulli", "conv", "grouped", "recurrent", "tokens", "tied", "attention")
CURVATURES = ("eigen", "kronecker", "diagonal", "kpsvd", "block_diagonal")
ROUTES = ("tape", "vmap")


def fitted(case: Case, curvature: str = "eigen", **options: Any) -> Any:
    made = getattr(kf.curvature, curvature)()
    return kf.fit_curvature(case.fn, case.loss, case.params, [case.batch], curvature=made, damping=0.1, **options)


def gradients(case: Case, value: Any = None) -> Tensor:
    """[N, P] in tree order, by brute force."""
    found = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, value or case.value)
    return torch.cat([found[path].flatten(1) for path in _tree.unique_paths(case.params)], dim=1)


def dense(case: Case, state: Any, **options: Any) -> Tensor:
    return kf.linear_operator(state, case.params, **options).to_dense()


def scores(case: Case, state: Any, queries: int = 3, **options: Any) -> Tensor:
    query = [subset(case, 0, queries).batch]
    return kf.influence.scores(case.fn, case.loss, case.params, state, [case.batch], query, **options)


def own(case: Case, state: Any, **options: Any) -> Tensor:
    return kf.influence.self_influence(case.fn, case.loss, case.params, state, [case.batch], **options)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_products_with_the_dense_inverse(name, route):
    case = CASES[name]
    state, g = fitted(case), gradients(case)
    wanted = g[:3] @ torch.linalg.solve(dense(case, state), g.mT)
    assert close(scores(case, state, route=route), wanted)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
def test_self_influence_is_the_diagonal(name, route):
    case = CASES[name]
    state, g = fitted(case), gradients(case)
    wanted = (g * torch.linalg.solve(dense(case, state), g.mT).mT).sum(1)
    assert wanted.min() > 0
    assert close(own(case, state, route=route), wanted)


@pytest.mark.parametrize("name", ["mlp", "conv", "tokens"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_curvature_with_an_eigenbasis(curvature, name):
    case = CASES[name]
    state, g = fitted(case, curvature), gradients(case)
    wanted = g @ torch.linalg.solve(dense(case, state), g.mT)
    assert close(scores(case, state, queries=len(g)), wanted)
    assert close(own(case, state), wanted.diagonal())


@pytest.mark.parametrize("route", ROUTES)
def test_the_damping_of_the_call_replaces_that_of_the_state(route):
    case = CASES["conv"]
    state, g = fitted(case), gradients(case)
    wanted = g[:3] @ torch.linalg.solve(dense(case, state, damping=0.7), g.mT)
    assert close(scores(case, state, route=route, damping=0.7), wanted)
    assert not close(scores(case, state, route=route), wanted)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "only"), [("conv", ["head*"]), ("mlp", ["second.w"]), ("tokens", ["norm*", "head*"])])
def test_some_blocks_only(name, only, route):
    case = CASES[name]
    state, g = fitted(case), gradients(case)
    kept = torch.cat(
        [
            torch.full((leaf.numel(),), any(path.startswith(p.split(".")[0].rstrip("*")) for p in only))
            for path, leaf in _tree.unique_paths(case.params).items()
        ]
    )
    g, m = g[:, kept], dense(case, state)[kept][:, kept]
    wanted = g @ torch.linalg.solve(m, g.mT)
    assert 0 < kept.sum() < len(kept)
    assert close(scores(case, state, route=route, only=only), wanted[:3])
    assert close(own(case, state, route=route, only=only), wanted.diagonal())


def margin(z: Tensor, targets: Tensor) -> Tensor:
    at = F.one_hot(targets, z.shape[1]).bool()
    return z[at] - z.masked_fill(at, -torch.inf).logsumexp(1)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["mlp", "conv", "tokens"])
def test_a_measurement_of_the_queries(name, route):
    case = CASES[name]
    state, g = fitted(case), gradients(case)
    measured = gradients(case, lambda z, targets: margin(z, targets).sum())
    wanted = measured[:3] @ torch.linalg.solve(dense(case, state), g.mT)
    assert close(scores(case, state, route=route, query_loss=margin), wanted)


def test_another_loss_of_the_queries():
    case = CASES["mlp"]
    state, g = fitted(case), gradients(case)
    smoothed = gradients(case, lambda z, t: F.cross_entropy(z, t, label_smoothing=0.2, reduction="sum"))
    wanted = smoothed[:3] @ torch.linalg.solve(dense(case, state), g.mT)
    other = kf.losses.cross_entropy(label_smoothing=0.2, reduction="sum")
    assert close(scores(case, state, query_loss=other), wanted)


def parts(case: Case, *edges: int) -> list[Any]:
    stops = [*edges, len(case.targets)]
    return [subset(case, start, stop).batch for start, stop in zip([0, *edges], stops, strict=True)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["mlp", "conv", "tokens", "tied"])
def test_partition_and_chunks_do_not_matter(name, route):
    case = CASES[name]
    state = fitted(case)
    whole, alone = scores(case, state, queries=len(case.targets)), own(case, state)
    for options in ({}, {"chunk_size": 2}):
        asked = {"route": route, **options}
        cut = kf.influence.scores(case.fn, case.loss, case.params, state, parts(case, 1, 4), parts(case, 2), **asked)
        assert close(cut, whole)
        found = kf.influence.self_influence(case.fn, case.loss, case.params, state, parts(case, 1, 4), **asked)
        assert close(found, alone)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_a_small_budget_gives_the_same_numbers(name, monkeypatch):
    case = CASES[name]
    state = fitted(case)
    whole, alone = scores(case, state), own(case, state)
    monkeypatch.setattr(import_module("kfac_func.blocks.pairs"), "BUDGET", 40)
    assert close(scores(case, state), whole)
    assert close(own(case, state), alone)


def test_progress_wraps_the_training_batches_and_changes_nothing():
    case, seen = CASES["mlp"], []
    state = fitted(case)

    def shown(batches: Any) -> Iterator[Any]:
        for batch in batches:
            seen.append(len(batch[1]))
            yield batch

    data = case.fn, case.loss, case.params, state, parts(case, 3)
    found = kf.influence.scores(*data, parts(case, 2), progress=shown)
    assert close(found, scores(case, state, queries=len(case.targets)))
    assert seen == [3, 5, 3, 5]
    assert close(kf.influence.self_influence(*data, progress=shown), own(case, state))
    assert seen == [3, 5, 3, 5, 3, 5]


def test_the_reduction_does_not_matter_but_the_unit_of_the_loss_does():
    case = CASES["mean_square"]
    losses = {name: kf.losses.mse(reduction=name) for name in ("mean", "batchmean", "sum")}
    found = {}
    for name, loss in losses.items():
        one = case._replace(loss=loss)
        found[name] = scores(one, fitted(one), damping=0.1 if name == "mean" else 0.2)
    assert close(found["sum"], found["batchmean"])
    assert close(found["sum"], 2 * found["mean"])  # two outputs per example


def test_parameters_that_are_never_read_say_nothing():
    case = CASES["mlp"]
    wider = case._replace(params={**case.params, "third": {"w": torch.ones(2, dtype=torch.float64)}})
    wider = wider._replace(fn=lambda p, x: case.fn({k: p[k] for k in case.params}, x))
    state, wanted = fitted(wider), scores(case, fitted(case))
    assert close(scores(wider, state), wanted)
    assert close(scores(wider, state, route="vmap"), wanted)
    for route in ROUTES:
        assert not own(wider, state, only=["third.w"], route=route).any()
        assert not scores(wider, state, only=["third.w"], route=route).any()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "block"), [("mlp", "first"), ("grouped", "conv"), ("tokens", "norm")])
def test_a_block_that_the_model_stopped_reading_is_silent(name, block, route):
    case = CASES[name]
    constant = {path: leaf.clone() for path, leaf in oracles.flat(case.params).items() if path.startswith(block)}
    state = fitted(case)
    frozen = case._replace(fn=lambda p, x: case.fn(oracles.nested(p, oracles.flat(p) | constant), x))
    g = gradients(frozen)
    wanted = g @ torch.linalg.solve(dense(case, state), g.mT)
    assert len(constant) == 2
    assert close(scores(frozen, state, route=route), wanted[:3])
    assert close(own(frozen, state, route=route), wanted.diagonal())
    assert not own(frozen, state, route=route, only=[f"{block}*"]).any()


def stray(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"], p["b"]) * p["scale"].exp()


@pytest.mark.parametrize("policy", ["identity", "diagonal"])
def test_uses_that_the_tape_cannot_see_go_through_a_vmap(policy):
    case = CASES["mean_square"]
    params = {"w": torch.ones(2, 3), "b": torch.ones(2), "scale": torch.tensor([0.2, -0.1])}
    case = case._replace(fn=stray, params={k: v.double() for k, v in params.items()})
    state = fitted(case, unclaimed=policy, estimator=kf.estimators.exact(), generator=torch.Generator().manual_seed(0))
    g = gradients(case)
    wanted = g @ torch.linalg.solve(dense(case, state), g.mT)
    assert close(scores(case, state, route="vmap"), wanted[:3])
    assert close(own(case, state, route="vmap"), wanted.diagonal())
    with pytest.raises(kf.errors.CaptureError, match="'scale'"):
        own(case, state, route="tape")


def test_gradients_flow_to_the_damping():
    case = CASES["mlp"]
    state, g = fitted(case), gradients(case)
    at = torch.tensor(0.1, dtype=torch.float64)
    inverse = torch.linalg.inv(dense(case, state))
    slope = torch.func.grad(lambda damping: own(case, state, damping=damping).sum())(at)
    assert close(slope, -(g @ inverse @ inverse @ g.mT).trace())


def test_nothing_is_written_and_nothing_is_drawn():
    case = CASES["conv"]
    state = fitted(case)
    before = [leaf.clone() for leaf in _tree.leaves((state, case.params, case.batch))]
    drawn = torch.random.get_rng_state()
    scores(case, state)
    own(case, state)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(map(torch.equal, before, _tree.leaves((state, case.params, case.batch))))
