"""Running the library on a case, and comparing."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import Block, Use, per_example
from kfac_func.curvature import Batch
from tests import oracles
from tests.zoo.cases import CASES, Case

EXACT = kf.estimators.exact()
_step = cache(kf.value_grad_and_stats)  # a step keeps its plans


def run(
    case: Case,
    estimator: kf.estimators.Estimator = EXACT,
    *,
    seed: int = 0,
    noise: Tensor | None = None,
    **options: Any,
) -> tuple:
    """(value, gradients, statistics) of the batch of a case."""
    make = kf.value_grad_and_stats if isinstance(options.get("unclaimed"), dict) else _step
    step = make(case.fn, case.loss, estimator=estimator, **options)
    return step(case.params, case.batch, generator=torch.Generator().manual_seed(seed), noise=noise)


def measured(case: Case, estimator: kf.estimators.Estimator = EXACT, **options: Any) -> dict[str, Block]:
    """The blocks of the batch of a case."""
    return run(case, estimator, **options)[2].blocks()


def vectors(use: Use) -> Tensor:
    """The gradients of the output vectors of a use that has some."""
    assert use.grads is not None
    return use.grads


@cache
def curvature_of(name: str) -> oracles.Curvature:
    """The dense GGN of a case of the table."""
    case = CASES[name]
    return oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)


def outer(block: Block) -> Tensor:
    """(1/N) sum of vec(V) vec(V)^T over the library's gradients of all vectors and examples."""
    v = per_example(block).flatten(2)
    return torch.einsum("vbp,vbq->pq", v, v) / block.examples


def direction(case: Case, *, options: dict[str, Any] | None = None, **kfac: Any) -> dict[str, Tensor]:
    """One preconditioned gradient by path: `options` go to the step, the others to `kf.kfac`."""
    _, grads, stats = run(case, **(options or {}))
    tx = kf.kfac(**kfac)
    return oracles.flat(tx.update(grads, tx.init(case.params), stats=stats)[0])


def batch_of(structure: Any, block: Block) -> Batch:
    """A block as its structure may see it."""
    prepared = structure.prepare(block)
    return Batch(structure.measure(prepared), lambda question: question(prepared))


def absorbed(structure: Any, block: Block, state: Any = (), fraction: float = 1.0, **moved: Any) -> Any:
    """The state of a structure after one more batch with a refresh, in the order of the library."""
    damping, split = torch.tensor(moved.get("damping", 0.03), dtype=torch.float64), moved.get("split", "pi")
    batch, share = batch_of(structure, block), torch.tensor(fraction, dtype=torch.float64)
    state = structure.absorb(state, batch, share)
    if moved.get("refresh", True):
        state = structure.refresh(state, damping, split)
    return state if structure.scale is None else structure.scale(state, batch, share)


def kronecker_block(block: Block) -> Tensor:
    """T G x A of a block, the library's K-FAC approximation of its curvature."""
    k = kf.curvature.kronecker()
    return k.dense(k.measure(block))


def dense_block(case: Case, name: str) -> Tensor:
    """The GGN block of a case by brute force."""
    found = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    return found.block(case.blocks[name])


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> bool:
    """Equal shapes, and equal numbers relative to the largest."""
    if got.shape != wanted.shape:
        return False
    return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-3))
