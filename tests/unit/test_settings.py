"""The settings of `kfac` inside torch.func and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kfac_func as kf
from kfac_func import _tree
from tests.unit.test_precondition import GRADS, LATER, PARAMS, STATS, same

TRACED: dict[str, Any] = {
    "average": "constant",
    "burn_in": 1,
    "decay": 0.5,
    "l2": 0.1,
    "l2_mask": "0.*",
    "stagger": True,
}


def traced(options: dict[str, Any]) -> Any:
    """Three updates that ask for their refreshes, with micro-batches, as a function of gradients and parameters."""
    tx = kf.kfac(damping={"0.*": 0.2, "**": 0.1}, **options)

    def steps(grads: dict, params: dict) -> tuple[list, Any]:
        state, found = tx.init(params), []
        for stats, refresh in ((STATS, None), ((STATS, LATER[1]), True), (None, False)):
            updates, state = tx.update(grads, state, params, stats=stats, refresh=refresh)
            found.append(updates)
        return found, state

    return steps


def test_every_setting_works_under_vmap():
    many = {name: torch.stack([c * v for c in (1.0, 2.5)]) for name, v in GRADS.items()}
    found, state = torch.func.vmap(traced(TRACED), in_dims=(0, None))(many, PARAMS)
    for k, c in enumerate((1.0, 2.5)):
        wanted, alone = traced(TRACED)({name: c * v for name, v in GRADS.items()}, PARAMS)
        torch.testing.assert_close([_tree.tree_map(lambda x, k=k: x[k], one) for one in found], wanted)
        torch.testing.assert_close([leaf[k] for leaf in _tree.leaves(state)], _tree.leaves(alone))
    same(found[0], many)
    assert not torch.allclose(found[1]["0.weight"], many["0.weight"])


@pytest.mark.compile
def test_every_setting_compiles_in_one_graph():
    tx = kf.kfac(damping=0.1, **TRACED)
    _, state = tx.update(GRADS, tx.init(PARAMS), stats=STATS)
    torch._dynamo.reset()

    def step(state: Any) -> Any:
        updates, state = tx.update(GRADS, state, stats=(STATS, LATER[1]), refresh=True)
        return updates, state

    found, wanted = torch.compile(step, fullgraph=True, backend="eager")(state), step(state)
    torch.testing.assert_close(_tree.leaves(found), _tree.leaves(wanted), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decay", [1.0, -0.1, torch.ones(2), "slow"], ids=["one", "negative", "two", "word"])
@pytest.mark.usefixtures("unchecked")
def test_a_decay_without_meaning_is_refused(decay: Any):
    with pytest.raises(kf.errors.HyperparameterError, match=r"(?s)decay .*\[0, 1\)"):
        kf.kfac(decay=decay)
