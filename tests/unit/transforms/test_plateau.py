"""The scale that falls on a plateau, against the rule written with ifs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kfac_func._errors import HyperparameterError
from kfac_func.transforms import chain, reduce_on_plateau, sgd
from tests.unit.transforms.problem import PARAMS, close, passed, reloaded

G = torch.Generator().manual_seed(0)
LOSSES = [(2.0 ** -(k / 4) if k < 20 else 0.03) + 0.02 * torch.rand((), generator=G).item() for k in range(60)]


def scales(values, factor=0.1, patience=10, rtol=1e-4, atol=0.0, cooldown=0, accumulation_size=1, min_scale=0.0):
    """As torch.optim's scheduler and optax.contrib do it, one value at a time."""
    scale, best, bad, cooling, gathered, found = 1.0, math.inf, 0, 0, [], []
    for value in values:
        gathered.append(value)
        if len(gathered) == accumulation_size:
            mean, gathered = sum(gathered) / accumulation_size, []
            if mean < (1 - rtol) * best - atol:
                best, bad = mean, 0
            else:
                bad += 1
            if cooling > 0:
                cooling, bad = cooling - 1, 0
            elif bad == patience:
                scale, bad, cooling = max(scale * factor, min_scale), 0, cooldown
        found.append(scale)
    return found


CASES = {
    "default": {},
    "impatient": {"patience": 2, "factor": 0.5},
    "cooldown": {"patience": 1, "cooldown": 3, "factor": 0.7},
    "means": {"accumulation_size": 4, "patience": 2},
    "absolute": {"rtol": 0.0, "atol": 0.1, "patience": 3},
    "relative": {"rtol": 0.3, "patience": 2},
    "floor": {"patience": 2, "min_scale": 0.05},
}


def followed(tx, values):
    state, found = tx.init(PARAMS), []
    for value in values:
        updates, state = tx.update({"w": torch.ones(2, dtype=torch.float64)}, state, value=value)
        found.append(updates["w"][0])
    return torch.stack(found), state


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_scale_follows_the_rule(options):
    wanted = torch.tensor(scales(LOSSES, **options), dtype=torch.float64)
    assert len(wanted.unique()) > 1
    close(followed(reduce_on_plateau(**options), LOSSES)[0], wanted)
    tensors: Any = {
        name: torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for name, x in options.items()
    }
    got, state = followed(reduce_on_plateau(**tensors), [torch.tensor(loss) for loss in LOSSES[:30]])
    close(got, wanted[:30])
    close(reloaded(state), state, 0)


def test_a_value_that_is_not_a_number_is_no_progress():
    got, state = followed(reduce_on_plateau(patience=2, accumulation_size=2), [1.0, 1.0, math.nan, 0.0, math.nan, 0.0])
    assert got.tolist() == [1.0] * 5 + [0.1]
    assert (state.best_value.item(), state.avg_value.item()) == (1.0, 0.0)
    assert followed(reduce_on_plateau(), [0.5])[1].best_value.item() == 0.5


def test_every_member_of_an_ensemble_has_its_own_scale():
    losses = torch.stack([torch.tensor(LOSSES), torch.tensor(LOSSES).flip(0)], 1).double()
    tx = reduce_on_plateau(patience=2)
    together = torch.func.vmap(lambda values: followed(tx, values)[0], in_dims=1, out_dims=1)(losses)
    for i in range(2):
        close(together[:, i], torch.tensor(scales(losses[:, i].tolist(), patience=2), dtype=torch.float64))


def test_gradients_flow_through_the_factor_and_not_into_the_value():
    def total(factor, value):
        return followed(reduce_on_plateau(factor, patience=1), [value] * 3)[0].sum()

    half, one = torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.0, requires_grad=True)
    assert torch.func.grad(total)(half, 1.0).item() == 1 + 2 * 0.5
    assert not followed(reduce_on_plateau(), [one])[1].best_value.requires_grad


@pytest.mark.parametrize("value", [None, torch.ones(2), "low"])
def test_a_value_is_needed(value):
    tx = chain(sgd(0.1), reduce_on_plateau())
    grads, _ = passed()
    with pytest.raises(HyperparameterError, match=r"reduce_on_plateau needs the value(.|\n)*value=loss"):
        tx.update(grads, tx.init(PARAMS), PARAMS, value=value)


@pytest.mark.parametrize("options", [{"patience": 0}, {"accumulation_size": 0}, {"cooldown": -1}])
def test_counts_without_meaning_are_refused(options):
    with pytest.raises(HyperparameterError, match=rf"{next(iter(options))} must be at least"):
        reduce_on_plateau(**options)
