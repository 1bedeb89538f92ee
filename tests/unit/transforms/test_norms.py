"""The length of a preconditioned direction in the damped Fisher metric, against dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._errors import HyperparameterError
from kfac_func._tree import leaves, nodes, tree_map, unique_paths
from kfac_func.blocks import pack
from kfac_func.precondition.rules import curvature_of
from kfac_func.transforms import ClipByKLState, FisherNormState
from kfac_func.transforms.schedules import multistep
from tests.unit.transforms.problem import PARAMS, close, passed

KAPPA, RATE, DAMPING = 1e-3, 0.5, 0.1
SLICES = [slice(0, 6), slice(2, 8), slice(0, 8)]
V = {"w": torch.tensor([3.0, -4.0], dtype=torch.float64), "no": None, "b": torch.tensor(2.0, dtype=torch.float64)}


def squared_length(state: Any, delta: Any) -> float:
    """δᵀ(F̂ + λ)δ with the dense blocks of the state and the λ of this file."""
    (found,) = nodes(state, kf.KFacState)
    blocks, arrays = curvature_of(found).dense(found.curvature), unique_paths(delta)
    total = 0.0
    for layout in found.rules.value.layouts:
        d = pack(layout, arrays).reshape(-1)
        total += float(d @ (blocks[layout.name] @ d) + DAMPING * d @ d)
    return total


def kfac(structure: Any = None) -> Any:
    return kf.kfac(structure, damping=DAMPING, split="exact", refresh_every=1)


def inner(last: Any) -> Any:
    return kf.chain(kf.trace(0.9), kf.chain(kfac(), last))


CHAINS: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "plain": (False, lambda last: kf.chain(kfac(), last)),
    "diagonal": (False, lambda last: kf.chain(kfac(kf.curvature.diagonal()), last)),
    "momentum before": (True, lambda last: kf.chain(kf.trace(0.9), kfac(), last)),
    "inside of the last": (True, inner),
    "behind a chain": (True, lambda last: kf.chain(kf.chain(kf.trace(0.9), kfac()), last)),
    "named": (True, lambda last: kf.named_chain(("m", kf.trace(0.9)), ("P", kfac()), ("last", last))),
    "masked together": (False, lambda last: kf.chain(kf.masked(kf.chain(kfac(), last), "*"))),
    "several steps": (False, lambda last: kf.multi_steps(kf.chain(kfac(), last), 1)),
}


def stepped(tx: Any) -> list[tuple[Any, Any, Any, Any]]:
    """(updates, state, the gradient, its trace) on several batches."""
    state, heavy, found = tx.init(PARAMS), tree_map(torch.zeros_like, PARAMS), []
    for rows in SLICES:
        grads, stats = passed(rows=rows)
        heavy = tree_map(lambda g, m: g + 0.9 * m, grads, heavy)
        updates, state = tx.update(grads, state, PARAMS, stats=stats)
        found.append((updates, state, grads, heavy))
    return found


def factor(state: Any, kind: type = ClipByKLState) -> Tensor:
    return nodes(state, kind)[0].scale


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_active_clip_gives_the_step_the_length_it_may_have(name, as_tensor):
    heavy, make = CHAINS[name]
    kappa, rate = (torch.tensor(x, dtype=torch.float64) if as_tensor else x for x in (KAPPA, RATE))
    for updates, state, grads, momentum in stepped(make(kf.clip_by_kl(kappa, rate))):
        v = kf.precondition(state, momentum if heavy else grads)
        nu = float(factor(state))
        assert 0 < nu < 0.9
        close(updates, tree_map(lambda x, nu=nu: nu * x, v))
        assert abs(squared_length(state, tree_map(lambda u: -RATE * u, updates)) / KAPPA - 1) < 1e-9


@pytest.mark.parametrize("name", CHAINS)
def test_the_norm_in_the_fisher_metric_becomes_one(name):
    heavy, make = CHAINS[name]
    for updates, state, grads, momentum in stepped(make(kf.normalize_by_fisher_norm())):
        v = kf.precondition(state, momentum if heavy else grads)
        scale = float(factor(state, FisherNormState))
        close(updates, tree_map(lambda x, c=scale: c * x, v))
        assert abs(squared_length(state, updates) - 1) < 1e-9


def test_the_rate_of_the_clip_follows_its_schedule():
    tx = kf.chain(kfac(), kf.clip_by_kl(KAPPA, multistep(RATE, {1: 0.5, 2: 0.5})))
    for t, (updates, state, _, _) in enumerate(stepped(tx)):
        delta = tree_map(lambda u, t=t: -RATE * 0.5**t * u, updates)
        assert abs(squared_length(state, delta) / KAPPA - 1) < 1e-9
        assert int(state[1].step) == t + 1


def test_every_block_counts_with_its_own_damping():
    grads, stats = passed()
    tx = kf.chain(kf.kfac(damping={"0.*": 0.3, "*": 0.1}, split="exact"), kf.clip_by_kl(KAPPA, RATE))
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats)
    v = kf.precondition(state, grads)
    product = sum(float((v[name] * grads[name]).sum()) for name in grads)
    assert abs(float(factor(state)) - (KAPPA / (RATE**2 * product)) ** 0.5) < 1e-12
    close(updates, tree_map(lambda x: (KAPPA / (RATE**2 * product)) ** 0.5 * x, v))


@pytest.mark.parametrize("max_kl", [0.01, 1e9, float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_short_steps_keep_every_bit(max_kl, dtype):
    odd = {"w": (torch.arange(1.0, 40.0) / 997).to(dtype), "no": None}
    tx = kf.clip_by_kl(max_kl, 0.5)
    updates, state = tx.update(odd, tx.init(odd), gradient=odd)
    assert torch.equal(updates["w"], odd["w"])
    assert updates["no"] is None
    assert float(state.scale) == 1.0
    assert updates["w"].data_ptr() != odd["w"].data_ptr()


@pytest.mark.parametrize("rate", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [0.0, 1e-150, 1e-8, 1.0, 1e8])
def test_a_clip_never_lengthens(rate, size):
    v = tree_map(lambda x: size * x, V)
    tx = kf.clip_by_kl(0.01, rate)
    updates, state = tx.update(v, tx.init(v), gradient=v)
    assert 0 < float(state.scale) <= 1
    assert all(bool((u.abs() <= x.abs()).all()) for u, x in zip(leaves(updates), leaves(v), strict=True))
    squared = rate**2 * size**2 * 29
    assert abs(float(state.scale) - min(1.0, (0.01 / squared) ** 0.5 if squared else 1.0)) < 1e-12


@pytest.mark.parametrize("tx", [kf.clip_by_kl(KAPPA, RATE), kf.normalize_by_fisher_norm()])
def test_a_zero_gradient_gives_zero(tx):
    zero, (_, stats) = tree_map(torch.zeros_like, PARAMS), passed()
    both = kf.chain(kfac(), tx)
    updates, state = both.update(zero, both.init(PARAMS), PARAMS, stats=stats)
    close(updates, zero, 0.0)
    assert float(state[1].scale) == 1.0


@pytest.mark.parametrize("tx", [kf.clip_by_kl(1e-6, RATE), kf.normalize_by_fisher_norm()])
def test_a_direction_that_climbs_passes_unchanged(tx):
    updates, state = tx.update(V, tx.init(V), gradient=tree_map(lambda x: -x, V))
    close(updates, V, 0.0)
    assert float(state.scale) == 1.0


def test_a_unit_norm_lengthens_and_shortens():
    tx = kf.normalize_by_fisher_norm()
    for size in (1e-8, 1.0, 1e8):
        v = tree_map(lambda x, c=size: c * x, V)
        updates, state = tx.update(v, tx.init(v), gradient=v)
        close(updates, tree_map(lambda x: x / 29**0.5, V))
        assert abs(float(state.scale) * size * 29**0.5 - 1) < 1e-12


@pytest.mark.parametrize("tx", [kf.clip_by_kl(1.0, RATE), kf.normalize_by_fisher_norm()])
def test_nan_is_not_hidden(tx):
    bad = {**V, "w": torch.tensor([float("nan"), 1.0], dtype=torch.float64)}
    for updates, gradient in ((bad, V), (V, bad)):
        assert all(leaf.isnan().all() for leaf in leaves(tx.update(updates, tx.init(V), gradient=gradient)[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_leaves_are_measured_wide(dtype):
    v = {"w": torch.full((4,), 300.0, dtype=dtype)}
    state = kf.clip_by_kl(1.0, 1.0).update(v, kf.clip_by_kl(1.0, 1.0).init(v), gradient=v)[1]
    assert float(state.scale) == pytest.approx(1 / 600, rel=1e-6)


def test_the_gradient_that_is_passed_comes_before_that_of_the_chain():
    (grads, stats), tx = passed(), kf.chain(kfac(), kf.clip_by_kl(KAPPA, RATE))
    plain, other = (
        tx.update(grads, tx.init(PARAMS), PARAMS, stats=stats, **extra)[1]
        for extra in ({}, {"gradient": tree_map(lambda g: 4 * g, grads)})
    )
    assert abs(float(factor(other)) * 2 - float(factor(plain))) < 1e-12


def test_derivatives_by_the_bound_and_the_rate():
    def length(kappa: Tensor, rate: Tensor, size: float) -> Tensor:
        v = tree_map(lambda x: size * x, V)
        return kf.clip_by_kl(kappa, rate).update(v, kf.clip_by_kl(1.0, 1.0).init(V), gradient=v)[0]["b"]

    kappa, rate = (torch.tensor(x, dtype=torch.float64) for x in (KAPPA, RATE))
    by = torch.func.grad(length, argnums=(0, 1))(kappa, rate, 1.0)
    assert abs(float(by[0]) - 2.0 / (2 * (29 * KAPPA) ** 0.5 * RATE)) < 1e-9
    assert abs(float(by[1]) + 2.0 * (KAPPA / 29) ** 0.5 / RATE**2) < 1e-9
    for size in (0.0, 1e-6):
        assert [float(d) for d in torch.func.grad(length, argnums=(0, 1))(kappa, rate, size)] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "make"),
    [("clip_by_kl", lambda: kf.clip_by_kl(1.0, 1.0)), ("normalize_by_fisher_norm", kf.normalize_by_fisher_norm)],
)
def test_without_the_gradient_they_say_what_they_need(name, make):
    for tx in (make(), kf.chain(kf.trace(0.9), make()), kf.chain(make(), kfac()), kf.chain(kf.chain(make()), kfac())):
        with pytest.raises(HyperparameterError, match=rf"^{name} needs the gradient[^$]*behind the preconditioner"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)


LINKS = kf.chain(kf.chain(kf.trace(0.9), kfac()), kf.clip_by_kl(KAPPA, multistep(RATE, {1: 0.5})), kf.scale(-1.0))


def test_an_ensemble_is_clipped_member_by_member():
    grads, stats = passed()
    many = tree_map(lambda g: torch.stack([g, 2.5 * g, 0 * g]), grads)

    def step(grads: Any) -> Any:
        return LINKS.update(grads, LINKS.init(PARAMS), PARAMS, stats=stats, refresh=True)[0]

    found = torch.func.vmap(step)(many)
    for member in range(3):
        close(tree_map(lambda u, i=member: u[i], found), step(tree_map(lambda g, i=member: g[i], many)))


@pytest.mark.compile
def test_a_clipped_step_compiles_in_one_graph():
    (grads, stats), state = passed(), LINKS.init(PARAMS)
    torch._dynamo.reset()

    def step(state: Any) -> Any:
        return LINKS.update(grads, state, PARAMS, stats=stats, refresh=True)

    first = step(state)[1]
    found, wanted = torch.compile(step, fullgraph=True, backend="aot_eager")(first), step(first)
    for got, value in zip(leaves(found), leaves(wanted), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)
