"""Interleaved timing: every round runs one block of each variant, so that a slow moment of the machine hits all.

    block     `calls` steps of one variant between two clock readings (and two device synchronisations)
    round     one block of every variant, in an order that rotates from round to round
    ratio     of two medians is never taken; it is the median over rounds of the ratios inside one round

The machine is never asked for a verdict: nothing here compares a time with a limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import benchmarks
from benchmarks.records import Spread, spread

BASELINE = "sgd"


class Step(NamedTuple):
    """One thing to time. `trains`: it moves its own parameters, and what `run` returns is the loss before that move."""

    run: Callable[[], Any]
    trains: bool = False


class Race:
    """Variants that are timed against each other. The first call of `warm` decides how many steps fill one block."""

    def __init__(self, steps: Mapping[str, Step], device: torch.device, block_seconds: float = 0.25):
        self.steps = dict(steps)
        self.device = device
        self.block_seconds = block_seconds
        self.calls = dict.fromkeys(self.steps, 1)
        self.seconds: dict[str, list[float]] = {name: [] for name in self.steps}
        self.rounds = 0

    def warm(self, calls: int = 3) -> Race:
        """Run every variant a few times unrecorded: plans, caches, first statistics; then choose the block lengths."""
        for name, step in self.steps.items():
            for _ in range(calls):
                step.run()
            once = self._timed(step, 1)
            self.calls[name] = max(1, min(1000, round(self.block_seconds / max(once, 1e-6))))
        return self

    def block(self, name: str) -> float:
        """Time one block of a variant and keep its seconds per step."""
        seconds = self._timed(self.steps[name], self.calls[name]) / self.calls[name]
        self.seconds[name].append(seconds)
        return seconds

    def round(self) -> None:
        """One block of every variant."""
        names = list(self.steps)
        first = self.rounds % len(names)
        for name in names[first:] + names[:first]:
            self.block(name)
        self.rounds += 1

    def run(self, rounds: int) -> Race:
        """Some rounds."""
        for _ in range(rounds):
            self.round()
        return self

    def ratios(self, mix: Mapping[str, float], baseline: str = BASELINE) -> list[float]:
        """Round by round Σ share · seconds over the seconds of the baseline; `mix` gives each variant's share."""
        parts = [[share * s for s in self.seconds[name]] for name, share in mix.items()]
        totals = [sum(part) for part in zip(*parts, strict=True)]
        return [total / base for total, base in zip(totals, self.seconds[baseline], strict=True)]

    def ratio(self, name: str, baseline: str = BASELINE) -> Spread:
        """How many baseline steps one step of a variant costs."""
        return spread(self.ratios({name: 1.0}, baseline))

    def milliseconds(self, name: str) -> float:
        """The median time of one step."""
        return 1e3 * median(self.seconds[name])

    def loss(self, name: str) -> float | None:
        """The loss after all steps so far of a variant that trains (one step more is run to see it), else None."""
        step = self.steps[name]
        value = step.run() if step.trains else None
        return float(value.detach()) if isinstance(value, Tensor) else None

    def _timed(self, step: Step, calls: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            step.run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


SCHEDULES: dict[str, dict[str, float]] = {
    "a": {"full": 1.0},
    "b": {"full": 0.1, "stats": 0.9},
    "c": {"full": 0.01, "stats": 0.09, "pre": 0.9},
    "d": {"pre": 1.0},
}
"""Shares of the three kinds of step. a: everything every step; b: statistics every step, factorisation every 10;
c: statistics every 10, factorisation every 100; d: precondition only."""


def schedule_ratios(race: Race, form: str = "{}") -> dict[str, Spread]:
    """The ratios of the schedules, combined inside every round from the blocks "full", "stats" and "pre"; `form` makes
    their names, "{} compiled" for example. A schedule of which a kind of step was not timed is left out."""
    mixes = {name: {form.format(kind): share for kind, share in mix.items()} for name, mix in SCHEDULES.items()}
    return {name: spread(race.ratios(mix)) for name, mix in mixes.items() if set(mix) <= set(race.steps)}


def configure(threads: int) -> None:
    """Set the number of threads of torch; waiting threads sleep when `benchmarks` was imported before torch."""
    torch.set_num_threads(threads)


def settings(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "omp_wait_policy": policy if benchmarks.OMP_SET_IN_TIME else f"{policy}, set after torch was imported",
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }
