"""What the demo says at the end: the losses at equal steps and at equal seconds, and who reached whom when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kfac_func.diagnostics.plots import History

FRACTIONS = (0.25, 0.5, 1.0)


def loss_at(history: History, *, step: int | None = None, second: float | None = None) -> float:
    """The last recorded loss not later than a step or a second: nothing is interpolated.

    >>> loss_at(History([0, 10, 20], [0.0, 1.0, 2.0], [9.0, 5.0, 4.0]), step=15)
    5.0
    >>> loss_at(History([0, 10, 20], [0.0, 1.0, 2.0], [9.0, 5.0, 4.0]), second=0.5)
    9.0
    """
    axis: Sequence[float] = history.steps if step is not None else history.seconds
    limit = step if step is not None else second
    if limit is None:
        limit = math.inf
    return [loss for when, loss in zip(axis, history.losses, strict=True) if when <= limit][-1]


def reached(history: History, level: float) -> int | None:
    """The index of the first record whose loss is at most `level`, or None.

    >>> reached(History([0, 10, 20], [0.0, 1.0, 2.0], [9.0, 5.0, 4.0]), 5.0)
    1
    """
    return next((index for index, loss in enumerate(history.losses) if loss <= level), None)


def table(histories: Mapping[str, History], leader: str) -> str:
    """A text table of losses at a quarter, half and all of the leader's steps, and of its seconds.

    >>> run = History([0, 1, 2, 4], [0.0, 1.0, 2.0, 4.0], [9.0, 5.0, 4.0, 2.0])
    >>> print(table({"K-FAC": run}, "K-FAC"))
                                  K-FAC
    after       1 steps           5.000
    after       2 steps           4.000
    after       4 steps           2.000
    after    1.00 seconds         5.000
    after    2.00 seconds         4.000
    after    4.00 seconds         2.000
    """
    steps = [max(1, round(fraction * histories[leader].steps[-1])) for fraction in FRACTIONS]
    seconds = [fraction * histories[leader].seconds[-1] for fraction in FRACTIONS]
    lines = [" " * 23 + "".join(f"{name:>12}" for name in histories)]
    for step in steps:
        losses = [loss_at(history, step=step) for history in histories.values()]
        lines.append(f"after {step:>7} steps  " + _row(losses))
    for second in seconds:
        losses = [loss_at(history, second=second) for history in histories.values()]
        lines.append(f"after {second:>7.2f} seconds" + _row(losses))
    return "\n".join(lines)


def _row(losses: Sequence[float]) -> str:
    return "  " + "".join(f"{loss:>12.3f}" for loss in losses)


def verdict(histories: Mapping[str, History], leader: str, rival: str) -> str:
    """One sentence: after how many of its steps the leader reached the final loss of the rival.

    >>> fast = History([0, 1, 2], [0.0, 1.0, 2.0], [9.0, 3.0, 2.0])
    >>> slow = History([0, 4, 8], [0.0, 1.0, 2.0], [9.0, 5.0, 4.0])
    >>> verdict({"K-FAC": fast, "Adam": slow}, "K-FAC", "Adam")
    "K-FAC reached Adam's final loss (4.000 after 8 steps, 2.0 s) after 1 of 2 steps (1.0 s)."
    """
    own, other = histories[leader], histories[rival]
    final = f"{rival}'s final loss ({other.losses[-1]:.3f} after {other.steps[-1]} steps, {other.seconds[-1]:.1f} s)"
    index = reached(own, other.losses[-1])
    if index is None:
        return f"{leader} did not reach {final} in {own.steps[-1]} steps."
    return f"{leader} reached {final} after {own.steps[index]} of {own.steps[-1]} steps ({own.seconds[index]:.1f} s)."
