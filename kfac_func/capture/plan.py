"""The static half of capture: which uses there are, what kind they have, and which parameters they claim.

A plan is made from two runs of the model on one and on two examples: the dimension of a use's output that grows is
where its examples are. A use that does not grow (a position embedding of `arange(T)`) is shared by all examples. A
plan does not depend on the batch size.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as _wrapped

from kfac_func import _tree, layers
from kfac_func._errors import BatchError, CaptureError, explain
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import Layout, UseRule, Where
from kfac_func.capture.coverage import Policy, Unclaimed, check_policies, choose
from kfac_func.capture.tape import Watch
from kfac_func.layers import Found


class TapRule(NamedTuple):
    """One recorded call: what it must be again, and its output for one example."""

    path: str
    kind: str
    shape: tuple[int, ...]
    where: Where | None
    dtype: torch.dtype
    device: torch.device


class PlannedBlock(NamedTuple):
    """A block and its uses: the number of the tap and the rule, in the order of the run."""

    layout: Layout
    uses: tuple[tuple[int, UseRule], ...]


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


def batch_size(inputs: Any) -> int:
    """N: the first dimension of the first tensor of the inputs. Raises BatchError when there is none or it is 0."""
    tensors = [leaf for leaf in _tree.leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].ndim == 0 or tensors[0].shape[0] == 0:
        raise BatchError(
            explain(
                "the batch has no examples.",
                got=f"inputs {list(tensors[0].shape)}" if tensors else "inputs without a tensor",
                wanted="tensors with the examples in the first dimension, at least one",
            )
        )
    return tensors[0].shape[0]


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
        one, strays = _run(fn, params, leaves, _examples(inputs, count, 1))
        two, _ = _run(fn, params, leaves, _examples(inputs, count, 2))
    if [(f.kind, f.weight, f.bias) for f in one] != [(f.kind, f.weight, f.bias) for f in two]:
        raise CaptureError(
            explain(
                "the model uses other parameters for one example than for two.",
                why="what is recorded must not depend on the batch",
                options="make the control flow independent of the batch size",
            )
        )
    paths = tuple(leaves)
    chosen = choose(paths, strays, rules, strict)
    for found in one:  # a bias goes with its weight
        if found.bias is not None and found.weight is not None and found.weight.path in chosen:
            chosen.setdefault(found.bias.path, chosen[found.weight.path])
    kept = [
        (a._replace(bias=_unless(a.bias, chosen)), b, _where(a, b))
        for a, b in zip(one, two, strict=True)
        if not any(ref.path in chosen for ref in (a.weight or a.bias,) if ref is not None)
    ]
    taps = tuple(
        TapRule(
            _owner(found), found.kind.name, tuple(found.output.shape), where, found.output.dtype, found.output.device
        )
        for found, _, where in kept
    )
    blocks = tuple(_blocks([(found, where) for found, _, where in kept]))
    claimed = {path for block in blocks for path in block.layout.leaves}
    unused = tuple(path for path in paths if path not in claimed and path not in chosen)
    return Plan(paths, taps, blocks, tuple(chosen.items()), unused)


def _owner(found: Found) -> str:
    ref = found.weight or found.bias
    assert ref is not None
    return ref.path


def _unless(ref: layers.Ref | None, chosen: dict[str, Policy]) -> layers.Ref | None:
    return None if ref is None or ref.path in chosen else ref


def _run(fn: Model, params: PyTree, leaves: dict[str, Tensor], inputs: Any) -> tuple[list[Found], dict[str, list[str]]]:
    watch = Watch(leaves, lambda _, found: found.output)
    with torch.no_grad(), watch:
        fn(params, inputs)
    strays: dict[str, list[str]] = {}
    for path, op in watch.strays:
        strays.setdefault(path, []).append(op)
    return watch.found, strays


def _examples(inputs: Any, count: int, wanted: int) -> Any:
    """The first example of a batch, or the first two (the first one twice in a batch of one)."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != count:
            return leaf
        return leaf[:wanted] if count >= wanted else torch.cat([leaf[:1]] * wanted)

    return _tree.tree_map(take, inputs)


