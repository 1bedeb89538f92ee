"""The figure of `fisher_quality`: a row per structure, a mark per net, three panels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MARKS = (("#0072B2", "o"), ("#D55E00", "D"))  # Okabe & Ito, one colour and one shape per net
EDGE = 1.06


def drawn(found: Mapping[str, Mapping[str, Mapping[str, Any]]], folder: Path) -> Path:
    """Draw net -> structure -> figures ("error", "spectrum", "whole" by damping) and write fisher_quality.png."""
    names = list(next(iter(found.values())))
    figure = Figure(figsize=(11.5, 0.27 * len(names) + 1.1), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("error  ‖F$_D$ − F̂‖ / ‖F$_D$‖", "error of the spectrum", "cosine with the natural gradient")
    for axes, title in zip(panels, titles, strict=True):
        _dress(axes, title, names)
    for shift, (net, (colour, mark)) in zip((-0.14, 0.14), zip(found, MARKS, strict=False), strict=False):
        style = {"color": colour, "marker": mark, "linestyle": "none", "markersize": 5.5, "clip_on": False}
        for row, figures in enumerate(found[net].values()):
            y = row + shift
            for axes, key in zip(panels, ("error", "spectrum"), strict=False):
                _point(axes, figures[key], y, style)
            low, high = figures["whole"]
            panels[2].plot([low, high], [y, y], color=colour, linewidth=1, alpha=0.5)
            panels[2].plot(low, y, **style | {"markerfacecolor": "white"})
            panels[2].plot(high, y, **style)
        panels[0].plot([], [], label=net, **style | {"clip_on": True})
    for face, damping in (("white", "0.01"), ("#555555", "1")):
        label = f"λ = {damping} · mean eigenvalue"
        panels[2].plot([], [], "o", color="#555555", markerfacecolor=face, markersize=5.5, label=label)
    handles = [*panels[0].get_legend_handles_labels()[0], *panels[2].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    path = folder / "fisher_quality.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _point(axes: Any, value: float, y: float, style: dict[str, Any]) -> None:
    """A mark; what lies beyond the axis is an arrow at its end with the number."""
    if value <= 1.0:
        axes.plot(value, y, **style)
        return
    axes.plot(EDGE, y, **style | {"marker": ">"})
    axes.annotate(f"{value:.1f}", (EDGE, y), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=6)


def _dress(axes: Any, title: str, names: list[str]) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlim(0, EDGE)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for row in range(0, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#F4F4F4", zorder=0)
