"""Per-example quantities by every route, and products with curvature matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import kfac_func as kf
from tests.fuzz.looking import Look, Pointless, agree, exact, fair
from tests.fuzz.oracles import joined
from tests.fuzz.trees import flat, vector

ROUTES = ("auto", "tape", "vmap", "loop")


def _route(look: Look) -> dict[str, Any]:
    route = look.draw.pick(*ROUTES)
    if "random" in look.case.traits and route not in ("auto", "tape"):
        raise Pointless
    chunk = None if "random" in look.case.traits else look.draw.pick(None, None, 1, 2)
    return {"route": route, "chunk_size": chunk}


def _loose(look: Look) -> float:
    return max(look.tolerance, 0.1 if "half" in look.case.traits else 0.0)


def _looser(look: Look) -> float:
    """Of products of two gradients."""
    return 2.5 * _loose(look)


def _called(look: Look, made: Callable, *args: Any, **options: Any) -> Any:
    look.seeded()
    return made(look.case.problem.params, *args, **options)


def example_gradients(look: Look) -> None:
    options, problem = _route(look), look.case.problem
    got = _called(look, kf.products.per_example_grads(problem.fn, problem.loss, **options), problem.batch)
    n, want = look.case.examples, look.truth.example_gradients
    rows = torch.cat([leaf.reshape(n, -1) for leaf in flat(got).values()], 1)
    agree(f"per-example gradients {options['route']}", rows, want, _loose(look))


def example_norms(look: Look) -> None:
    options, problem = _route(look), look.case.problem
    got = _called(look, kf.products.per_example_norms(problem.fn, problem.loss, **options), problem.batch)
    agree(f"per-example norms {options['route']}", got, look.truth.example_gradients.norm(dim=1), _loose(look))


def example_gram(look: Look) -> None:
    options, problem = _route(look), look.case.problem
    got = _called(look, kf.products.per_example_gram(problem.fn, problem.loss, **options), problem.batch)
    v = look.truth.example_gradients
    agree(f"per-example gram {options['route']}", got, v @ v.T, _looser(look))


def fisher_diagonal(look: Look) -> None:
    options, problem = _route(look), look.case.problem
    if look.case.traits & {"random"}:
        raise Pointless
    made = kf.products.fisher_diagonal(problem.fn, problem.loss, exact(look), **options)
    got = _called(look, made, problem.batch, generator=look.generator())
    agree(f"Fisher diagonal {options['route']}", vector(got), look.truth.ggn.diagonal(), _looser(look))


def jacobian(look: Look) -> None:
    options, problem = _route(look), look.case.problem
    got = _called(look, kf.products.jacobian(problem.fn, **options), problem.inputs)
    z = look.truth.outputs
    rows = torch.cat([leaf.reshape(z.numel(), -1) for leaf in flat(got).values()], 1)
    agree(f"Jacobian {options['route']}", rows, look.truth.jacobian, _loose(look))


def tangent_kernel(look: Look) -> None:
    options, problem = _route(look), look.case.problem
    got = _called(look, kf.products.empirical_ntk(problem.fn, **options), problem.inputs)
    j = look.truth.jacobian.unflatten(0, (look.case.examples, -1))
    agree(f"tangent kernel {options['route']}", got, torch.einsum("ncp,mdp->nmcd", j, j), _looser(look))


def traces(look: Look) -> None:
    options, problem = _route(look), look.case.problem
    if look.case.traits & {"random"}:
        raise Pointless
    made = kf.products.per_example_traces(problem.fn, problem.loss, exact(look), **options)
    got = _called(look, made, problem.batch, generator=look.generator())
    agree(f"per-example traces {options['route']}", got.mean(), look.truth.ggn.trace(), _looser(look))


def gauss_newton_product(look: Look) -> None:
    fair(look)
    problem, v = look.case.problem, look.draw.normal(look.truth.ggn.shape[0]).to(look.truth.ggn)
    got = kf.products.ggn_vp(problem.fn, problem.loss)(problem.params, problem.batch)(look.truth.tree(v))
    agree("GGN product", vector(got), look.truth.ggn @ v, look.tolerance, look.truth.ggn.norm() * v.norm())


def hessian_product(look: Look) -> None:
    fair(look)
    problem, v = look.case.problem, look.draw.normal(vector(look.truth.params).numel()).to(vector(look.truth.params))
    want = look.truth.hessian_product(v, constants=look.case.hostile)
    got = kf.products.hvp(problem.fn, problem.loss)(problem.params, problem.batch)(look.truth.tree(v))
    agree(
        "Hessian product",
        vector(got),
        want,
        look.tolerance,
        want.norm() + v.norm() * joined(look.truth.by_autograd).norm(),
    )