@contextlib.contextmanager
def _generators_kept(leaves: dict[str, Tensor]) -> Any:
    """Dropout in the runs above must not advance the global generators."""
    if torch.compiler.is_compiling():
        yield
        return
    devices = {leaf.device for leaf in leaves.values() if leaf.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        yield


def _where(one: Found, two: Found) -> Where | None:
    a, b = one.output.shape, two.output.shape
    grown = [d for d in range(len(a)) if a[d] != b[d]]
    if not grown:
        return None
    if len(a) == len(b) and len(grown) == 1 and b[grown[0]] == 2 * a[grown[0]]:
        if _interleaved(one.output, two.output, grown[0]):
            raise CaptureError(
                explain(
                    f"the examples are interleaved in the input of {one.kind.name} with {_owner(one)!r}.",
                    got="consecutive rows belong to different examples (positions first, then examples)",
                    wanted="a dimension of their own for the examples, or all rows of one example together",
                    options="flatten [examples, positions, ...], not [positions, examples, ...]; or do not flatten",
                )
            )
        return Where(grown[0], a[grown[0]])
    raise CaptureError(
        explain(
            f"the examples cannot be found in the output of {one.kind.name} with {_owner(one)!r}.",
            got=f"{list(a)} for one example, {list(b)} for two",
            wanted="one dimension that is proportional to the number of examples",
            options="keep the examples in one dimension; or leave the parameter unclaimed",
        )
    )


def _interleaved(one: Tensor, two: Tensor, dim: int) -> bool:
    """Whether every second of the folded rows, and not the first half, is the first example. Not asked of traced
    tensors.
    """
    fold = one.shape[dim]
    if fold == 1 or torch.compiler.is_compiling() or _wrapped(two):
        return False
    own = one.movedim(dim, 0)
    both = two.movedim(dim, 0)
    return bool((both[::2] - own).norm() < (both[:fold] - own).norm())


def _blocks(uses: list[tuple[Found, Where | None]]) -> list[PlannedBlock]:
    """Group the uses by weight; a bias joins its weight when it belongs to that weight alone, else it is a block of
    its own.
    """
    owners: dict[str, list[int]] = {}
    for index, (found, _) in enumerate(uses):
        owners.setdefault(_owner(found), []).append(index)
    partners: dict[str, set[str | None]] = {}  # of a bias
    for found, _ in uses:
        if found.bias is not None:
            partners.setdefault(found.bias.path, set()).add(None if found.weight is None else found.weight.path)
    blocks, lone = [], {}
    for name, indices in owners.items():
        mine = [uses[index] for index in indices]
        biases = {None if found.bias is None else found.bias.path for found, _ in mine}
        joint = len(biases) == 1 and all(len(partners[b]) == 1 for b in biases if b is not None)
        base = next((f for f, _ in mine if f.kind.name != "embedding"), mine[0][0])
        turned = [_transposed(base, found, name) for found, _ in mine]
        joint = joint and not any(turned)
        layout = _layout(name, base, biases.pop() if joint else None)
        rules = [
            UseRule(f.kind, f.options, w, f.positions, f.outputs, t) for (f, w), t in zip(mine, turned, strict=True)
        ]
        blocks.append(PlannedBlock(layout, tuple(zip(indices, rules, strict=True))))
        for index in [] if joint else indices:
            found, where = uses[index]
            if found.bias is not None:
                rule = UseRule(layers.bias, (False,), where, found.positions, found.outputs)
                lone.setdefault(found.bias.path, (found, []))[1].append((index, rule))
    return blocks + [PlannedBlock(_lone_layout(found, name), tuple(rules)) for name, (found, rules) in lone.items()]


def _layout(name: str, found: Found, bias: str | None) -> Layout:
    own = found.weight or found.bias
    assert own is not None
    weight = None if found.weight is None else name
    matrix = found.kind.rows is not None
    return Layout(name, found.kind.name, weight, bias, own.shape, found.order, found.groups, found.outputs, matrix)


def _lone_layout(found: Found, name: str) -> Layout:
    assert found.bias is not None
    if found.kind.rows is None or found.groups > 1 or found.kind.name == "conv":
        raise CaptureError(
            explain(
                f"bias {name!r} of {found.kind.name} is used with several weights, or its weight with several biases.",
                options=f"give every weight a bias of its own; or unclaimed={{{name!r}: 'diagonal'}}",
            )
        )
    return Layout(name, "bias", None, name, found.bias.shape, (), 1, found.outputs)


def _transposed(base: Found, found: Found, name: str) -> bool:
    """Whether a use sees the transpose of the block's matrix. Raises CaptureError when two uses do not fit each other
    at all.
    """
    if (found.order, found.groups, found.kind.rows is None) == (base.order, base.groups, base.kind.rows is None):
        return False
    if found.groups == base.groups == 1 and len(base.order) == 2 and found.order == base.order[::-1]:
        return True
    raise CaptureError(
        explain(
            f"parameter {name!r} is used by {base.kind.name} and by {found.kind.name}: they do not form one block.",
            options=f"use two parameters; or unclaimed={{{name!r}: 'diagonal'}}",
        )
    )
