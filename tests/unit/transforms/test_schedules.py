"""Values, boundaries, and that schedules are tensor functions of the count and of their parameters."""

from __future__ import annotations

import math

import pytest
import torch

from kfac_func._errors import HyperparameterError
from kfac_func.transforms import schedules as s

WARM = s.join([s.linear_warmup(0.0, 1.0, 4), s.cosine_decay(1.0, 10)], [4])

VALUES = [
    ("constant", s.constant(0.3), {0: 0.3, 99: 0.3}),
    ("exponential", s.exponential_decay(2.0, 0.5), {0: 2.0, 1: 1.0, 3: 0.25}),
    ("exponential_slow", s.exponential_decay(2.0, 0.25, transition_steps=2), {1: 1.0, 2: 0.5}),
    ("staircase", s.exponential_decay(2.0, 0.5, 3, staircase=True), {0: 2.0, 2: 2.0, 3: 1.0, 5: 1.0, 6: 0.5}),
    ("bounded_below", s.exponential_decay(2.0, 0.5, end_value=0.6), {1: 1.0, 2: 0.6, 9: 0.6}),
    ("bounded_above", s.exponential_decay(2.0, 2.0, end_value=5.0), {0: 2.0, 1: 4.0, 2: 5.0, 9: 5.0}),
    ("cosine", s.cosine_decay(2.0, 8), {0: 2.0, 2: 1 + math.sqrt(0.5), 4: 1.0, 8: 0.0, 20: 0.0}),
    ("cosine_alpha", s.cosine_decay(2.0, 8, alpha=0.1), {0: 2.0, 4: 1.1, 8: 0.2, 20: 0.2}),
    ("warmup", s.linear_warmup(0.2, 1.0, 4), {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 50: 1.0}),
    ("cooldown", s.linear_warmup(1.0, 0.1, 3), {0: 1.0, 1: 0.7, 3: 0.1, 4: 0.1}),
    ("multistep", s.multistep(1.0, {3: 0.5, 5: 0.1}), {0: 1.0, 2: 1.0, 3: 0.5, 4: 0.5, 5: 0.05, 9: 0.05}),
    ("multistep_empty", s.multistep(0.7, {}), {0: 0.7, 9: 0.7}),
    ("join", WARM, {0: 0.0, 3: 0.75, 4: 1.0, 9: 0.5, 14: 0.0, 30: 0.0}),
    ("join_three", s.join([s.constant(c) for c in (1.0, 2.0, 3.0)], [2, 5]), {0: 1.0, 1: 1.0, 2: 2.0, 4: 2.0, 5: 3.0}),
    ("join_one", s.join([s.constant(1.0)], []), {0: 1.0, 5: 1.0}),
]

each_schedule = pytest.mark.parametrize(
    ("schedule", "values"), [row[1:] for row in VALUES], ids=[row[0] for row in VALUES]
)


@each_schedule
def test_values_and_boundaries(schedule, values):
    for count, wanted in values.items():
        for argument in (count, torch.tensor(count)):
            got = schedule(argument)
            assert (got.shape, got.dtype) == ((), torch.float64)
            assert got.item() == pytest.approx(wanted, rel=1e-14, abs=1e-15)


@each_schedule
def test_vmap_over_counts(schedule, values):
    counts = torch.tensor(list(values))
    got = torch.func.vmap(schedule)(counts)
    torch.testing.assert_close(got, torch.tensor(list(values.values()), dtype=torch.float64), rtol=1e-14, atol=1e-15)


def test_warmup_meets_its_ends_exactly():
    schedule = s.linear_warmup(0.2, 0.9, 7)
    assert (schedule(0).item(), schedule(7).item(), schedule(8).item()) == (0.2, 0.9, 0.9)


