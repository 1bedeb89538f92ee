"""What torch alone says about a case: autograd over whole batches, one output at a time, and dense matrices."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.fuzz.cases import Problem
from tests.fuzz.trees import flat, mapped, rebuilt


class Disagrees(Exception):
    """torch cannot, or torch.func and torch.autograd give different gradients: there is no truth to compare with."""


class Oracle(cached_property):
    """A cached property whose every error says that torch itself cannot."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        try:
            return super().__get__(instance, owner)
        except Exception as error:
            raise Disagrees(f"{type(error).__name__}: {error}") from error


class Truth:
    """The oracles of one problem, each made when it is asked for. P parameters, N examples, D outputs of each.

    value, gradient       of the loss, by torch.func
    jacobian [N D, P]     of all outputs of the batch, by torch.autograd
    hessian [N D, N D]    of the loss in all outputs
    ggn [P, P]            Jᵀ H J: the curvature of the loss of the batch, whatever mixes inside
    scores [N, D]         the gradient of every example's own loss in its own outputs
    """

    def __init__(self, problem: Problem, seed: int):
        self.problem, self.seed = problem, seed
        self.params = mapped(problem.params, torch.Tensor.detach)
        self.leaves = flat(self.params)

    def run(self, leaves: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(self.seed)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
            return self.problem.plain(rebuilt(self.params, leaves), self.problem.inputs)

    def total(self, leaves: dict[str, Tensor]) -> Tensor:
        return self.problem.value(self.run(leaves), self.problem.targets)

    @Oracle
    def value_and_gradient(self) -> tuple[Tensor, dict[str, Tensor]]:
        grads, value = torch.func.grad_and_value(self.total)(self.leaves)
        return value, grads

    @Oracle
    def graph(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs z with the graph of autograd, and the leaves under it."""
        leaves = {path: leaf.clone().requires_grad_() for path, leaf in self.leaves.items()}
        return self.run(leaves), leaves

    def pulled(self, scalar: Tensor, create: bool = False) -> dict[str, Tensor]:
        _, leaves = self.graph
        if not scalar.requires_grad:
            return {path: torch.zeros_like(leaf) for path, leaf in leaves.items()}
        found = torch.autograd.grad(
            scalar, list(leaves.values()), retain_graph=True, create_graph=create, allow_unused=True
        )
        return {
            path: torch.zeros_like(leaf) if one is None else one
            for (path, leaf), one in zip(leaves.items(), found, strict=True)
        }

    @Oracle
    def by_autograd(self) -> dict[str, Tensor]:
        return self.pulled(self.problem.value(self.graph[0], self.problem.targets))

    @property
    def outputs(self) -> Tensor:
        return self.graph[0].detach()

    @Oracle
    def jacobian(self) -> Tensor:
        z, _ = self.graph
        return torch.stack([joined(self.pulled(one)) for one in z.flatten()])

    @Oracle
    def hessian(self) -> Tensor:
        z, y = self.outputs, self.problem.targets
        one = torch.func.hessian(lambda x: self.problem.value(x.reshape(z.shape), y))(z.flatten())
        return one.detach()

    @Oracle
    def ggn(self) -> Tensor:
        return self.jacobian.T @ self.hessian @ self.jacobian

    @Oracle
    def scores(self) -> Tensor:
        z, y = self.outputs.requires_grad_(), self.problem.targets
        (g,) = torch.autograd.grad(self.problem.value(z, y), z)
        return (g if self.problem.loss.reduction == "sum" else len(g) * g).flatten(1)

    @Oracle
    def example_gradients(self) -> Tensor:
        """[N, P]"""
        n = len(self.outputs)
        return torch.einsum("nd,ndp->np", self.scores, self.jacobian.unflatten(0, (n, -1)))

    def hessian_product(self, vector: Tensor, constants: bool) -> Tensor:
        """H v of the loss: the gradient's derivative along v, forwards where torch can, else backwards.

        Forwards torch keeps what backwards it loses (the shift of a normalisation without a scale). A parameter whose
        gradient never moves is a constant (the padding row of an embedding): its column counts as zero like its row.
        With `constants` in the model (detached, under no_grad: forwards they move) both must be one.
        """
        grad, second = torch.func.grad(self.total), self.backwards(vector)

        def along(v: Tensor) -> Tensor:
            return joined(torch.func.jvp(grad, (self.leaves,), (flat(self.tree(v)),))[1]).detach()

        try:
            found = along(vector * (along(vector) != 0))
        except (RuntimeError, NotImplementedError):
            return second
        tight = 1e-4 if found.dtype == torch.float32 else 1e-8
        if constants and not bool((found - second).norm() <= tight * found.norm()):
            raise Disagrees("torch has one Hessian backwards and another forwards")
        return found

    def backwards(self, vector: Tensor) -> Tensor:
        """H v by differentiating the gradient again, in two ways; what is detached inside is a constant."""
        try:
            first = self.pulled(self.problem.value(self.graph[0], self.problem.targets), create=True)
            found = joined(self.pulled((joined(first) * vector).sum())).detach()
            pull = torch.func.vjp(torch.func.grad(self.total), self.leaves)[1]
            again = joined(pull(flat(self.tree(vector)))[0])
        except RuntimeError as error:
            raise Disagrees(str(error)) from error
        if not bool((found - again).norm() <= 1e-3 * found.norm()):  # .detach() inside is read in two ways
            raise Disagrees("torch.func and torch.autograd have two Hessians")
        return found

    def tree(self, vector: Tensor) -> Any:
        """A tree like the parameters from one vector."""
        parts = vector.split([leaf.numel() for leaf in self.leaves.values()])
        named = {k: one.reshape(leaf.shape) for (k, leaf), one in zip(self.leaves.items(), parts, strict=True)}
        return rebuilt(self.params, named)

    def places(self, path: str) -> slice:
        """Where a leaf is in a vector of all."""
        start = 0
        for other, leaf in self.leaves.items():
            if other == path:
                return slice(start, start + leaf.numel())
            start += leaf.numel()
        raise KeyError(path)

    def check(self, tolerance: float) -> None:
        """Raise where torch is not of one mind, or not finite."""
        one, two = joined(self.value_and_gradient[1]), joined(self.by_autograd)
        if not bool(one.isfinite().all()) or not bool((one - two).norm() <= tolerance * (1e-12 + one.norm())):
            raise Disagrees("torch.func and torch.autograd disagree, or are not finite")


def joined(leaves: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves.values()])
