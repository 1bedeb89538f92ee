"""From recognised uses to blocks: one per weight, with the bias that belongs to it alone."""

from __future__ import annotations

from typing import NamedTuple

from kfac_func import layers
from kfac_func._errors import CaptureError, explain
from kfac_func.blocks import Layout, Part, UseRule, Where
from kfac_func.layers import Found, Ref


class PlannedBlock(NamedTuple):
    """A block and its uses: the number of the tap and the rule, in the order of the run."""

    layout: Layout
    uses: tuple[tuple[int, UseRule], ...]


def owner(found: Found) -> str:
    """The path of the weight of a use (of its bias, when it has no weight)."""
    ref = found.weight or found.bias
    assert ref is not None
    return ref.path


def _alone(found: Found) -> bool:
    """Whether this is the use of a bias whose weight is no parameter."""
    return found.weight is None and found.kind.rows is not None


def _own(bias: Ref) -> Part:
    """The rows of a lone bias that a use sees."""
    return Part(bias.place(0)) if len(bias.shape) == 1 else Part()


def _beside(found: Found) -> bool:
    """Whether the bias of a use stands beside the very rows of the weight that it sees."""
    if found.bias is None or found.kind.rows is None:
        return True
    return found.part.rows == found.bias.place(0) and (found.part.rows is None or len(found.bias.shape) == 1)


def signature(found: Found) -> tuple:
    """What a use must be again: its kind, its options and its parameters with the way it reads them."""
    return found.kind.name, found.options, found.weight, found.bias, found.order, found.groups, found.outputs


def group(uses: dict[int, tuple[Found, Where | None]]) -> list[PlannedBlock]:
    """Group the uses, given by the numbers of their taps, by weight; a bias joins its weight when it belongs to that
    weight alone, else it is a block of its own.
    """
    owners: dict[str, list[int]] = {}
    for index, (found, _) in uses.items():
        if not _alone(found):
            owners.setdefault(owner(found), []).append(index)
    partners: dict[str, set[str | None]] = {}  # of a bias
    for found, _ in uses.values():
        if found.bias is not None:
            partners.setdefault(found.bias.path, set()).add(None if found.weight is None else found.weight.path)
    blocks, lone = [], {}
    for index, (found, where) in uses.items():
        if _alone(found) and found.bias is not None:
            rule = UseRule(
                found.kind, found.options, where, found.positions, found.bias.shape[0], part=_own(found.bias)
            )
            lone.setdefault(found.bias.path, (found, []))[1].append((index, rule))
    for name, indices in owners.items():
        mine = [uses[index] for index in indices]
        biases = {None if found.bias is None else found.bias.path for found, _ in mine}
        joint = len(biases) == 1 and all(len(partners[b]) == 1 for b in biases if b is not None)
        base = next((f for f, _ in mine if f.kind.name != "embedding"), mine[0][0])
        turned = [_transposed(base, found, name) for found, _ in mine]
        joint = joint and not any(turned) and all(_beside(f) for f, _ in mine)
        layout = _layout(name, base, biases.pop() if joint else None)
        rules = [
            UseRule(f.kind, f.options, w, f.positions, f.outputs, t, f.part)
            for (f, w), t in zip(mine, turned, strict=True)
        ]
        blocks.append(PlannedBlock(layout, tuple(zip(indices, rules, strict=True))))
        for index in [] if joint else indices:
            found, where = uses[index]
            if found.bias is not None:
                width, part = found.bias.shape[0], _own(found.bias)
                rule = UseRule(layers.bias, (False,), where, found.positions, width, part=part)
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
    if found.kind.rows is None or found.groups > 1 or found.kind.name.startswith("conv"):
        raise CaptureError(
            explain(
                f"bias {name!r} of {found.kind.name} is used with several weights, or its weight with several biases.",
                options=f"give every weight a bias of its own; or unclaimed={{{name!r}: 'diagonal'}}",
            )
        )
    return Layout(name, "bias", None, name, found.bias.shape, (), 1, found.bias.shape[0])


def _transposed(base: Found, found: Found, name: str) -> bool:
    """Whether a use sees the transpose of the block's matrix. Raises CaptureError when two uses do not fit each other
    at all.
    """
    one, two = (
        (use.order, use.groups, use.kind.rows is None, None if use.weight is None else use.weight.shape)
        for use in (found, base)
    )
    if one == two:
        return False
    if found.groups == base.groups == 1 and len(base.order) == 2 and found.order == base.order[::-1]:
        return True
    raise CaptureError(
        explain(
            f"parameter {name!r} is used by {base.kind.name} and by {found.kind.name}: they do not form one block.",
            options=f"use two parameters; or unclaimed={{{name!r}: 'diagonal'}}",
        )
    )
