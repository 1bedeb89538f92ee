"""Statistics in a checkpoint: `torch.load(weights_only=True)` makes tuples of tensors and plain values, and calls no
function that it does not know. So a layer kind, which is a tuple of functions, is stored by its name.
"""

from __future__ import annotations

import copyreg
from types import ModuleType

import torch

from kfac_func import layers
from kfac_func._errors import StateError, explain
from kfac_func._tree import storable
from kfac_func.blocks import Kind, Layout, Part, Thin, UseRule, Where
from kfac_func.capture.examples import Cut
from kfac_func.capture.grouping import PlannedBlock
from kfac_func.capture.plan import Plan, TapRule
from kfac_func.estimators.stats import Gradient, Stats, StatsRules
from kfac_func.layers import Ref

KINDS = {
    f"{room}.{name}": kind
    for room, module in vars(layers).items()
    if isinstance(module, ModuleType)
    for name, kind in vars(module).items()
    if isinstance(kind, Kind)
}
"""Every kind under the name of its module and its own."""


def kind_named(place: str, name: str) -> Kind:
    """The kind of that place under the name that its use gave it.

    >>> kind_named("base.dense", "linear").name
    'linear'
    """
    if place not in KINDS:
        raise StateError(
            explain(
                f"a layer kind {place!r} of these statistics is unknown.",
                why="they were stored by another version of this library",
                wanted=", ".join(KINDS),
                options="go on from a state that was saved right after a step",
            )
        )
    return KINDS[place]._replace(name=name)


def _by_name(kind: Kind) -> tuple:
    place = next((place for place, base in KINDS.items() if base._replace(name=kind.name) == kind), None)
    if place is None:
        raise StateError(
            explain(
                f"statistics of the layer kind {kind.name!r} cannot be stored.",
                why="it is made of functions, and no module of layers holds it",
                options="save the state right after a step, when no statistics are pending",
            )
        )
    return kind_named, (place, kind.name)


copyreg.pickle(Kind, _by_name)  # pyright: ignore[reportArgumentType]
storable(Stats, Gradient, StatsRules, Plan, Cut, PlannedBlock, TapRule, UseRule, Part, Where, Ref, Layout, Thin)
torch.serialization.add_safe_globals([kind_named])
