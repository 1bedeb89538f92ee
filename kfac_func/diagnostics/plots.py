"""Plots: the only importer of matplotlib. Figures are drawn without a display and without touching global state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from kfac_func._errors import HyperparameterError, explain

Figure: TypeAlias = Any
"""A matplotlib.figure.Figure; `figure.savefig(path)` writes it."""

# Okabe & Ito: distinguishable for colour-blind readers.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


class History(NamedTuple):
    """The course of one training run: three lists of equal length."""

    steps: list[int]
    seconds: list[float]
    losses: list[float]


def loss_curves(
    histories: Mapping[str, History],
    path: str | Path,
    *,
    title: str = "",
    ylabel: str = "training loss",
    levels: Mapping[str, float] | None = None,
) -> Path:
    """Plot loss (log scale) against steps and against seconds, side by side, and write the image to `path`.

    Args:
        histories: one run per label; they may have different lengths.
        path: file to write; its folder is made when missing and its suffix chooses the format.
        title, ylabel: text of the figure; the loss is in the units of the histories.
        levels: named horizontal lines such as an entropy floor.

    Returns the path. Raises ImportError without matplotlib, HyperparameterError without a history.

    >>> import tempfile
    >>> run = History(steps=[0, 1, 2], seconds=[0.0, 0.1, 0.2], losses=[4.0, 2.0, 1.0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loss_curves({"K-FAC": run}, f"{folder}/run.png", levels={"floor": 0.5}).stat().st_size > 1000
    True
    """
    something(histories, "no history", "at least one run")
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (label, history) in enumerate(histories.items()):
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": STYLES[index % len(STYLES)],
            "linewidth": 2,
            "label": label,
        }
        left.plot(history.steps, history.losses, **style)
        right.plot(history.seconds, history.losses, **style)
    for axes, unit in ((left, "steps"), (right, "seconds of training")):
        _dress(axes, unit, levels or {})
    left.set_ylabel(ylabel)
    right.legend(loc="best", frameon=False)
    figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


# ------------------------------------------------------------------ the look


def something(things: Any, got: str, wanted: str) -> None:
    """Raise HyperparameterError for an empty collection."""
    if not things:
        raise HyperparameterError(explain("there is nothing to plot.", got=got, wanted=wanted))


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, of this size in inches. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = explain("a plot needs matplotlib, which is missing.", options='pip install "kfac_func[demo]"')
        raise ImportError(message) from error
    return Figure(figsize=(width, height), layout="constrained")


def line_styles(labels: list[str]) -> dict[str, dict[str, Any]]:
    """Distinct colours and dashes for a few lines; the order of the network, dark to light, for many."""
    from matplotlib import colormaps

    few, last = len(labels) <= len(COLOURS), max(1, len(labels) - 1)

    def style(k: int) -> dict[str, Any]:
        if few:
            return {"color": COLOURS[k], "linestyle": STYLES[k % len(STYLES)], "linewidth": 2}
        return {"color": colormaps["cividis"](0.9 * k / last), "linestyle": "-", "linewidth": 1.2}

    return {label: style(k) | {"label": label} for k, label in enumerate(labels)}


def legend(figure: Figure, styles: Mapping[str, dict[str, Any]]) -> None:
    """The names beside the figure; of very many, some of them, evenly."""
    from matplotlib.lines import Line2D

    names = list(styles)
    every = -(-len(names) // 24)
    shown = names if every == 1 else [*names[:-1:every], names[-1]]
    lines = [Line2D([], [], **styles[name]) for name in shown]
    where = {"loc": "outside right upper", "frameon": False, "fontsize": 7 if len(shown) > 12 else 8}
    figure.legend(handles=lines, **where)


def clean(axes: Any) -> None:
    """A light grid, and no frame above and to the right."""
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def whole_numbers(axes: Any) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _dress(axes: Any, unit: str, levels: Mapping[str, float]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter("")
    clean(axes)
    axes.set_xlabel(unit)
    for name, level in levels.items():
        axes.axhline(level, color="#777777", linewidth=1, linestyle=":")
        axes.annotate(
            f"{name} {level:.1f}",
            xy=(1, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#555555",
        )
