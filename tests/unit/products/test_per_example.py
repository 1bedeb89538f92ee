"""Per-example quantities against loops over single examples, on both routes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kfac_func as kf
from kfac_func.blocks import squares
from tests import oracles
from tests.zoo import CASES, close
from tests.zoo.run import curvature_of

each = pytest.mark.parametrize("name", CASES)
route = pytest.mark.parametrize("route", ["tape", "vmap"])
chunked = pytest.mark.parametrize("chunk_size", [None, 3, 100])
P = kf.products


def own(case):
    """The gradients of the examples' own losses, one example at a time, and all leaves side by side [N, P]."""
    found = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, case.value)
    return found, torch.cat([leaf.flatten(1) for leaf in found.values()], dim=1)


def traces(name):
    """tr F_n of every example, from the Jacobian and the Hessian of the whole batch."""
    found, n = curvature_of(name), len(CASES[name].targets)
    j = torch.cat([leaf.flatten(2) for leaf in found.jacobian.values()], dim=-1)
    hessian = found.hessian.reshape(n, j.shape[1], n, j.shape[1])
    return n * torch.stack([(hessian[k, :, k] * (j[k] @ j[k].T)).sum() for k in range(n)])


@each
@route
@chunked
def test_gradients_are_those_of_a_loop(name, route, chunk_size):
    case = CASES[name]
    found = P.per_example_grads(case.fn, case.loss, route=route, chunk_size=chunk_size)(case.params, case.batch)
    wanted, _ = own(case)
    assert set(oracles.flat(found)) == set(wanted)
    assert all(close(leaf, wanted[path]) for path, leaf in oracles.flat(found).items())


@each
@route
@chunked
def test_norms_are_those_of_the_gradients(name, route, chunk_size):
    case = CASES[name]
    make, (wanted, rows) = P.per_example_norms, own(case)
    options = {"route": route, "chunk_size": chunk_size}
    assert close(make(case.fn, case.loss, **options)(case.params, case.batch), rows.norm(dim=1))
    parts = make(case.fn, case.loss, by_block=True, **options)(case.params, case.batch)
    if route == "vmap":
        leaves = {path: (path,) for path in wanted}
    else:
        leaves = {k: tuple(p for p in (s.weight, s.bias) if p) for k, s in case.blocks.items()}
    assert set(parts) == set(leaves)
    for block, paths in leaves.items():
        assert close(parts[block], torch.cat([wanted[p].flatten(1) for p in paths], dim=1).norm(dim=1))


@each
@route
@chunked
def test_jacobians_are_those_of_a_loop(name, route, chunk_size):
    case = CASES[name]
    found = oracles.flat(P.jacobian(case.fn, route=route, chunk_size=chunk_size)(case.params, case.inputs))
    wanted = oracles.jacobians(case.fn, case.params, case.inputs, len(case.targets))
    shape = case.fn(case.params, case.inputs).shape
    assert set(found) == set(wanted)
    for path, leaf in found.items():
        assert leaf.shape[: len(shape)] == shape
        assert close(leaf.flatten(1, len(shape) - 1), wanted[path])


@each
@route
@pytest.mark.parametrize("size", [None, 2])
def test_the_diagonal_and_the_traces_are_those_of_the_dense_curvature(name, route, size):
    case, dense = CASES[name], curvature_of(name)
    options = {"estimator": kf.estimators.exact(chunk_size=size), "route": route, "chunk_size": size}
    found = oracles.flat(P.fisher_diagonal(case.fn, case.loss, **options)(case.params, case.batch))
    assert set(found) == set(dense.jacobian)
    for path, leaf in found.items():
        j = dense.jacobian[path].flatten(2).flatten(0, 1)
        assert close(leaf.flatten(), (j * (dense.hessian @ j)).sum(0))
    each = P.per_example_traces(case.fn, case.loss, **options)(case.params, case.batch)
    assert close(each, traces(name))
    assert close(each.mean(), torch.stack([leaf.sum() for leaf in found.values()]).sum())


