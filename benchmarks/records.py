"""Figures as JSON: written, read and compared, with nothing but the standard library.

    {"settings": {...},                          hardware, versions, threads, date: what the figures depend on
     "workloads": {"W1": {"title", "examples",
        "milliseconds":   of one plain step,
        "targets":        {"a": 4.5, ..., "memory": 80.0},
        "figures":        {group: {name: {"median", "low", "high"}}},
        "losses":         {variant: the last loss},
        "missing":        {variant: why there is no figure}}}}

Figures are ratios to a plain step with the quartiles over rounds; those of the group "memory" are MB over its peak.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

MEMORY, ITSELF = "memory", "sgd again"
MEMORY_NOISE = 10.0
"""MB by which the peaks of two runs of the same code differ."""

DEFINING = ("quick", "estimator")
"""Settings under which figures have another meaning; figures that differ in others can be compared with care."""


class Spread(NamedTuple):
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


class Change(NamedTuple):
    """A figure that has moved beyond the spread of both runs."""

    where: str
    before: Spread
    now: Spread

    @property
    def slower(self) -> bool:
        return self.now.median > self.before.median

    def __str__(self) -> str:
        word = "slower" if self.slower else "faster"
        if f" {MEMORY}," in self.where:
            word = "larger" if self.slower else "smaller"
        return f"{word}: {self.where}: {self.before} -> {self.now}"


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record; spreads become objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a record; `figures` hold spreads again."""
    record = json.loads(path.read_text())
    for found in record["workloads"].values():
        found["figures"] = {
            group: {name: Spread(**values) for name, values in figures.items()}
            for group, figures in found["figures"].items()
        }
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return {name: round(number, 4) for name, number in value._asdict().items()}
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The figures of both records whose quartiles lie apart by more than the noise, the largest losses first.

    The noise of a ratio is how far the quartiles of `sgd again` are from 1 in the worse of the two runs; that of memory
    is MEMORY_NOISE.
    """
    found = []
    for name, mine in now["workloads"].items():
        theirs = before["workloads"].get(name)
        if theirs is None or theirs["examples"] != mine["examples"]:
            continue
        noise = max(_noise(theirs), _noise(mine))
        old = dict(_figures(theirs))
        for (group, figure), new in _figures(mine):
            change = Change(f"{name} {group}, {figure}", old.get((group, figure), new), new)
            if _apart(change, group, noise):
                found.append(change)
    return sorted(found, key=lambda change: change.before.median / max(change.now.median, 1e-9))


def _figures(workload: dict[str, Any]) -> Iterator[tuple[tuple[str, str], Spread]]:
    for group, figures in workload["figures"].items():
        for name, value in figures.items():
            if name != ITSELF:
                yield (group, name), value


def _noise(workload: dict[str, Any]) -> float:
    again = workload["figures"]["steps"][ITSELF]
    return max(abs(again.low - 1), abs(again.high - 1))


def _apart(change: Change, group: str, noise: float) -> bool:
    below, above = (change.before, change.now) if change.slower else (change.now, change.before)
    return above.low > (below.high + MEMORY_NOISE if group == MEMORY else below.high * (1 + noise))


def verdict(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What got slower and what got faster since a record, in words; and whether the two can be compared at all."""
    old, new = before["settings"], now["settings"]
    other = [key for key in new if key not in ("date", "rounds") and old.get(key) != new[key]]
    since = f"Since {old['date']}"
    if any(key in DEFINING for key in other):
        return f"{since}: not compared, the records differ in {', '.join(other)}."
    care = f" (with care: the records differ in {', '.join(other)})" if other else ""
    found = changes(before, now)
    lines = [f"- {change}" for change in found] or ["- nothing moved beyond the spread"]
    return "\n".join([f"{since}{care}, beyond the spread of both runs:", *lines])
