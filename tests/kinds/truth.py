"""What the models of this folder are compared with: backward passes of plain torch, one output after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import Layout, squares
from kfac_func.estimators import statistics
from tests import oracles
from tests.zoo import close

Params = dict[str, Tensor]
Model = Callable[[Any, Any], Tensor]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _leaves(params: Params) -> Params:
    return {path: leaf.clone().requires_grad_() for path, leaf in params.items()}


def gradient(fn: Model, value: Callable, params: Params, inputs: Any, targets: Tensor) -> Params:
    leaves = _leaves(params)
    options: Any = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(value(fn(leaves, inputs), targets), list(leaves.values()), **options)
    return dict(zip(leaves, found, strict=True))


def jacobian(fn: Model, params: Params, inputs: Any) -> Params:
    """∂z/∂w [N, D, *shape] by path: a backward pass for every number of the outputs of the whole batch."""
    leaves = _leaves(params)
    z = fn(leaves, inputs)
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    rows = [torch.autograd.grad(one, list(leaves.values()), **options) for one in z.flatten()]
    return {
        path: torch.stack([row[k] for row in rows]).unflatten(0, (len(z), -1)).detach() for k, path in enumerate(leaves)
    }


def curvature(fn: Model, value: Callable, params: Params, inputs: Any, targets: Tensor) -> oracles.Curvature:
    """JᵀHJ of the whole batch."""
    z = fn(params, inputs).detach()
    return oracles.Curvature(jacobian(fn, params, inputs), oracles.output_hessian(value, z, targets))


def diagonal(dense: oracles.Curvature) -> Params:
    """The diagonal of JᵀHJ, leaf by leaf."""
    found = {}
    for path, j in dense.jacobian.items():
        rows = j.reshape(j.shape[0] * j.shape[1], -1)
        found[path] = (rows * (dense.hessian @ rows)).sum(0).reshape(j.shape[2:])
    return found


def same(found: Params, wanted: Params, tolerance: float = 1e-10) -> None:
    assert set(found) == set(wanted)
    for path, leaf in wanted.items():
        assert close(found[path], leaf, tolerance), path


def laid_out(layout: Layout, leaves: Params) -> Tensor:
    """The leaves of a block as its V."""
    if not layout.matrix:
        return torch.cat([leaves[path].flatten() for path in layout.leaves])
    parts = [] if layout.weight is None else [leaves[layout.weight].permute(layout.order).flatten(1)]
    return torch.cat(parts + ([] if layout.bias is None else [leaves[layout.bias][:, None]]), 1)


def check(
    patch: pytest.MonkeyPatch, fn: Any, loss: kf.losses.Loss, params: Params, batch: tuple[Any, Tensor], **options: Any
) -> dict[str, Layout]:
    """Value and gradient of the step are those of backward passes, and the diagonal of every block is that of JᵀHJ,
    on the average over all 2^N signs of the examples where the step draws some. Returns the layouts of the blocks.
    """
    step: Any = kf.value_grad_and_stats(fn, loss, estimator=kf.estimators.exact(), **options)
    value, grads, stats = step(params, batch, generator=seeded())
    assert close(value, loss.value(fn(params, batch[0]), batch[1]))
    same(grads, gradient(fn, loss.value, params, *batch))
    patterns = list(oracles.patterns(len(batch[1]), (0.25, 0.75))) if stats.rules.value.plan.shared else [None]
    found: Params = {}
    for u in patterns:
        if u is not None:
            patch.setattr(statistics, "uniform", lambda *args, u=u: u)
        for name, block in step(params, batch, generator=seeded())[2].blocks().items():
            found[name] = found.get(name, torch.zeros(())) + squares(block) / len(patterns)
    patch.undo()
    wanted = diagonal(curvature(fn, loss.value, params, *batch))
    layouts = {name: block.layout for name, block in stats.blocks().items()}
    for name, layout in layouts.items():
        assert close(found[name], laid_out(layout, wanted)), name
    return layouts