REDUCTIONS = {
    "mean": (kf.losses.cross_entropy(), F.cross_entropy),
    "sum": (kf.losses.cross_entropy(reduction="sum"), lambda z, t: F.cross_entropy(z, t, reduction="sum")),
    "batchmean": (
        kf.losses.mse(reduction="batchmean"),
        lambda z, t: F.mse_loss(z, F.one_hot(t, z.shape[-1]).to(z), reduction="sum") / len(z),
    ),
    "weighted": (
        kf.losses.cross_entropy(weight=torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)),
        lambda z, t: F.cross_entropy(z, t, weight=torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)),
    ),
}


@route
@chunked
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_add_up_to_the_gradient_of_the_loss(reduction, route, chunk_size):
    case, (loss, value) = CASES["mlp"], REDUCTIONS[reduction]
    targets = case.targets if reduction != "batchmean" else F.one_hot(case.targets, 3).double()
    batch, options = (case.inputs, targets), {"route": route, "chunk_size": chunk_size}
    found = oracles.flat(P.per_example_grads(case.fn, loss, **options)(case.params, batch))
    leaves = oracles.flat(case.params)
    wanted = torch.func.grad(lambda p: value(case.fn(oracles.nested(case.params, p), case.inputs), case.targets))(
        leaves
    )
    total = {path: leaf.sum(0) if reduction == "sum" else leaf.mean(0) for path, leaf in found.items()}
    assert all(close(total[path], wanted[path]) for path in leaves)


@route
@pytest.mark.parametrize("reduction", ["mean", "sum", "weighted"])
def test_the_diagonal_is_that_of_the_loss_as_it_is(reduction, route):
    case, (loss, value) = CASES["mlp"], REDUCTIONS[reduction]
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, value)
    found = oracles.flat(P.fisher_diagonal(case.fn, loss, route=route, chunk_size=5)(case.params, case.batch))
    wanted = dense.whole(list(found)).diagonal()
    assert close(torch.cat([leaf.flatten() for leaf in found.values()]), wanted)
    each = P.per_example_traces(case.fn, loss, route=route, chunk_size=5)(case.params, case.batch)
    assert close(each.mean(), wanted.sum())


@route
@pytest.mark.parametrize("make", [kf.estimators.monte_carlo, kf.estimators.curvature_prop, kf.estimators.empirical])
def test_estimators_draw_what_the_step_draws(make, route):
    case, estimator = CASES["tokens"], make()
    step = kf.value_grad_and_stats(case.fn, case.loss, estimator=estimator)
    stats = step(case.params, case.batch, generator=torch.Generator().manual_seed(4))[2]
    assert stats is not None
    wanted = {name: squares(block) for name, block in stats.blocks().items()}
    for size in (None, 4):
        options = {"route": route, "chunk_size": size}
        draw = {"generator": torch.Generator().manual_seed(4)}
        found = P.fisher_diagonal(case.fn, case.loss, estimator, **options)(case.params, case.batch, **draw)
        assert close(found["head.weight"], wanted["head.weight"][:, :-1])
        assert close(found["embedding.weight"], wanted["embedding.weight"].mT)
        draw = {"generator": torch.Generator().manual_seed(4)}
        traces = P.per_example_traces(case.fn, case.loss, estimator, **options)(case.params, case.batch, **draw)
        assert close(traces.mean(), torch.stack([x.sum() for x in wanted.values()]).sum())


@route
def test_noise_is_taken_as_it_is(route):
    case, estimator = CASES["mlp"], kf.estimators.monte_carlo(2)
    noise = torch.rand(2, 8, generator=torch.Generator().manual_seed(2))
    make = P.per_example_traces(case.fn, case.loss, estimator, route=route)
    found = make(case.params, case.batch, noise=noise)
    assert close(
        found[:3],
        P.per_example_traces(case.fn, case.loss, estimator, route=route)(
            case.params, (case.inputs[:3], case.targets[:3]), noise=noise[:, :3]
        ),
    )
    assert not close(found, make(case.params, case.batch, noise=1 - noise))
