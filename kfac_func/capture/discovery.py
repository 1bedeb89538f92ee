"""One run of a model to see which uses there are, as the tape will see them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import CaptureError, KFacError, explain
from kfac_func._tracing import version
from kfac_func._typing import Model, PyTree
from kfac_func.capture.batched import tensor_of
from kfac_func.capture.tape import Reached, Watch, tap
from kfac_func.layers import Found


def checked_leaves(params: PyTree) -> dict[str, Tensor]:
    """The parameters by path. Raises CaptureError for leaves that have no real gradient."""
    leaves = _tree.unique_paths(params)
    for path, leaf in leaves.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            what = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise CaptureError(
                explain(
                    f"parameter {path!r} is no real floating-point tensor.",
                    got=what,
                    why="curvature is that of a function of real numbers",
                    options="torch.view_as_real(...) and put it together inside fn"
                    if what.startswith("torch.complex")
                    else "close fn over it: it is a constant, no parameter",
                )
            )
    return leaves


def discovered(fn: Model, params: PyTree, leaves: dict[str, Tensor], inputs: Any) -> Watch:
    """The uses of the parameters, in the order of the run, and those that a gradient of the outputs comes to.

    Runs under the transform and with the taps of a step, so that what the model can see of them is the same. Raises
    CaptureError for a model that `torch.func` can differentiate but the tape cannot follow.
    """
    zero, reached, seen = torch.zeros(()), set(), []

    def taped(probe: Tensor) -> Tensor:
        def at(index: int, use: Found) -> Tensor:
            tapped = tap(use.output, probe.to(use.output).expand(use.output.shape), True)
            return Reached.apply(tapped, index, reached).clone()

        watch = Watch(leaves, at)
        seen.append(watch)
        with watch, eagerly():
            return tensor_of(fn(params, inputs))

    def pulled() -> None:
        z, pullback, *_ = torch.func.vjp(taped, zero)
        pullback(torch.ones_like(z))

    followed(pulled, fn, params, inputs)
    seen[-1].reached |= reached
    return seen[-1]


def spared(fn: Model, params: PyTree, inputs: Any) -> Any:
    """What the model gives at copies of its parameters. Raises CaptureError when it writes into them.

    >>> spared(lambda p, x: x * p["w"], {"w": torch.ones(2)}, torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    copies = _tree.tree_map(torch.clone, params)
    before = {path: version(leaf) for path, leaf in _tree.leaves_with_paths(copies)}
    found = fn(copies, inputs)
    written = [path for path, leaf in _tree.leaves_with_paths(copies) if version(leaf) != before[path]]
    if written:
        raise CaptureError(
            explain(
                f"the model writes into its parameter {written[0]!r}.",
                why="a pure function leaves its arguments as they are",
                options="write into a copy: w = w.clone() first",
            )
        )
    return found


def followed(run: Any, fn: Model, params: PyTree, inputs: Any) -> Any:
    """What a run on the tape gives; its errors in words, if `torch.func` can differentiate the model without it."""
    try:
        return run()
    except KFacError:
        raise
    except Exception as error:
        plainly(fn, params, inputs)  # raises what is wrong with the model itself
        raise CaptureError(
            explain(
                "the tape cannot follow the model, though torch.func can differentiate it.",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
                why="something in it does not work on outputs of layers that are watched",
                options="kf.products with route='loop' for per-example quantities; torch.func.grad for the gradient",
            )
        ) from error


def plainly(fn: Model, params: PyTree, inputs: Any) -> tuple[Tensor, Any]:
    """The outputs of the model and their pullback to the leaves of the parameters, without any tape."""

    def outputs(values: list[Tensor]) -> Tensor:
        return tensor_of(fn(_tree.with_leaves(params, values), inputs))

    found, pullback, *_ = torch.func.vjp(outputs, _tree.leaves(params))
    return found, pullback


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Functions that torch.compile wrapped run as they were written, so that the tape sees into them; those of
    torch.jit are not specialised to what asks for derivatives now, which other runs would then have to go without.
    """
    if torch.compiler.is_compiling():
        yield
        return
    compiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with compiled, torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
        yield
