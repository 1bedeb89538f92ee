"""K-FAC factors of BackPACK, one sampled vector per example; it has no optimiser, so the rest is written here.

Weight and bias are blocks of their own, as BackPACK has them: G and A of a weight, another G of the bias. Here: moving
averages, π damping, Cholesky inverses.
"""

from __future__ import annotations

import torch
from backpack import backpack, extend  # pyright: ignore[reportMissingImports]
from backpack.extensions import KFAC  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from benchmarks.harness import Step
from benchmarks.peers.common import DAMPING, DECAY, descend, model_and_loss
from benchmarks.steps import Task
from benchmarks.workloads import GlobalMean

Factors = dict[nn.Parameter, list[Tensor]]


def steps(task: Task) -> dict[str, Step]:
    """All three kinds."""
    module, loss = model_and_loss(task)
    if any(len(list(layer.children())) for layer in module.children()):
        raise NotImplementedError("no chain of layers that it knows; extend(use_converter=True) fails on it too")
    if isinstance(loss, nn.BCEWithLogitsLoss):
        raise NotImplementedError("its sigmoid cross entropy takes one output and targets of 0 or 1")
    module, loss = extend(_known(module)), extend(loss)
    averages: Factors = {}

    def backward(stats: bool) -> Tensor:
        module.zero_grad(set_to_none=True)
        value = loss(module(task.inputs), task.targets)
        if not stats:
            value.backward()
            return value.detach()
        with backpack(KFAC(mc_samples=1)):
            value.backward()
        for p in module.parameters():
            mine = averages.setdefault(p, [torch.zeros_like(f) for f in p.kfac])  # type: ignore[attr-defined]
            for average, factor in zip(mine, p.kfac, strict=True):  # type: ignore[attr-defined]
                average.lerp_(factor, 1 - DECAY)
            del p.kfac
        return value.detach()

    def move(kind: str) -> Tensor:
        nonlocal held
        value = backward(stats=kind != "pre")
        held = {p: _inverses(f) for p, f in averages.items()} if kind == "full" else held
        descend(module, {p: _solved(inverses, p.grad) for p, inverses in held.items() if p.grad is not None})
        return value

    held: Factors = {}
    move("full")
    return {kind: Step(lambda kind=kind: move(kind), trains=True) for kind in ("full", "stats", "pre")}


def _known(module: nn.Module) -> nn.Module:
    """The mean over pixels by a module that BackPACK knows."""
    if not isinstance(module, nn.Sequential):
        return module
    found: list[nn.Module] = []
    for layer in module:
        found += [nn.AvgPool2d(8), nn.Flatten()] if isinstance(layer, GlobalMean) else [layer]
    return nn.Sequential(*found)


def _inverse(factor: Tensor, damping: Tensor | float) -> Tensor:
    damped = factor + damping * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _inverses(factors: list[Tensor]) -> list[Tensor]:
    if len(factors) == 1:
        return [_inverse(factors[0], DAMPING)]
    g, a = factors
    pi = (a.diagonal().mean() / g.diagonal().mean()).sqrt()
    return [_inverse(g, DAMPING**0.5 / pi), _inverse(a, DAMPING**0.5 * pi)]


def _solved(inverses: list[Tensor], v: Tensor) -> Tensor:
    if len(inverses) == 1:
        return inverses[0] @ v
    g, a = inverses
    return (g @ v.flatten(1) @ a).view_as(v)
