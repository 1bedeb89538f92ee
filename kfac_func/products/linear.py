r"""The linear maps of a model at one point, made once.

    J = ∂z/∂θ,     z = fn(θ, x) [N, *out]           J v [N, *out]           Jᵀ u, a tree like θ

`torch.func.vjp` runs the model once and keeps its graph. Its pullback u ↦ Jᵀ u is linear in u, so its own pullback is
v ↦ J v: neither product runs the model again. Both compose with grad and vmap, and need no forward derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from kfac_func import _tree
from kfac_func._errors import BatchError, CaptureError, HyperparameterError, TreeMismatchError, explain
from kfac_func._tracing import known_bad
from kfac_func._typing import Model, PyTree
from kfac_func.capture import check_examples, eagerly, not_empty, rules_of, spared, tensor_of
from kfac_func.losses.base import check_shape


class Linear(NamedTuple):
    """A model at one point: z [N, *out], push: v ↦ J v [N, *out] and pull: u ↦ Jᵀ u, a tree like the parameters."""

    outputs: Tensor
    push: Callable[[PyTree], Tensor]
    pull: Callable[[Tensor], PyTree]


def linearize(fn: Model, params: PyTree, inputs: Any) -> Linear:
    """One run of the model, and the two linear maps there. Raises the errors of `jvp`.

    >>> at = linearize(lambda p, x: x * p["w"] ** 2, {"w": torch.tensor([3.0])}, torch.ones(2, 1))
    >>> at.push({"w": torch.tensor([1.0])}).flatten(), at.pull(torch.ones(2, 1))["w"]
    (tensor([6., 6.]), tensor([12.]))
    """
    some(fn, inputs)
    with mathematical():
        z, pullback = transpose(
            lambda leaves: tensor_of(fn(_tree.with_leaves(params, leaves), inputs)), _tree.leaves(params)
        )
    check_examples(z, len(z) if z.ndim else 1)
    if known_bad([z]):
        raise BatchError(
            explain(
                "the model's outputs are not finite.",
                why="every product with them would be NaN",
                options="look for NaN in the parameters and in the inputs",
            )
        )
    _, pushed = transpose(pullback, torch.zeros_like(z))

    def push(vector: PyTree) -> Tensor:
        return pushed(like(params, vector))

    def pull(vector: Tensor) -> PyTree:
        check_shape("output vectors", vector, tuple(z.shape))
        return _tree.with_leaves(params, pullback(vector.to(z.dtype)))

    return Linear(z, push, pull)


def careful(fn: Model) -> Model:
    """The model, whose first run is on copies of its parameters. Raises CaptureError when that writes into them.

    >>> model = careful(lambda p, x: x * p["w"].mul_(2))
    >>> model({"w": torch.ones(1)}, torch.ones(1))
    Traceback (most recent call last):
        ...
    kfac_func._errors.CaptureError: the model writes into its parameter 'w'.
      why      a pure function leaves its arguments as they are
      options  write into a copy: w = w.clone() first
    """
    rules, trusted = rules_of(fn), []

    def run(params: PyTree, inputs: Any) -> Any:
        if trusted or torch.compiler.is_compiling():
            return rules.fn(params, inputs)
        found = spared(rules.fn, params, inputs)
        trusted.append(True)
        return found

    return replace(rules, fn=run)


def some(fn: Model, inputs: Any) -> None:
    """Raise BatchError for a batch of no examples."""
    _tree.know(inputs)
    if not rules_of(fn).whole:
        not_empty(inputs)


def jvp(fn: Model) -> Callable[[PyTree, Any], Callable[[PyTree], Tensor]]:
    r"""Jacobian-vector products: `jvp(fn)(params, inputs)` runs the model once and gives v ↦ J v.

        J v = d/dε fn(θ + εv, x) at ε = 0,     [N, *out]

    v     a tree like the parameters; a None leaf counts as zeros. Linear; vmap over stacked trees for many
    J v   in the units of the outputs, without any 1/N

    Raises BatchError for an empty batch, outputs that are no tensor [N, ...] or have NaN, CaptureError for a model that
    writes into its parameters, TreeMismatchError for a v unlike them, HyperparameterError for a v with NaN.
    Source: Pearlmutter 1994; J v as the transpose of a transpose.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> push = kf.products.jvp(fn)(params, torch.ones(5, 3))
        >>> push({"weight": torch.ones(2, 3), "bias": None})[0]
        tensor([3., 3.])
    """
    fn = careful(fn)
    return lambda params, inputs: linearize(fn, params, inputs).push


def vjp(fn: Model) -> Callable[[PyTree, Any], Callable[[Tensor], PyTree]]:
    r"""Vector-Jacobian products: `vjp(fn)(params, inputs)` runs the model once and gives u ↦ Jᵀ u.

        Jᵀ u = Σ_n J_nᵀ u_n,     a tree like the parameters, in their dtypes

    u     [N, *out], like the outputs. Linear; vmap over stacked u for many

    Raises what `jvp` raises, and TargetError for a u of another shape.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> kf.products.vjp(fn)(params, torch.ones(5, 3))(torch.ones(5, 2))["bias"]
        tensor([5., 5.])
    """
    fn = careful(fn)
    return lambda params, inputs: linearize(fn, params, inputs).pull


def transpose(fn: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """fn(x) and its pullback at x. The pullback of a linear function is its transpose, wherever x is.

    Raises CaptureError from the pullback where torch has no derivative of an operation.

    >>> transpose(lambda x: 3 * x, torch.zeros(2))[1](torch.ones(2))
    tensor([3., 3.])
    """
    value, pullback, *_ = torch.func.vjp(fn, at)

    def pulled(u: Any) -> Any:
        with differentiable():
            return pullback(u)[0]

    return value, pulled


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Raise CaptureError where torch has no derivative of an operation."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError among them
        if not isinstance(error, NotImplementedError) and "derivative for" not in str(error):
            raise
        raise CaptureError(
            explain(
                "an operation of the model has no second derivative in torch.",
                got=str(error).splitlines()[0],
                why="J v is the transpose of Jᵀ u, H v differentiates the gradient, and a model may hold slopes itself",
                options="write it with other operations (attention: torch.nn.attention.sdpa_kernel, MATH, around "
                "the call); kf.products.jacobian takes first derivatives alone",
            )
        ) from error


def like(params: PyTree, vector: PyTree) -> list[Tensor]:
    """The leaves of a vector in the order and the dtypes of the parameters: zeros where it has None.

    Raises TreeMismatchError for another structure or shape, HyperparameterError for NaN where values can be read.
    """
    tree = _tree.tree_map(lambda p, v: torch.zeros_like(p) if v is None else v.to(p.dtype), params, vector)
    found, wanted = _tree.leaves(tree), _tree.leaves_with_paths(params)
    for v, (path, p) in zip(found, wanted, strict=True):
        if v.shape != p.shape:
            raise TreeMismatchError(
                explain(
                    f"the leaf {path!r} of a vector does not fit the parameters.",
                    got=list(v.shape),
                    wanted=list(p.shape),
                    options="pass a tree like the parameters (leaves may be None), and vmap over stacked trees",
                )
            )
    if known_bad(found):
        paths = [path for v, (path, _) in zip(found, wanted, strict=True) if known_bad([v])]
        raise HyperparameterError(
            explain("a vector is not finite.", got=", ".join(map(repr, paths[:5])), why="its product would be NaN")
        )
    return found


@contextlib.contextmanager
def mathematical() -> Iterator[None]:
    """Attention in its mathematical form, as the fused kernels have no second derivative and no batching rule; norms
    with a shift alone as a sum, as those of torch leave the shift out of it; and nothing compiled.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with eagerly(), sdpa_kernel(SDPBackend.MATH), _Shifted():
        yield


class _Shifted(TorchFunctionMode):
    """norm(x, weight=None, bias=b) as norm(x) + b."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        del types
        place, kwargs = _NORMS.get(func), dict(kwargs or {})
        if place is None:
            return func(*args, **kwargs)
        named = dict(zip(("weight", "bias"), args[place : place + 2], strict=False)) | kwargs
        bias = named.get("bias")
        if bias is None or named.get("weight") is not None:
            return func(*args, **kwargs)
        if "bias" in kwargs:
            kwargs["bias"] = None
        x = args[0] if args else kwargs["input"]
        shift = bias if func in (F.layer_norm, torch.layer_norm) else bias.reshape(-1, *[1] * (x.ndim - 2))
        return (
            func(*args[: place + 1], *[None for _ in args[place + 1 : place + 2]], *args[place + 2 :], **kwargs) + shift
        )


_NORMS = {
    F.layer_norm: 2, F.group_norm: 2, F.batch_norm: 3, F.instance_norm: 3,
    torch.layer_norm: 2, torch.group_norm: 2, torch.batch_norm: 1, torch.instance_norm: 1,
}  # fmt: skip
"""Where their scale is among the arguments; the shift comes after it."""
