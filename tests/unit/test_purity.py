"""Nothing is mutated, nothing is shared, nothing depends on anything but the arguments."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree

G = torch.Generator().manual_seed(0)
TOKENS, IMAGES, Y = torch.randint(5, (4, 3), generator=G), torch.randn(4, 2, 6, generator=G), torch.tensor([0, 2, 1, 2])


class Words(nn.Module):
    """Embeddings with positions, a norm, a tied head with a bias, a parameter that no kind sees, one that is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(5, 4), nn.Embedding(3, 4), nn.LayerNorm(4)
        self.scale, self.idle = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        return F.linear(self.norm(h).mean(1) * self.scale, self.words.weight, self.bias)[:, :3]


class Problem(NamedTuple):
    module: nn.Module
    x: Tensor


def words() -> Problem:
    return Problem(Words(), TOKENS)


def images() -> Problem:
    conv = nn.Conv1d(2, 3, 3, groups=1, bias=False)
    return Problem(nn.Sequential(conv, nn.BatchNorm1d(3).eval(), nn.ReLU(True), nn.Flatten(), nn.Linear(12, 3)), IMAGES)


def dropped() -> Problem:
    return Problem(nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False), nn.Linear(6, 3)), IMAGES)


PROBLEMS = {"words": words, "images": images, "flat": dropped}
ESTIMATORS = {
    "exact": kf.estimators.exact(),
    "chunks": kf.estimators.exact(chunk_size=2),
    "monte_carlo": kf.estimators.monte_carlo(2),
    "curvature_prop": kf.estimators.curvature_prop(),
    "empirical": kf.estimators.empirical(),
    "forward_only": kf.estimators.forward_only(),
}
CURVATURES: dict[str, Callable[[], Any]] = {
    "kronecker": kf.curvature.kronecker,
    "eigh": lambda: kf.curvature.kronecker("eigh"),
    "diagonal": kf.curvature.diagonal,
    "identity": kf.curvature.identity,
    "nothing": lambda: kf.curvature.blockwise(kf.curvature.identity(), kf.curvature.identity()),
}


@contextlib.contextmanager
def untouched(*trees: Any) -> Iterator[None]:
    """Every tensor keeps its bits and its version, and so does the global generator."""
    tensors = [leaf for leaf in _tree.leaves(trees) if isinstance(leaf, Tensor)]
    copies, versions = copy.deepcopy(tensors), [t._version for t in tensors]
    random = torch.get_rng_state()
    yield
    assert [t._version for t in tensors] == versions
    for tensor, before in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), random)


def storages(*trees: Any) -> set[int]:
    return {
        leaf.untyped_storage().data_ptr() for leaf in _tree.leaves(trees) if isinstance(leaf, Tensor) and leaf.numel()
    }


def apart(new: Any, *old: Any) -> None:
    """The tensors of `new` live in storage of their own, each in another."""
    found = [leaf.untyped_storage().data_ptr() for leaf in _tree.leaves(new) if leaf.numel()]
    assert len(set(found)) == len(found)
    assert not set(found) & storages(*old)


@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_no_call_changes_what_it_is_given_or_shares_what_it_returns(problem, curvature):
    module, x = problem()
    fn, params = kf.make_functional(module)
    step: Any = kf.value_grad_and_stats(fn, kf.losses.cross_entropy(), unclaimed="diagonal")
    tx = kf.chain(kf.kfac(curvature(), damping=0.1), kf.sgd(0.1, momentum=0.9))
    batch, old = (x, Y), list(module.state_dict().values())
    with untouched(params, batch, old):
        plan = kf.make_plan(fn, params, x, unclaimed="diagonal")
        value, grads, stats = step(params, batch, generator=torch.Generator().manual_seed(0), plan=plan)
    apart(grads, params, batch, old)
    apart(value, params, batch)
    with untouched(params):
        state = tx.init(params)
    apart(state, params)
    for k in range(3):
        given = (params, grads, stats, state)
        with untouched(given):
            updates, after = tx.update(grads, state, params, stats=stats if k != 1 else None)
            moved = kf.apply_updates(params, updates)
            observed = kf.observe(after, stats)
            solved = kf.precondition(observed, grads)
            kf.describe(observed)
        apart(updates, given, after)
        apart(moved, given, updates, after)
        apart(solved, given, observed)
        params, state = moved, after


