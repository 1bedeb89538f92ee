r"""The routes to what every example says; equal numbers, where there are any.

"tape"    one forward pass with taps, one backward pass for every v: V_{v,n} stays in two thin factors
"vmap"    a vmap over single examples of fn and its pullback, for models with uses that the tape cannot see: V_{v,n} is
          there entry by entry, every leaf a vector block of its own. Proved once, on two examples, by the loop
"loop"    one forward pass of the batch, and one backward pass for every v and n, with an output vector that is zero but
          for example n: slow, and right for any model whose examples do not see each other, on batches of any form.
          Its time goes with N²; with N times `chunk_size`, where there is one
"auto"    the first of these three that can, with a warning, once, when it is not the tape

Random numbers (dropout) are those of a run on the batch, or on the chunk; a vmap refuses such models. For a model with
`kf.batched(whole=True)`, the loop gives the gradients of the outputs along dimension 0, whatever they see of each
other. Source of the thin factors: Goodfellow 2015 (1510.01799), §5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from kfac_func import _tree
from kfac_func._errors import BatchError, CaptureError, HyperparameterError, KFacError, explain, warn
from kfac_func._tracing import plain
from kfac_func._typing import Model, PyTree
from kfac_func.capture import Plan, checked_leaves, chosen_leaves, finder, planner, restricted, same_draws
from kfac_func.capture.planner import Finding
from kfac_func.products.runs import Way, apart, looped, mapped, taped

Route: TypeAlias = Literal["auto", "tape", "vmap", "loop"]
"""From the taps of the layers, a vmap over examples, a loop over them, or the first of these that can."""

Finder: TypeAlias = Callable[[PyTree, Any], Way]
"""(params, inputs) -> the way. Raises CaptureError where there is none."""


class Others(NamedTuple):
    """The ways of a batch without a tape, and why a vmap cannot take it ("" if it can)."""

    finding: Finding
    mapped: Way
    looped: Way
    unmapped: str

    @property
    def best(self) -> tuple[str, Way]:
        return ("loop", self.looped) if self.unmapped else ("vmap", self.mapped)


def known(route: str) -> None:
    """Raise HyperparameterError for an unknown route."""
    if route not in get_args(Route):
        raise HyperparameterError(
            explain("unknown route.", got=repr(route), wanted=" or ".join(map(repr, get_args(Route))))
        )


def way_of(fn: Model, route: Route, only: Sequence[str] | None, plan: Plan | None = None) -> Finder:
    """The way that a route takes. Raises HyperparameterError for an unknown route."""
    known(route)
    tape = _tape(fn, only, plan)
    others = _others(fn, only)
    refused: set[Finding] = set()

    def vmap(params: PyTree, inputs: Any) -> Way:
        found = others(params, inputs, proof=True)
        if found.unmapped:
            raise CaptureError(
                explain(
                    "torch.func.vmap cannot take the model one example after the other.",
                    got=found.unmapped,
                    options="route='loop', slow and for any model; or route='tape'",
                )
            )
        return found.mapped

    def auto(params: PyTree, inputs: Any) -> Way:
        if refused and (found := others(params, inputs, proof=True)).finding in refused:
            return found.best[1]
        try:
            return tape(params, inputs)
        except Exception as error:
            if torch.compiler.is_compiling() or (isinstance(error, KFacError) and not isinstance(error, CaptureError)):
                raise
            why = " ".join(str(error).split("\n  options")[0].split())
        found = others(params, inputs, proof=True)
        name, way = found.best
        if not refused:
            warn(_stepped_down(name, why, found.unmapped))
        refused.add(found.finding)
        return way

    ways = {"tape": tape, "vmap": vmap, "auto": auto}
    return ways.get(route, lambda params, inputs: others(params, inputs, proof=False).looped)


def _stepped_down(name: str, why: str, unmapped: str) -> str:
    return explain(
        f"the tape cannot take this model, so its examples go by route={name!r}.",
        tape=why,
        vmap=unmapped or None,
        options=f"route={name!r}, which says nothing; or only=, without what the tape cannot see",
    )


def _tape(fn: Model, only: Sequence[str] | None, plan: Plan | None) -> Finder:
    planned = planner(fn, strict=False, only=only)

    def find(params: PyTree, inputs: Any) -> Way:
        try:
            return taped(fn, only, planned(params, inputs) if plan is None else plan)
        except CaptureError as error:
            raise type(error)(
                f"{error}\n  or       route='vmap' or 'loop', without the tape; 'auto' takes the first that can"
            ) from error

    return find


def _others(fn: Model, only: Sequence[str] | None) -> Callable[..., Others]:
    found = finder(fn)
    proofs: dict[Finding, str] = {}

    def others(params: PyTree, inputs: Any, *, proof: bool) -> Others:
        checked_leaves(params if only is None else restricted(fn, params, chosen_leaves(params, only))[1])
        finding = found(params, inputs)
        apart(finding.mixing)
        ways = mapped(fn, only, finding.cut), looped(fn, only, finding.cut)
        if proof and finding not in proofs:
            with contextlib.suppress(BatchError):  # of a NaN, which the batch itself has too
                proofs[finding] = _unmapped(*ways, params, inputs)
        return Others(finding, *ways, proofs.get(finding, ""))

    return others


def _unmapped(by_vmap: Way, by_loop: Way, params: PyTree, inputs: Any) -> str:
    """Why a vmap cannot take the model, by its numbers for two examples; "" if it can."""
    if by_vmap.cut.whole:
        return "a batch that cannot be cut (whole=True)"
    few = by_vmap.cut.part(inputs, 0, 2)
    with same_draws(_tree.leaves(params)) as again:
        run = again(lambda: by_loop.run(params, few))
        ramp = torch.ones_like(run.outputs).flatten().cumsum(0).reshape(run.outputs.shape)
        c = torch.stack([(k * ramp).sin() for k in range(1, 4)])  # three of two, so that sizes mean something
        wanted = run.rows(c)[0]
        try:
            got = again(lambda: by_vmap.run(params, few)).rows(c)[0]
        except BatchError:
            raise
        except KFacError as error:
            return str(error).splitlines()[0]
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    for path, rows in wanted.items():
        one, two = plain(got[path].left), plain(rows.left)
        eps = 2**12 * torch.finfo(two.dtype).eps
        if not torch.allclose(one, two, rtol=eps, atol=eps * float(two.abs().max()) if two.numel() else 0.0):
            return f"other numbers for {path!r} on one example than on two"
    return ""
