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
from kfac_func._tracing import version
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
_T, _MT = vars(torch._C.TensorBase)["T"].__get__, vars(torch._C.TensorBase)["mT"].__get__
_TURNS = (_T, _MT, torch.t, Tensor.t, torch.transpose, Tensor.transpose, torch.permute, Tensor.permute)
_COPIES = (torch.clone, Tensor.clone, Tensor.contiguous)


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
        if func in layers.expansions and any(tensor in self.known for tensor in tensors):
            return self._expand(func, args, kwargs)
        handler = layers.handlers.get(func)
        found = handler(Call(func, args, kwargs, self.ref)) if handler is not None else None
        if found is not None:
            self._touch(tensors, func)
            return self._record(found, tensors, func)
        if func in _ADDS and self._add_bias(args, kwargs):
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if any(True for _ in _tensors(result)):  # reading a shape or a dtype is no use
            self._touch(tensors, func)
            for tensor in tensors:
                if tensor in self.known and not self._follow(func, args, kwargs, result):
                    self.strays.append(Stray(self.known[tensor].path, name_of(func)))
        return result

    def _expand(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function that has several uses inside, and recognise each."""
        before = len(self.strays)
        with self:
            result = layers.expansions[func](*args, **kwargs)
        self.strays[before:] = [Stray(path, f"{name_of(func)} ({op})") for path, op in self.strays[before:]]
        return result

    def _record(self, found: Found, tensors: list[Tensor], func: Any) -> Tensor:
        claimed = {ref.path for ref in (found.weight, found.bias) if ref is not None}
        for tensor in tensors:
            ref = self.known.get(tensor)
            if ref is not None and ref.path not in claimed:
                self.strays.append(Stray(ref.path, name_of(func)))
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
            if ref.shape == self.found[index].bias_shape and ref.order == tuple(range(len(ref.shape))):
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

    def _follow(self, func: Any, args: tuple, kwargs: dict, result: Any) -> bool:
        """Views and copies of a parameter are the parameter. True when the result is one."""
        ref = self.ref(args[0]) if args else None
        if ref is None or kwargs or not isinstance(result, Tensor):
            return False
        if func in _COPIES:
            self.known[result] = ref
            return True
        if func in _TURNS:
            self.known[result] = ref._replace(order=_turned(func, ref.order, args[1:]))
            return True
        return False


def _turned(func: Any, order: tuple[int, ...], args: tuple) -> tuple[int, ...]:
    if func in (torch.permute, Tensor.permute):
        dims = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return tuple(order[d] for d in dims)
    one, two = args if args else (-1, -2)
    if func == _T:
        return order[::-1]
    if len(order) < 2:
        return order
    turned = list(order)
    turned[one], turned[two] = turned[two], turned[one]
    return tuple(turned)


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def name_of(func: Any) -> str:
    """The name of a torch function as users know it."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")
