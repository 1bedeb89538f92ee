"""The figure of `report`: one panel per workload, the schedules a to d, ours against the targets and the peers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.records import Spread
from benchmarks.tables import SCHEDULES, kinds_of_schedules

OURS = {"": ("eager", "#0072B2", "o"), "compiled": ("compiled", "#D55E00", "D")}  # Okabe & Ito
TARGET, PEER, INK = "#009E73", "#8A8A8A", "#444444"
PEER_MARKS = "sv^<>pPX*"
TICKS = (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)


def drawn(record: Mapping[str, Any], path: Path) -> Path:
    """Draw the schedules of a record."""
    workloads = record["workloads"]
    figure = Figure(figsize=(1.2 + 2.3 * len(workloads), 4.2), layout="constrained")
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    peers = list(dict.fromkeys(k for found in workloads.values() for k in kinds_of_schedules(found) if k not in OURS))
    for axes, (name, found) in zip(panels, workloads.items(), strict=True):
        _panel(axes, f"{name} {found['title']}", found, peers)
    panels[0].set_ylabel("time of a step / plain SGD step")
    handles = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 9), frameon=False)
    settings = record["settings"]
    title = f"{settings['hardware']}, {settings['threads']} threads, torch {settings['torch']}, {settings['date']}"
    figure.suptitle(title + (" (QUICK: meaningless)" if settings["quick"] else ""), fontsize=9, color=INK)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _panel(axes: Any, title: str, found: Mapping[str, Any], peers: list[str]) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xticks(range(len(SCHEDULES)), SCHEDULES)
    axes.set_xlim(-0.5, len(SCHEDULES) - 0.5)
    axes.grid(True, axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(1.0, color=INK, linewidth=0.8)
    ratios, targets = found["figures"]["schedules"], found["targets"]
    styles = {peer: (peer, PEER, PEER_MARKS[k % len(PEER_MARKS)]) for k, peer in enumerate(peers)} | OURS
    shifts = {peer: 0.3 * (k + 1) / len(peers) for k, peer in enumerate(peers)} | {"": -0.25, "compiled": -0.08}
    for x, schedule in enumerate(SCHEDULES):
        if schedule in targets:
            axes.hlines(targets[schedule], x - 0.38, x + 0.38, color=TARGET, linewidth=2.5, label="target")
        for kind, style in styles.items():
            ratio = ratios.get(f"{schedule} {kind}".strip())
            if ratio is not None:
                _point(axes, x + shifts[kind], ratio, style)


def _point(axes: Any, x: float, ratio: Spread, style: tuple[str, str, str]) -> None:
    label, colour, mark = style
    ours = colour != PEER
    bars = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
    form = {"color": colour, "marker": mark, "markersize": 6 if ours else 4.5, "alpha": 1.0 if ours else 0.7}
    axes.errorbar(x, ratio.median, yerr=bars, linestyle="none", label=label, zorder=3 if ours else 2, **form)
