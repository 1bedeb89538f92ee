"""Plots: the only importer of matplotlib. Figures are drawn without a display and without touching global state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kfac_func._errors import HyperparameterError, explain

# Okabe & Ito: distinguishable for colour-blind readers.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")


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
    if not histories:
        raise HyperparameterError(explain("there is nothing to plot.", got="no history", wanted="at least one run"))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = explain("a plot needs matplotlib, which is missing.", options='pip install "kfac_func[demo]"')
        raise ImportError(message) from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (label, history) in enumerate(histories.items()):
        style: dict[str, Any] = {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _STYLES[index % len(_STYLES)],
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


def _dress(axes: Any, unit: str, levels: Mapping[str, float]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter("")
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
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
