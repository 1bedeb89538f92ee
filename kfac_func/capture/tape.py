"""The dynamic half of capture: run the model once, recognise the uses of parameters, and tap their outputs.

A *tap* is the identity on a use's output with a second argument, the probe, whose gradient is the output's. Probes
are zeros without storage, so

    outputs, pullback, inputs = torch.func.vjp(taped model, probes, rest, has_aux=True)

costs one forward pass, and every call of `pullback` gives the output gradients of all recorded uses for one output
vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kfac_func import layers
from kfac_func._errors import CaptureError, explain
from kfac_func._tracing import level, transform, version
from kfac_func.capture import views
from kfac_func.layers import Call, Found, Ref


class Tap(torch.autograd.Function):
    """(out, probe) -> out, whose backward hands the gradient to both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, probe: Tensor) -> Tensor:
        del probe
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].view_as(tangents[0])


class Reached(torch.autograd.Function):
    """(out, index, seen) -> out, whose backward, if there is any, says so: however small the gradient is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, index: int, seen: set[int]) -> Tensor:
        del index, seen
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.index, ctx.seen = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.add(ctx.index)
        return grads[0], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].view_as(tangents[0])


ADDED = 2**20  # numbers up to which an addition is faster than a function of our own


def tap(out: Tensor, probe: Tensor, copied: bool) -> Tensor:
    """Pass `out` through (a copy of it, if it will be written in place) and give its gradient to `probe` as well."""
    if torch.compiler.is_compiling() or out.numel() < ADDED:
        return out + probe  # a compiler fuses it away (and Dynamo would lose gradients of unused inputs)
    tapped: Tensor = Tap.apply(out, probe)
    return tapped.clone() if copied else tapped


class Stray(NamedTuple):
    """A use of a parameter that no kind recognises."""

    path: str
    op: str


_ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


class Watch(TorchFunctionMode):
    """Recognises the uses of parameter leaves, by identity, and passes every recognised output through `tap(index,
    found)`.

    After the run: `found` lists the recognised uses in order, `strays` the uses that no kind can see.
    """

    def __init__(self, leaves: dict[str, Tensor], tap: Callable[[int, Found], Tensor]):
        super().__init__()
        self.known: dict[Tensor, Ref] = {
            leaf: Ref(path, tuple(leaf.shape), tuple(range(leaf.ndim))) for path, leaf in leaves.items()
        }
        if len(self.known) < len(leaves):
            raise CaptureError(
                explain(
                    "two parameters are the same tensor.",
                    got=" and ".join(repr(path) for path, leaf in leaves.items() if self.known[leaf].path != path)
                    + " under a second path",
                    why="parameters are recognised by identity",
                    options="keep one leaf and use it twice (a tied weight), or clone one",
                )
            )
        self.tap = tap
        self.level = level()
        self.reached: set[int] = set()  # the uses that gradients of the outputs come to, where somebody asked
        self.found: list[Found] = []
        self.strays: list[Stray] = []
        self.awaiting: dict[Tensor, int] = {}  # results to which a bias may still be added
        self.biased: dict[Tensor, str] = {}  # results to which one was
        self.fresh: list[tuple[Tensor, int, int]] = []  # every result, its version and that of the recorded input

    def ref(self, value: Any) -> Ref | None:
        """The parameter that a value is, or None."""
        return self.known.get(value) if isinstance(value, Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        del types
        kwargs = kwargs or {}
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        if not torch.is_grad_enabled() or func in views.CUT:
            return args[0].detach() if func == views.DATA else func(*args, **kwargs)
        tensors = [x for x in tensors if not views.only_measured(func, args, x)]
        if level() != self.level:
            return self._inside(func, args, kwargs, tensors)
        if func in layers.expansions and any(tensor in self.known for tensor in tensors):
            return self._expand(func, args, kwargs)
        if func in _ADDS and self._add_bias(args, kwargs):
            return func(*args, **kwargs)
        handler = layers.handlers.get(func)
        found = handler(Call(func, args, kwargs, self.ref)) if handler is not None else None
        if found is not None:
            self._touch(tensors, func)
            return self._record(found, tensors, func)
        result = func(*args, **kwargs)
        if any(x.is_floating_point() or x.is_complex() for x in _tensors(result)):  # else it has no gradient
            self._touch(tensors, func)
            seen = self.ref(args[0]) if args else None
            moved = {} if seen is None else views.followed(seen, func, args, kwargs, result)
            self.known |= moved
            self._stray([tensor for tensor in tensors if not moved or tensor is not args[0]], func, args)
        return result

    def _inside(self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        """A call inside a transform that the model makes: what is used there cannot be tapped."""
        self._touch(tensors, func)
        self._stray(tensors, func, args, f" inside {transform()}")
        return func(*args, **kwargs)

    def _stray(self, tensors: list[Tensor], func: Any, args: tuple = (), where: str = "") -> None:
        paths = [self.known[tensor].path for tensor in tensors if tensor in self.known]
        self.strays += [Stray(path, name_of(func, args) + where) for path in paths]

    def _expand(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function that has several uses inside, and recognise each."""
        before = len(self.strays)
        with self:
            result = layers.expansions[func](*args, **kwargs)
        self.strays[before:] = [Stray(path, f"{name_of(func)} ({op})") for path, op in self.strays[before:]]
        return result

    def _record(self, found: Found, tensors: list[Tensor], func: Any) -> Tensor:
        claimed = {ref.path for ref in (found.weight, found.bias) if ref is not None}
        self._stray([x for x in tensors if x in self.known and self.known[x].path not in claimed], func)
        out = self.tap(len(self.found), found)
        result = out if found.restore is None else found.restore(out)
        if found.bias_shape is not None and found.bias is None:
            self.awaiting[result] = len(self.found)
        self.found.append(found)
        self.fresh.append((result, version(result), version(found.inputs)))
        return result

    def uncaptured(self) -> dict[str, list[str]]:
        """The operations by which every parameter is used where no kind can see it."""
        found: dict[str, list[str]] = {}
        for path, op in self.strays:
            found.setdefault(path, []).append(op)
        return found

    def written(self) -> list[tuple[bool, bool]]:
        """Of every use: whether its recorded input and its result were written in place after it."""
        return [
            (version(found.inputs) != before, version(result) != after)
            for found, (result, after, before) in zip(self.found, self.fresh, strict=True)
        ]

    def _add_bias(self, args: tuple, kwargs: dict) -> bool:
        """Join `result + bias` to the use that made the result, when that is all that happens to it."""
        if kwargs or len(args) != 2:
            return False
        for result, bias in (args, args[::-1]):
            ref = self.ref(bias)
            if ref is None or not isinstance(result, Tensor) or result not in self.awaiting:
                continue
            index = self.awaiting[result]
            if ref.size == self.found[index].bias_shape and ref.order == tuple(range(len(ref.shape))):
                del self.awaiting[result]
                self.biased[result] = ref.path
                self.found[index] = self.found[index]._replace(bias=ref)
                return True
        return False

    def _touch(self, tensors: list[Tensor], func: Any) -> None:
        """Any other use of a result means that its gradient is not the bias's alone."""
        for tensor in tensors:
            self.awaiting.pop(tensor, None)
            if tensor in self.biased:
                self.strays.append(Stray(self.biased[tensor], f"add, beside {name_of(func)} of the same result"))


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def name_of(func: Any, args: tuple = ()) -> str:
    """The name of a torch function as users know it."""
    if args and isinstance(args[0], type) and issubclass(args[0], torch.autograd.Function):
        return f"{args[0].__name__}.apply"
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")
