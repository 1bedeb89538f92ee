"""The figure of `scale`: milliseconds of a step against width, depth and batch, with the fitted exponents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

STYLES = {  # Okabe & Ito
    "sgd": ("plain SGD", "#444444", "s"),
    "pre": ("pre: precondition only", "#009E73", "^"),
    "stats": ("stats: with statistics", "#0072B2", "o"),
    "full": ("full: with factorisation", "#D55E00", "D"),
}


def drawn(record: Mapping[str, Any], path: Path) -> Path:
    """A panel per axis, log-log; the exponents stand in the legend of each panel."""
    axes_found, settings = record["axes"], record["settings"]
    figure = Figure(figsize=(1 + 3.8 * len(axes_found), 4.0), layout="constrained")
    panels = figure.subplots(1, len(axes_found), squeeze=False)[0]
    for panel, (axis, found) in zip(panels, axes_found.items(), strict=True):
        sizes = [int(size) for size in found["points"]]
        for name, (label, colour, mark) in STYLES.items():
            times = [p["milliseconds"][name] for p in found["points"].values()]
            power = f"{label},  ∝ {axis}$^{{{found['exponents'][name]:.2f}}}$"
            panel.loglog(sizes, times, color=colour, marker=mark, markersize=5, label=power)
        panel.set_xlabel(axis)
        panel.xaxis.set_major_locator(FixedLocator(sizes))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.grid(True, color="#E4E4E4", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False, loc="upper left")
        low, high = panel.get_ylim()
        panel.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    panels[0].set_ylabel("milliseconds of a step")
    title = f"{settings['hardware']}, {settings['threads']} threads, torch {settings['torch']}, {settings['date']}"
    figure.suptitle(title + (" (QUICK: meaningless)" if settings["quick"] else ""), fontsize=9, color="#444444")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
