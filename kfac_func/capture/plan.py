"""The static half of capture: which uses there are, what kind they have, and which parameters they claim.

A plan is made from two runs of the model on one and on two examples: the dimension of a use's output that grows is
where its examples are. A use that does not grow (a position embedding of `arange(T)`) is shared by all examples. A plan
does not depend on the batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree, layers
from kfac_func._errors import CaptureError, explain
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import Where
from kfac_func.capture.coverage import Policy, Unclaimed, check_policies, choose
from kfac_func.capture.examples import batch_size, examples, where_examples
from kfac_func.capture.grouping import PlannedBlock, group, owner, signature
from kfac_func.capture.tape import Watch
from kfac_func.layers import Found


class TapRule(NamedTuple):
    """One recorded call: what it must be again, and its output for one example."""

    use: Hashable  # `signature` of the use
    shape: tuple[int, ...]
    where: Where | None
    dtype: torch.dtype
    device: torch.device
    copied: bool  # its result is written in place later


class Plan(NamedTuple):
    """What is captured, hashable. `unclaimed` gives the policy of leaves without a kind; `unused` lists leaves never
    read.
    """

    paths: tuple[str, ...]
    taps: tuple[TapRule, ...]
    blocks: tuple[PlannedBlock, ...]
    unclaimed: tuple[tuple[str, Policy], ...]
    unused: tuple[str, ...]

    @property
    def claimed(self) -> frozenset[str]:
        """The paths of the leaves that blocks own."""
        return frozenset(path for block in self.blocks for path in block.layout.leaves)

    @property
    def shared(self) -> bool:
        """Whether a use is shared by all examples or a leaf's diagonal is wanted, so that vectors need a mean of
        zero.
        """
        return any(tap.where is None for tap in self.taps) or any(policy == "diagonal" for _, policy in self.unclaimed)


def make_plan(
    fn: Model, params: PyTree, inputs: Any, *, strict: bool = True, unclaimed: Unclaimed | None = None
) -> Plan:
    """Find the uses of all parameters of `fn(params, inputs)`.

    strict      raise UncapturedParameterError for a parameter used where no layer kind can see it (False: leave it
                unpreconditioned)
    unclaimed   the policy "diagonal" or "identity" of such parameters: one for all, or by path or pattern {"head.*":
                "diagonal"}

    Costs two runs of the model on one and two examples; random number generators are left as they were.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> [block.layout.kind for block in kf.make_plan(fn, params, torch.ones(5, 3)).blocks]
        ['linear']
    """
    leaves = _tree.unique_paths(params)
    count = batch_size(inputs)
    rules = check_policies(unclaimed or {})
    with _generators_kept(leaves):
        one = _run(fn, params, leaves, examples(inputs, count, 1))
        two = _run(fn, params, leaves, examples(inputs, count, 2))
    if [(f.kind, f.weight, f.bias) for f in one.found] != [(f.kind, f.weight, f.bias) for f in two.found]:
        raise CaptureError(
            explain(
                "the model uses other parameters for one example than for two.",
                why="what is recorded must not depend on the batch",
                options="make the control flow independent of the batch size",
            )
        )
    paths = tuple(leaves)
    chosen = choose(paths, one.uncaptured(), rules, strict)
    for found in one.found:  # a bias goes with its weight
        if found.bias is not None and found.weight is not None and found.weight.path in chosen:
            chosen.setdefault(found.bias.path, chosen[found.weight.path])
    taps: list[TapRule] = []
    uses: list[tuple[Found, Where | None]] = []
    written = one.written()
    for found, larger, marks in zip(one.found, two.found, written, strict=True):
        if owner(found) in chosen:
            continue
        where = where_examples(found, larger)
        found = found._replace(bias=_unless(found.bias, chosen))
        uses.append((found, where))
        taps.append(_tap_rule(found, where, *marks))
    blocks = tuple(group(uses))
    claimed = {path for block in blocks for path in block.layout.leaves}
    unused = tuple(path for path in paths if path not in claimed and path not in chosen)
    return Plan(paths, tuple(taps), blocks, tuple(chosen.items()), unused)


def _tap_rule(found: Found, where: Where | None, input_written: bool, result_written: bool) -> TapRule:
    if input_written:
        raise CaptureError(
            explain(
                f"the input of {found.kind.name} with {owner(found)!r} is written in place after it was read.",
                why="its curvature and weight gradient need the values that the layer saw",
                options="write out of place: x = x + y, not x += y",
            )
        )
    out = found.output
    return TapRule(signature(found), tuple(out.shape), where, out.dtype, out.device, result_written)


def _unless(ref: layers.Ref | None, chosen: dict[str, Policy]) -> layers.Ref | None:
    return None if ref is None or ref.path in chosen else ref


def _run(fn: Model, params: PyTree, leaves: dict[str, Tensor], inputs: Any) -> Watch:
    watch = Watch(leaves, lambda _, found: found.output)
    with torch.no_grad(), watch:
        fn(params, inputs)
    return watch


@contextlib.contextmanager
def _generators_kept(leaves: dict[str, Tensor]) -> Any:
    """Dropout in the runs above must not advance the global generators."""
    if torch.compiler.is_compiling():
        yield
        return
    devices = {leaf.device for leaf in leaves.values() if leaf.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        yield
