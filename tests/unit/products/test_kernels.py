"""Gram matrices of examples and the empirical NTK against gradients and Jacobians of a loop, on both routes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from tests import oracles
from tests.zoo import CASES, Case, close, position_case, subset, unclaimed_case

each = pytest.mark.parametrize("name", CASES)
route = pytest.mark.parametrize("route", ["tape", "vmap"])
chunked = pytest.mark.parametrize("chunk_size", [None, 2, 100])
P = kf.products


def gradients(case: Case) -> Tensor:
    """The gradients of the examples' own losses [N, P]."""
    found = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, case.value)
    return torch.cat([leaf.flatten(1) for leaf in found.values()], dim=1)


def jacobians(case: Case) -> Tensor:
    """[N, D, P]."""
    found = oracles.jacobians(case.fn, case.params, case.inputs, len(case.targets))
    return torch.cat([leaf.flatten(2) for leaf in found.values()], dim=2)


@each
@route
@chunked
def test_the_gram_matrix_is_that_of_the_gradients(name, route, chunk_size):
    case, other = CASES[name], subset(CASES[name], 1, 4)
    gram = P.per_example_gram(case.fn, case.loss, route=route, chunk_size=chunk_size)
    mine, others = gradients(case), gradients(other)
    assert close(gram(case.params, case.batch), mine @ mine.T)
    assert close(gram(case.params, case.batch, other.batch), mine @ others.T)
    assert close(gram(case.params, other.batch, case.batch), others @ mine.T)


@each
@route
@chunked
def test_the_kernel_is_that_of_the_jacobians(name, route, chunk_size):
    case, other = CASES[name], subset(CASES[name], 1, 4)
    options = {"route": route, "chunk_size": chunk_size}
    full, trace = (P.empirical_ntk(case.fn, outputs, **options) for outputs in ("full", "trace"))
    mine, others = jacobians(case), jacobians(other)
    assert close(full(case.params, case.inputs), torch.einsum("ncp,mdp->nmcd", mine, mine))
    assert close(full(case.params, case.inputs, other.inputs), torch.einsum("ncp,mdp->nmcd", mine, others))
    assert close(trace(case.params, case.inputs), torch.einsum("ncp,mcp->nm", mine, mine))
    assert close(trace(case.params, other.inputs, case.inputs), torch.einsum("ncp,mcp->nm", others, mine))


@each
@route
def test_the_kernel_is_symmetric_and_its_trace_is_that_of_its_outputs(name, route):
    case = CASES[name]
    full = P.empirical_ntk(case.fn, route=route, chunk_size=3)(case.params, case.inputs)
    assert close(full, full.permute(1, 0, 3, 2))
    trace = P.empirical_ntk(case.fn, "trace", route=route)(case.params, case.inputs)
    assert close(trace, full.diagonal(dim1=2, dim2=3).sum(-1))


@pytest.mark.parametrize("case", [unclaimed_case(), position_case()], ids=["unclaimed", "shared"])
def test_the_other_route_takes_what_the_tape_refuses(case):
    mine, rows = jacobians(case), gradients(case)
    found = P.empirical_ntk(case.fn, "trace", route="vmap", chunk_size=2)(case.params, case.inputs)
    assert close(found, torch.einsum("ncp,mcp->nm", mine, mine))
    gram = P.per_example_gram(case.fn, case.loss, route="vmap")(case.params, case.batch)
    assert close(gram, rows @ rows.T)


@route
def test_the_weights_of_classes_are_those_of_the_whole_batch(route):
    case, weight = CASES["mlp"], torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)
    loss, targets = kf.losses.cross_entropy(weight=weight), case.targets
    own = torch.stack([weight[t] * 8 / weight[targets].sum() for t in targets])
    plain = gradients(case) * own.unsqueeze(1)
    for chunk_size in (None, 3):
        gram = P.per_example_gram(case.fn, loss, route=route, chunk_size=chunk_size)
        assert close(gram(case.params, case.batch), plain @ plain.T)


@route
def test_the_gram_matrix_has_the_spectrum_of_the_empirical_fisher(route):
    case = CASES["recurrent"]
    rows = gradients(case)
    gram = P.per_example_gram(case.fn, case.loss, route=route)(case.params, case.batch)
    fisher = torch.linalg.eigvalsh(rows.T @ rows)[-len(rows) :]
    assert close(torch.linalg.eigvalsh(gram), fisher)
    norms = P.per_example_norms(case.fn, case.loss, route=route)(case.params, case.batch)
    assert close(gram.diagonal().sqrt(), norms)


@route
def test_kernels_go_through_vmap_and_grad(route):
    case = CASES["deep_linear"]
    trace = P.empirical_ntk(case.fn, "trace", route=route)
    flat = oracles.flat(case.params)
    many = oracles.nested(case.params, {k: torch.stack([v, 0.5 * v]) for k, v in flat.items()})
    half = oracles.nested(case.params, {k: 0.5 * v for k, v in flat.items()})
    found = torch.func.vmap(lambda p: trace(p, case.inputs))(many)
    assert close(found, torch.stack([trace(case.params, case.inputs), trace(half, case.inputs)]))

    def brute(p):
        def one(x):
            return torch.func.jacrev(lambda q: case.fn(q, x[None])[0])(p)

        j = torch.cat([leaf.flatten(2) for leaf in oracles.flat(torch.func.vmap(one)(case.inputs)).values()], dim=2)
        return torch.einsum("ncp,mcp->nm", j, j)[0, 1:].sum()

    got = oracles.flat(torch.func.grad(lambda p: trace(p, case.inputs)[0, 1:].sum())(case.params))
    wanted = oracles.flat(torch.func.grad(brute)(case.params))
    assert all(close(got[path], wanted[path]) for path in wanted)
