"""The claim of the demo, in steps: K-FAC needs at most half of Adam's. Seconds are for the demo itself to show."""

from __future__ import annotations

import pytest

from kfac_func.demo.run import SETTINGS, problems
from kfac_func.demo.training import Budget, train


@pytest.mark.parametrize("name", ["digits", pytest.param("curves", marks=pytest.mark.slow)])
def test_kfac_reaches_the_final_loss_of_adam_in_half_of_the_steps(name):
    problem = problems(name)[0]
    kfac, adam = (method for method in SETTINGS[name] if method.name in ("K-FAC", "Adam"))
    assert (kfac.name, adam.name) == ("K-FAC", "Adam")
    ours = train(problem, kfac, Budget(problem.steps // 2))
    theirs = train(problem, adam, Budget(problem.steps))
    assert ours.steps[-1] == problem.steps // 2
    assert theirs.steps[-1] == problem.steps
    assert ours.losses[-1] <= theirs.losses[-1] < theirs.losses[0] / 2
