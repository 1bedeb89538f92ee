"""This checkout beside another one, round by round: `python -m benchmarks.between PATH_OF_THE_OTHER`.

    git worktree add ../before COMMIT
    python -m benchmarks.between ../before --workloads W1 W2 --rounds 9

Two processes hold one checkout each; they take turns, so that a slow moment of the machine hits both. Shown is the time
of this checkout over that of the other in the same round, and what planning costs in plain steps on three examples.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.records import spread
from benchmarks.workloads import WORKLOADS

HERE = Path(__file__).resolve().parent


class Side(NamedTuple):
    """One checkout at work, and the names of what it can time."""

    process: subprocess.Popen[str]
    names: list[str]

    def seconds(self, name: str) -> float:
        """One block of a variant."""
        print(name, file=self.process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def started(tree: Path, workload: str, threads: int) -> Side:
    """A process for one checkout. Returns when it is warm."""
    command = [sys.executable, str(HERE / "between_worker.py"), str(tree.resolve()), workload, str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    side = Side(process, [])
    side.names.extend(side._line().split())
    return side


def compared(other: Path, workload: str, rounds: int, threads: int) -> list[str]:
    """Lines of a table: median and quartiles of this checkout's time over the other's, and the price of a plan."""
    sides = [started(HERE.parent, workload, threads), started(other, workload, threads)]
    names = sides[0].names
    times: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in sides]
    for turn in range(rounds):
        for name in names:
            for k in (0, 1) if turn % 2 else (1, 0):
                times[k][name].append(sides[k].seconds(name))
    for side in sides:
        side.process.kill()
    lines = []
    for name in names:
        ratio = spread([a / b for a, b in zip(times[0][name], times[1][name], strict=True)])
        small = [spread([t / s for t, s in zip(side[name], side["small"], strict=True)]) for side in times]
        lines.append(f"| {workload} | {name:<10} | {ratio} | {small[1].median:.1f} -> {small[0].median:.1f} |")
    return lines


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.between")
    options.add_argument("other", type=Path, help="another checkout of this project")
    options.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    print("| | part | this / other | in plain steps on three examples, other -> this |\n|---|---|---|---|")
    for workload in given.workloads:
        print("\n".join(compared(given.other, workload, given.rounds, given.threads)), flush=True)


if __name__ == "__main__":
    main()
