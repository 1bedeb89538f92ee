"""A record (see `records`) as markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.records import ITSELF, MEMORY

SCHEDULES = ("a", "b", "c", "d")


def table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table that is aligned as text too; the first row is the head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def kinds_of_schedules(workload: Mapping[str, Any]) -> list[str]:
    """What follows the letter in the names of the schedules: "" is eager, then "compiled" and the peers."""
    return list(dict.fromkeys(name[2:] for name in workload["figures"]["schedules"]))


def schedules_table(workloads: Mapping[str, Any]) -> str:
    """Ratios with quartiles, and the target behind the slash."""
    rows = [["", "sgd ms", *SCHEDULES, ITSELF]]
    for name, found in workloads.items():
        figures, targets = found["figures"], found["targets"]
        for kind in kinds_of_schedules(found):
            cells = []
            for schedule in SCHEDULES:
                ratio = figures["schedules"].get(f"{schedule} {kind}".strip(), "-")
                ours = kind in ("", "compiled") and schedule in targets
                cells.append(f"{ratio} / {targets[schedule]:g}" if ours else str(ratio))
            rows.append([f"{name}, {kind or 'eager'}", f"{found['milliseconds']:.2f}", *cells])
            rows[-1].append("" if kind else str(figures["steps"][ITSELF]))
    return table(rows)


def memory_table(workloads: Mapping[str, Any]) -> str:
    """Peak memory over the plain step in MB, and the target."""
    rows = [["MB over sgd", *workloads]]
    for kind in _names(workloads, MEMORY):
        cells = []
        for found in workloads.values():
            target = found["targets"].get(MEMORY)
            value = found["figures"].get(MEMORY, {}).get(kind)
            aim = f" / {target:g}" if target is not None else ""
            cells.append("-" if value is None else f"{value.median:.0f} [{value.low:.0f}, {value.high:.0f}]{aim}")
        rows.append([kind, *cells])
    return table(rows)


def group_table(workloads: Mapping[str, Any], group: str) -> str:
    """One step of everything in a group over a plain step."""
    rows = [["one step of", *workloads]]
    for name in _names(workloads, group):
        found = [w["figures"].get(group, {}).get(name, "-") for w in workloads.values()]
        rows.append([name, *map(str, found)])
    return table(rows)


def losses_table(workloads: Mapping[str, Any]) -> str:
    """The loss that every training variant has reached: a sign of life, the numbers of steps differ."""
    names = dict.fromkeys(name for found in workloads.values() for name in found["losses"])
    rows = [["loss at the end", *workloads]]
    for name in names:
        losses = [found["losses"].get(name) for found in workloads.values()]
        rows.append([name, *("-" if loss is None else f"{loss:.4g}" for loss in losses)])
    return table(rows)


def rendered(record: Mapping[str, Any]) -> str:
    """All tables with the settings in front."""
    workloads = record["workloads"]
    parts = [", ".join(f"{key} {value}" for key, value in record["settings"].items())]
    if record["settings"]["quick"]:
        parts.append("QUICK: four examples, two rounds. The figures mean nothing.")
    parts += ["; ".join(f"{name} {found['title']}, {found['examples']} examples" for name, found in workloads.items())]
    parts += ["Ratio to the plain step, median [quartiles] / target:", schedules_table(workloads)]
    for group in ("phases", "peers"):
        parts += [group_table(workloads, group)] if _names(workloads, group) else []
    parts += [group_table(workloads, "steps")]
    parts += [memory_table(workloads)] if _names(workloads, MEMORY) else []
    parts += [losses_table(workloads)]
    missing = [f"- {w}, {name}: {why}" for w, found in workloads.items() for name, why in found["missing"].items()]
    parts += ["\n".join(["Not measured:", "", *missing])] if missing else []
    return "\n\n".join(parts)


def _names(workloads: Mapping[str, Any], group: str) -> list[str]:
    return list(dict.fromkeys(name for found in workloads.values() for name in found["figures"].get(group, {})))