MAKERS = {
    "constant": s.constant,
    "exponential_init": lambda x: s.exponential_decay(x, 0.5, 3),
    "exponential_rate": lambda x: s.exponential_decay(0.3, x, 3),
    "exponential_end": lambda x: s.exponential_decay(2.0, 0.1, end_value=x),
    "cosine_init": lambda x: s.cosine_decay(x, 9, 0.2),
    "cosine_alpha": lambda x: s.cosine_decay(0.3, 9, x),
    "warmup_init": lambda x: s.linear_warmup(x, 1.0, 7),
    "warmup_peak": lambda x: s.linear_warmup(0.1, x, 7),
    "multistep_init": lambda x: s.multistep(x, {3: 0.5}),
    "multistep_factor": lambda x: s.multistep(0.3, {3: x}),
    "join": lambda x: s.join([s.constant(0.1), s.cosine_decay(x, 9)], [3]),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_gradients_flow_to_tensor_parameters(make):
    x, h = torch.tensor(0.6, dtype=torch.float64), 1e-6
    got = torch.func.grad(lambda x: make(x)(5))(x)
    difference = (make(0.6 + h)(5) - make(0.6 - h)(5)) / (2 * h)
    assert got.abs() > 1e-3
    torch.testing.assert_close(got, difference, rtol=1e-6, atol=1e-8)
    assert make(x)(5) == make(0.6)(5)


def test_joined_schedules_never_leave_their_stretch():
    seen = {"first": set(), "second": set(), "third": set()}

    def spy(name):
        def schedule(count):
            seen[name].add(int(count))
            return 0.0

        return schedule

    joined = s.join([spy(name) for name in seen], [3, 5])
    for count in range(9):
        joined(count)
    assert seen == {"first": {0, 1, 2}, "second": {0, 1}, "third": {0, 1, 2, 3}}


def test_joined_gradients_stay_finite_where_another_part_would_overflow():
    make = lambda x: s.join([s.exponential_decay(x, 1e30), s.constant(x)], [3])  # noqa: E731
    assert torch.func.grad(lambda x: make(x)(1000))(torch.tensor(0.5, dtype=torch.float64)).item() == 1


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (s.multistep(0.3, {4: 0.1, 9: 0.1}), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [4, 9], 0.1)),
        (s.exponential_decay(0.3, 0.9), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
        (s.exponential_decay(0.3, 0.9, 4, True), lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.9)),
        (s.cosine_decay(0.3, 12, 0.25), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12, 0.075)),
        (s.linear_warmup(0.1, 0.3, 5), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1 / 3, 1.0, 5)),
    ],
    ids=["multistep", "exponential", "staircase", "cosine", "warmup"],
)
def test_agrees_with_torch_schedulers(ours, theirs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = theirs(optimizer)
    for count in range(12):
        assert ours(count).item() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), count
        optimizer.step()
        scheduler.step()


REFUSED = [
    ("init", lambda: s.exponential_decay(float("nan"), 0.5)),
    ("decay_rate", lambda: s.exponential_decay(1.0, 0.0)),
    ("transition_steps", lambda: s.exponential_decay(1.0, 0.5, 0)),
    ("end_value", lambda: s.exponential_decay(1.0, 0.5, end_value=float("nan"))),
    ("decay_steps", lambda: s.cosine_decay(1.0, 0)),
    ("alpha", lambda: s.cosine_decay(1.0, 5, 1.5)),
    ("peak", lambda: s.linear_warmup(0.0, float("inf"), 5)),
    ("warmup_steps", lambda: s.linear_warmup(0.0, 1.0, -5)),
    ("value", lambda: s.constant(float("inf"))),
    ("a boundary", lambda: s.multistep(1.0, {0: 0.5})),
    ("the factor at 3", lambda: s.multistep(1.0, {3: float("nan")})),
    ("schedules and boundaries", lambda: s.join([s.constant(1.0)], [3])),
    ("schedules and boundaries", lambda: s.join([], [])),
    ("schedules and boundaries", lambda: s.join([s.constant(1.0)] * 3, [3, 3])),
    ("schedules and boundaries", lambda: s.join([s.constant(1.0)] * 2, [0])),
]


@pytest.mark.parametrize(("start", "make"), REFUSED)
def test_meaningless_parameters_are_refused(start, make):
    with pytest.raises(HyperparameterError, match=rf"^{start}(.|\n)*wanted"):
        make()
