"""Parameters that hang on what autograd recorded before: those of modules, and those of the step before."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import explain, warn
from kfac_func._tracing import readable, settled
from kfac_func._typing import PyTree


def settling() -> Callable[[PyTree], PyTree]:
    """A function that takes the parameters of a module off the graph, and warns once when a run hangs every step on the
    one before: parameters that require grad came first, and what was made of them by autograd comes now.

    >>> settle = settling()
    >>> settle({"w": torch.nn.Parameter(torch.ones(1))})
    {'w': tensor([1.])}
    """
    began, warned = [], []

    def settle(params: PyTree) -> PyTree:
        params = _tree.tree_map(settled, params)
        recorded = [x for x in _tree.leaves(params) if isinstance(x, Tensor) and readable(x) and x.requires_grad]
        if any(x.is_leaf for x in recorded):
            began.append(True)
        if began and not warned and any(not x.is_leaf for x in recorded):
            warned.append(True)
            warn(
                explain(
                    "the parameters of this step hold the graph of the step before.",
                    why="the first ones had requires_grad=True, so that autograd records all steps and frees none",
                    options="{name: p.detach() for name, p in params.items()} once, before the first step; or leave it "
                    "as it is where gradients through many steps are wanted",
                )
            )
        return params

    return settle
