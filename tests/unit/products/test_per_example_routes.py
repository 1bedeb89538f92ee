"""What the routes to per-example quantities see and refuse, trees of inputs, torch.func, progress bars, NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kfac_func as kf
from kfac_func import errors
from kfac_func.products.rows import example_rows
from tests import oracles
from tests.zoo import CASES, close, position_case, unclaimed_case
from tests.zoo.cases import randn

route = pytest.mark.parametrize("route", ["tape", "vmap"])
P = kf.products


@pytest.mark.parametrize(
    ("case", "name"), [(unclaimed_case(), "gain"), (position_case(), "place")], ids=["unclaimed", "shared"]
)
def test_the_other_route_does_what_the_tape_refuses(case, name):
    with pytest.raises(errors.CaptureError, match=rf"(?s){name}.*route='vmap'"):
        P.per_example_grads(case.fn, case.loss, route="tape")(case.params, case.batch)
    wanted = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, case.value)
    found = oracles.flat(P.per_example_grads(case.fn, case.loss, route="vmap", chunk_size=2)(case.params, case.batch))
    assert all(close(leaf, wanted[path]) for path, leaf in found.items())
    norms = P.per_example_norms(case.fn, case.loss, route="vmap")(case.params, case.batch)
    assert close(norms, torch.cat([leaf.flatten(1) for leaf in wanted.values()], dim=1).norm(dim=1))
    diagonal = oracles.flat(P.fisher_diagonal(case.fn, case.loss, route="vmap")(case.params, case.batch))
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    assert close(torch.cat([leaf.flatten() for leaf in diagonal.values()]), dense.whole(list(diagonal)).diagonal())


def units(z):
    return torch.eye(z[0].numel(), dtype=z.dtype).unsqueeze(1).expand(-1, *z.shape)


@route
def test_only_keeps_the_blocks_that_are_asked_for(route):
    case = unclaimed_case()
    rows = example_rows(
        case.fn, case.params, case.inputs, units, route=route, only=["head", "b*"] if route == "vmap" else ["head"]
    )
    assert set(rows.pairs) == set(rows.layouts) == ({"head", "b"} if route == "vmap" else {"head"})
    wanted = oracles.jacobians(case.fn, case.params, case.inputs, 3)["head"]
    pair, lead = rows.pairs["head"], (2, 3)
    assert pair.left.shape[:2] == lead
    assert close((pair.left.mT @ pair.right).reshape(*lead, 2, 6), wanted.transpose(0, 1))


def test_an_explicit_plan_serves_both_batches():
    case = CASES["conv"]
    plan = kf.make_plan(case.fn, case.params, case.inputs[:2])
    found = example_rows(case.fn, case.params, case.inputs, units, plan=plan)
    again = example_rows(case.fn, case.params, case.inputs, units)
    assert all(torch.equal(*sides) for k in found.pairs for sides in zip(found.pairs[k], again.pairs[k], strict=True))


@route
@pytest.mark.parametrize("chunk_size", [None, 3, 100])
def test_inputs_may_be_trees_with_leaves_for_all_examples(route, chunk_size):
    x, scale, params = randn(7, 3, seed=1), randn(3, seed=2), {"w": randn(2, 3, seed=3), "unused": randn(4, seed=4)}
    inputs = {"images": x, "scale": scale}  # as long as a chunk

    def fn(p, inputs):
        return F.linear(inputs["images"] * inputs["scale"], p["w"])

    loss, y = kf.losses.mse(reduction="batchmean", scale=0.5), randn(7, 2, seed=5)
    found = P.per_example_grads(fn, loss, route=route, chunk_size=chunk_size)(params, (inputs, y))
    wanted = torch.einsum("no,ni->noi", (x * scale) @ params["w"].T - y, x * scale)
    assert close(found["w"], wanted)
    assert found["unused"].shape == (7, 4)
    assert found["unused"].count_nonzero() == 0
    derivative = P.jacobian(fn, route=route, chunk_size=chunk_size)(params, inputs)
    assert derivative["unused"].shape == (7, 2, 4)


@route
def test_outputs_may_be_numbers(route):
    params, x = {"w": randn(1, 3, seed=3)}, randn(5, 3, seed=1)
    found = P.jacobian(lambda p, x: F.linear(x, p["w"]).squeeze(1), route=route)(params, x)
    assert close(found["w"], x.unsqueeze(1))


# ------------------------------------------------------------------ torch.func, bars, NaN


@route
def test_they_go_through_vmap_and_grad(route):
    case = CASES["mlp"]
    norms = P.per_example_norms(case.fn, case.loss, route=route)
    members = [case.params, oracles.nested(case.params, {k: 0.5 * v for k, v in oracles.flat(case.params).items()})]
    flat = [oracles.flat(member) for member in members]
    many = oracles.nested(case.params, {k: torch.stack([one[k] for one in flat]) for k in flat[0]})
    found = torch.func.vmap(lambda p: norms(p, case.batch))(many)
    assert close(found, torch.stack([norms(member, case.batch) for member in members]))

    def penalty(p):
        return norms(p, case.batch).square().sum()

    def brute(p):
        def one(x, t):
            return torch.func.grad(lambda q: case.value(case.fn(q, x[None]), t[None]))(p)

        return sum(leaf.square().sum() for leaf in oracles.flat(torch.func.vmap(one)(*case.batch)).values())

    got, wanted = (oracles.flat(torch.func.grad(f)(case.params)) for f in (penalty, brute))
    assert all(close(got[path], wanted[path]) for path in wanted)


def test_a_bar_sees_every_chunk():
    case, seen = CASES["mlp"], []

    def bar(parts):
        parts = list(parts)
        seen.append(len(parts))
        return iter(parts)

    options = {"chunk_size": 3, "progress": bar}
    P.per_example_norms(case.fn, case.loss, **options)(case.params, case.batch)
    P.fisher_diagonal(case.fn, case.loss, **options)(case.params, case.batch)
    P.per_example_traces(case.fn, case.loss, **options)(case.params, case.batch)
    P.per_example_gram(case.fn, case.loss, **options)(case.params, case.batch)
    P.empirical_ntk(case.fn, **options)(case.params, case.inputs)
    assert seen == [3] * 5


def rooted(p, x):
    return F.linear((x @ p["w"]).square().sum(1, keepdim=True).sqrt(), p["head"])


@route
def test_nan_is_not_passed_on(route):
    case = CASES["mlp"]
    grads = P.per_example_grads(case.fn, case.loss, route=route)
    inputs = case.inputs.clone()
    inputs[2, 0] = float("nan")
    with pytest.raises(errors.BatchError, match=r"(?s)outputs of the model.*1 of 8"):
        grads(case.params, (inputs, case.targets))
    case = CASES["mean_square"]
    with pytest.raises(errors.BatchError, match=r"(?s)gradients of the loss.*7 of 7"):
        P.per_example_norms(case.fn, case.loss, route=route)(case.params, (case.inputs, case.targets * float("nan")))
    params, x = {"w": randn(3, 2, seed=1), "head": randn(2, 1, seed=2)}, randn(4, 3, seed=3)
    x[1] = 0
    with pytest.raises(errors.BatchError, match=r"(?s)gradients of 'w'.*1 of 4"):
        P.jacobian(rooted, route=route)(params, x)


@route
def test_nothing_is_written_and_no_global_generator_is_touched(route):
    case, before = CASES["conv"], torch.get_rng_state()
    kept = {path: leaf.clone() for path, leaf in oracles.flat(case.params).items()}, case.inputs.clone()
    P.per_example_traces(case.fn, case.loss, kf.estimators.monte_carlo(), route=route, chunk_size=2)(
        case.params, case.batch, generator=torch.Generator().manual_seed(0)
    )
    assert all(torch.equal(leaf, kept[0][path]) for path, leaf in oracles.flat(case.params).items())
    assert torch.equal(case.inputs, kept[1])
    assert torch.equal(torch.get_rng_state(), before)
