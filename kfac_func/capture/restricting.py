"""A model as a function of some of its parameters, the others being constants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import HyperparameterError, explain
from kfac_func._patterns import chosen
from kfac_func._typing import Model, PyTree
from kfac_func.capture.batched import rules_of


def chosen_leaves(params: PyTree, only: Sequence[str] | None) -> tuple[str, ...]:
    """The paths that a pattern matches, all for None. Raises HyperparameterError for a pattern without a leaf, and when
    there is none at all.

    >>> chosen_leaves({"body": {"w": torch.ones(2)}, "head": {"w": torch.ones(2)}}, ["head.*"])
    ('head.w',)
    """
    found = chosen(only, _tree.unique_paths(params), "only")
    if not found:
        raise HyperparameterError(explain("only= chooses no parameter.", got=only, options="None for all of them"))
    return tuple(found)


def restricted(fn: Model, params: PyTree, paths: Iterable[str]) -> tuple[Model, dict[str, Tensor]]:
    """The model as a function of some leaves, the others fixed, and these leaves by path.

    >>> fn, some = restricted(lambda p, x: x @ p["a"] @ p["b"], {"a": torch.eye(2), "b": torch.ones(2, 1)}, ["b"])
    >>> list(some), fn({"b": torch.zeros(2, 1)}, torch.ones(1, 2))
    (['b'], tensor([[0.]]))
    """
    leaves, rules = _tree.unique_paths(params), rules_of(fn)

    def moved(some: dict[str, Tensor], inputs: Any) -> Any:
        return rules.fn(_tree.replace_leaves(params, some), inputs)

    return replace(rules, fn=moved), {path: leaves[path] for path in paths}