def test_the_module_itself_stays_as_it_was():
    module, x = images()
    first = next(module.parameters())
    first.grad = torch.ones_like(first)
    held, modes = copy.deepcopy(module), [m.training for m in module.modules()]
    fn, params = kf.make_functional(module)
    step: Any = kf.value_grad_and_stats(fn, kf.losses.cross_entropy())
    with untouched(list(module.state_dict().values()), first.grad):
        step(params, (x, Y), generator=torch.Generator().manual_seed(0))
    assert [m.training for m in module.modules()] == modes
    assert [p.grad is None for p in module.parameters()] == [False] + [True] * 4
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())
    torch.testing.assert_close(module.state_dict(), held.state_dict(), rtol=0, atol=0)


def everything(module: nn.Module, x: Tensor, estimator: Any, params: dict | None = None) -> Any:
    fn, own = kf.make_functional(module)
    params = own if params is None else params
    step: Any = kf.value_grad_and_stats(fn, kf.losses.cross_entropy(), estimator=estimator, unclaimed="diagonal")
    value, grads, stats = step(params, (x, Y), generator=torch.Generator().manual_seed(3))
    tx = kf.chain(kf.kfac(damping=0.1), kf.sgd(0.1, momentum=0.9))
    updates, state = tx.update(grads, tx.init(params), params, stats=stats)
    return [
        leaf.clone() for leaf in _tree.leaves((value, grads, stats.inputs, stats.grads, stats.rest, updates, state))
    ]


def exactly(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_result_depends_on_the_arguments_alone(problem, estimator):
    module, x = problem()
    wanted = everything(module, x, estimator)
    with torch.no_grad():
        exactly(everything(module, x, estimator), wanted)
    with torch.inference_mode():
        exactly(everything(module, x, estimator), wanted)
    torch.manual_seed(99)
    exactly(everything(module, x, estimator), wanted)


def test_the_result_does_not_depend_on_the_history_of_the_step():
    module, x = words()
    fn, params = kf.make_functional(module)
    options = {"estimator": kf.estimators.monte_carlo(), "unclaimed": "diagonal"}
    used, fresh = (kf.value_grad_and_stats(fn, kf.losses.cross_entropy(), **options) for _ in range(2))
    for size, stats in ((2, True), (4, False), (1, True), (3, True)):
        used(params, (x[:size], Y[:size]), generator=torch.Generator().manual_seed(size), stats=stats)
    one, other = (step(params, (x, Y), generator=torch.Generator().manual_seed(0))[:2] for step in (used, fresh))
    exactly(one, other)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_parameters_that_require_gradients_give_the_same_without_history(problem):
    module, x = problem()
    wanted = everything(module, x, kf.estimators.exact())
    _, params = kf.make_functional(module)
    for leaf in params.values():
        leaf.requires_grad_()
    found = everything(module, x, kf.estimators.exact(), params)
    exactly([leaf.detach() for leaf in found], wanted)


def test_a_generator_is_the_only_source_of_randomness():
    module, x = images()
    fn, params = kf.make_functional(module)
    step: Any = kf.value_grad_and_stats(fn, kf.losses.cross_entropy())
    draws = torch.Generator().manual_seed(0)
    one, other = (step(params, (x, Y), generator=draws)[2].grads for _ in range(2))
    again = step(params, (x, Y), generator=torch.Generator().manual_seed(0))[2].grads
    exactly(one, again)
    assert not torch.equal(one[0], other[0])
    u = torch.rand(1, 4, generator=torch.Generator().manual_seed(0))
    exactly(step(params, (x, Y), noise=u)[2].grads, one)
