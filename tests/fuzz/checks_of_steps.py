"""The step: value, gradient, updates; nothing given is written, and the same seed gives the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from tests.fuzz.looking import ESTIMATORS, RECIPES, Look, Pointless, Wrong, agree, finite, step_of, taken
from tests.fuzz.oracles import Truth, joined
from tests.fuzz.trees import flat, mapped, vector


def same_gradient(look: Look, what: str, value: Tensor, grads: Any) -> None:
    """Value and gradient leaf by leaf; half precision may err as torch itself does there."""
    wanted_value, wanted = look.truth.value_and_gradient
    got = flat(grads)
    if list(got) != list(wanted):
        raise Wrong(f"{what}: the gradient has leaves {list(got)}, wanted {list(wanted)}")
    agree(f"{what}: value", value, wanted_value, look.tolerance, wanted_value.abs() + 1)
    rounded = "half" in look.case.traits and "random" not in look.case.traits
    best = Truth(look.case.wide(), look.case.seed).value_and_gradient[1] if rounded else wanted
    whole = joined(best).norm()
    for path, leaf in got.items():
        if leaf.dtype != wanted[path].dtype:
            raise Wrong(f"{what} of {path!r}: {leaf.dtype}, wanted {wanted[path].dtype}")
        own = (wanted[path].double() - best[path]).norm() if rounded else torch.tensor(0.0)
        scale = best[path].norm() + 60 * own + whole if rounded else whole
        agree(f"{what} of {path!r}", leaf, best[path], look.tolerance, scale)


def gradient(look: Look) -> None:
    estimator = ESTIMATORS[look.draw.pick(*ESTIMATORS)]()
    value, grads, _ = taken(look, estimator, rows=look.draw.chance(0.3))
    same_gradient(look, "gradient", value, grads)


def gradient_alone(look: Look) -> None:
    run = step_of(look, kf.estimators.monte_carlo())
    look.seeded()
    value, grads, _ = run(look.case.problem.params, look.case.problem.batch, stats=False)
    same_gradient(look, "gradient without statistics", value, grads)


def gradient_of_step(look: Look) -> None:
    """The step's value differentiated once more from outside."""
    if "random" in look.case.traits or not _nests(look):
        raise Pointless
    run, problem = step_of(look, kf.estimators.empirical()), look.case.problem
    grads, value = torch.func.grad_and_value(lambda p: run(p, problem.batch, generator=look.generator())[0])(
        look.truth.params
    )
    same_gradient(look, "gradient through the step", value, grads)


def _nests(look: Look) -> bool:
    """Whether torch differentiates the model right inside of another transform: torch.jit, once warm, does not."""
    problem, (_, wanted) = look.case.problem, look.truth.value_and_gradient

    def value(params: Any) -> Tensor:
        z, *_ = torch.func.vjp(lambda zero: problem.plain(params, problem.inputs) + zero, torch.zeros(()))
        return problem.value(z, problem.targets)

    for _ in range(3):
        try:
            found = flat(torch.func.grad(value)(look.truth.params))
        except RuntimeError:
            return False
        off = joined({k: x - wanted[k] for k, x in found.items()})
        if not bool(off.norm() <= 1e-2 * joined(wanted).norm() + 1e-6):
            return False
    return True


def updates(look: Look) -> None:
    """Finite, repeatable, zero at zero, symmetric and positive; nothing given is written."""
    name, source = look.draw.pick(*RECIPES), look.draw.pick(*ESTIMATORS)
    before = [x.detach().clone() for x in _tensors(look)]
    state = torch.get_rng_state()
    estimator, tx = ESTIMATORS[source](), RECIPES[name]()
    value, grads, stats = taken(look, estimator)
    moved, known = tx.update(grads, tx.init(look.case.problem.params), look.case.problem.params, stats=stats)
    finite(f"update of {name} with {source}", moved)
    look.seeded()
    if "random" not in look.case.traits and not torch.equal(torch.get_rng_state(), _state(look, state)):
        raise Wrong("the global generator was moved")
    for x, y in zip(_tensors(look), before, strict=True):
        if not torch.equal(x, y):
            raise Wrong("a tensor of the caller was written")
    again = taken(look, estimator)
    if not torch.equal(vector(again[1]), vector(grads)):
        raise Wrong("the same seed gives another gradient")
    twice, _ = tx.update(again[1], tx.init(look.case.problem.params), look.case.problem.params, stats=again[2])
    agree(f"update of {name} with {source}, repeated", vector(twice), vector(moved), 1e-9)
    if "half" not in look.case.traits and name != "two_level":
        _positive(look, name, known)
    del value


def _positive(look: Look, name: str, state: Any) -> None:
    params = look.case.problem.params
    u, v = (mapped(params, lambda w: cast_noise(look, w)) for _ in range(2))
    pu, pv = kf.precondition(state, u), kf.precondition(state, v)
    zero = kf.precondition(state, mapped(params, lambda w: torch.zeros_like(w.detach())))
    if bool(vector(zero).abs().max() > 0):
        raise Wrong(f"{name}: P(0) is not 0")
    a, b = (vector(pu) * vector(v)).sum(), (vector(u) * vector(pv)).sum()
    size = vector(pu).norm() * vector(v).norm() + vector(u).norm() * vector(pv).norm()
    agree(f"{name}: ⟨P u, v⟩ against ⟨u, P v⟩", a, b, look.tolerance * 10, size)
    if not bool((vector(pu) * vector(u)).sum() > 0):
        raise Wrong(f"{name}: P is not positive")


def cast_noise(look: Look, w: Tensor) -> Tensor:
    return look.draw.normal(*w.shape).to(w.dtype)


def _tensors(look: Look) -> list[Tensor]:
    problem = look.case.problem
    found = [*flat(problem.params).values(), problem.targets]
    return [*found, *(x for x in _tree.leaves(problem.inputs) if isinstance(x, Tensor))]


def _state(look: Look, before: Tensor) -> Tensor:
    torch.manual_seed(look.case.seed)
    return torch.get_rng_state()
