"""Brute force: slow, obviously right, and without any mathematics of the library.

Curvature of a scalar loss L(z) of all outputs z [N, *out] of a batch is J^T (d^2 L / dz^2) J, with the full Hessian
over all outputs and the Jacobian of one example at a time: no 1/N, no T and no square root appears in it, so
none can be forgotten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev


class Spec(NamedTuple):
    """Where leaves go in the matrix [W | b]: "out_in", "in_out" (W is stored transposed), or one flat "vector"."""

    weight: str | None
    bias: str | None = None
    form: str = "out_in"
    groups: int = 1


def flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """The leaves of nested dictionaries by dotted path."""
    if isinstance(tree, Tensor):
        return {prefix[:-1]: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in flat(value, f"{prefix}{key}.").items()}


def nested(tree: Any, leaves: dict[str, Tensor], prefix: str = "") -> Any:
    """The tree with other leaves."""
    if isinstance(tree, Tensor):
        return leaves[prefix[:-1]]
    return {key: nested(value, leaves, f"{prefix}{key}.") for key, value in tree.items()}


def rows(data: Any, start: int, stop: int) -> Any:
    """Some examples of a batch (a tensor or a tuple of them)."""
    return tuple(item[start:stop] for item in data) if isinstance(data, tuple) else data[start:stop]


def jacobians(fn: Callable, params: Any, inputs: Any, n: int) -> dict[str, Tensor]:
    """The derivatives of every output of every example, [N, D, *shape] by path, one example at a time."""
    leaves = flat(params)

    def one(index: int) -> dict[str, Tensor]:
        return jacrev(lambda p: fn(nested(params, p), rows(inputs, index, index + 1))[0].flatten())(leaves)

    every = [one(index) for index in range(n)]
    return {path: torch.stack([found[path] for found in every]) for path in leaves}


def laid_out(spec: Spec, arrays: dict[str, Tensor], lead: int) -> Tensor:
    """[*lead, p]: the arrays of a block's leaves in the row-major order of [W | b], group after group."""
    if spec.form == "vector":
        return torch.cat([arrays[path].flatten(lead) for path in (spec.weight, spec.bias) if path is not None], dim=-1)
    parts = []
    if spec.weight is not None:
        w = arrays[spec.weight]
        w = w.movedim(lead + 1, lead) if spec.form == "in_out" else w
        parts.append(w.flatten(lead + 1).unflatten(lead, (spec.groups, -1)))
    if spec.bias is not None:
        parts.append(arrays[spec.bias].unsqueeze(-1).unflatten(lead, (spec.groups, -1)))
    return torch.cat(parts, dim=-1).flatten(lead)


def output_hessian(value: Callable, z: Tensor, targets: Tensor) -> Tensor:
    """The Hessian of the loss of the batch in all its outputs, [N D, N D]."""
    return jacrev(grad(value))(z, targets).reshape(z.numel(), z.numel())


class Curvature(NamedTuple):
    """The Jacobian of all outputs, [N, D, *shape] by path, and the Hessian of the loss in them."""

    jacobian: dict[str, Tensor]
    hessian: Tensor

    def block(self, one: Spec, two: Spec | None = None) -> Tensor:
        """The block of the GGN of one group of leaves (or of two, off the diagonal)."""
        left, right = (laid_out(s, self.jacobian, 2).flatten(0, 1) for s in (one, two or one))
        return left.T @ self.hessian @ right

    def whole(self, order: list[str]) -> Tensor:
        """The GGN of the whole net, leaves flattened in this order."""
        j = torch.cat([self.jacobian[path].flatten(2) for path in order], dim=-1).flatten(0, 1)
        return j.T @ self.hessian @ j


def ggn(fn: Callable, params: Any, inputs: Any, targets: Tensor, value: Callable) -> Curvature:
    """The generalised Gauss-Newton matrix of value(fn(params, inputs), targets)."""
    return Curvature(jacobians(fn, params, inputs, len(targets)), output_hessian(value, fn(params, inputs), targets))


def example_gradients(fn: Callable, params: Any, inputs: Any, targets: Tensor, value: Callable) -> dict[str, Tensor]:
    """The gradient of every example's own loss, [N, *shape] by path: a loop over batches of one."""
    leaves = flat(params)

    def own(p: dict[str, Tensor], n: int) -> Tensor:
        return value(fn(nested(params, p), rows(inputs, n, n + 1)), targets[n : n + 1])

    every = [grad(own)(leaves, n) for n in range(len(targets))]
    return {path: torch.stack([found[path] for found in every]) for path in leaves}


def loss_hessian(fn: Callable, params: Any, inputs: Any, targets: Tensor, value: Callable, path: str) -> Tensor:
    """The Hessian of the loss in one leaf, [p, p]."""
    leaves = flat(params)

    def total(leaf: Tensor) -> Tensor:
        return value(fn(nested(params, leaves | {path: leaf}), inputs), targets)

    size = leaves[path].numel()
    return jacrev(grad(total))(leaves[path]).reshape(size, size)  # jacrev twice is wrong for layer norms (torch 2.13)


# ------------------------------------------------------------------ Kronecker products and damping, written out


def kron(g: Tensor, a: Tensor) -> Tensor:
    """G x A on row-major vec(V); group after group for [q, o, o] and [q, i, i]."""
    return torch.kron(g, a) if g.ndim == 2 else torch.block_diag(*map(torch.kron, g, a))


def damped(a: Tensor, g: Tensor, t: float, damping: float, split: str) -> Tensor:
    """The matrix that a Kronecker block with damping stands for."""
    if g.ndim == 3:
        return torch.block_diag(*(damped(*pair, t, damping, split) for pair in zip(a, g, strict=True)))
    if split == "exact":
        return t * torch.kron(g, a) + damping * torch.eye(len(a) * len(g), dtype=a.dtype)
    root = (damping / t) ** 0.5
    dead = a.trace() == 0 or g.trace() == 0
    pi = 1.0 if split == "none" or dead else float(((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5)
    left, right = g + root / pi * torch.eye(len(g), dtype=g.dtype), a + pi * root * torch.eye(len(a), dtype=a.dtype)
    return t * torch.kron(left, right)


# ------------------------------------------------------------------ enumeration


def patterns(length: int, symbols: tuple[float, ...] = (-1.0, 1.0)) -> Iterator[Tensor]:
    """Every vector of this length with entries from `symbols`."""
    for pattern in itertools.product(symbols, repeat=length):
        yield torch.tensor(pattern, dtype=torch.float64)


def conv_patches(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """The patches of images [N, C, H, W] as rows [N, S, C kh kw], by loops."""
    n, c, h, w = x.shape
    wide = torch.zeros(n, c, h + 2 * padding[0], w + 2 * padding[1], dtype=x.dtype)
    wide[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w] = x
    out = [(wide.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)]
    found = torch.zeros(n, out[0] * out[1], c, *kernel, dtype=x.dtype)
    for r, s, u, v in itertools.product(range(out[0]), range(out[1]), range(kernel[0]), range(kernel[1])):
        found[:, r * out[1] + s, :, u, v] = wide[:, :, r * stride[0] + u * dilation[0], s * stride[1] + v * dilation[1]]
    return found.flatten(2)
