"""The table of schedules a, b, c, d per workload, with the aims beside it: `python -m benchmarks.report`.

    python -m benchmarks.report --quick                               does everything run? (figures without meaning)
    python -m benchmarks.report --workloads W1 W2 --rounds 15         the schedules of some workloads
    python -m benchmarks.report --phases --peers --memory --compiled  everything there is
    python -m benchmarks.report --hardware "2-core CPU" --append      add the table to benchmarks/NOTES.md

The exit status says whether it ran, never whether it was fast.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import BASELINE, SCHEDULES, Race, Spread, configure, schedule_ratios, settings
from benchmarks.memory import memory_over_sgd
from benchmarks.peers import installed, peer_steps
from benchmarks.steps import ESTIMATORS, PHASES, Task, compiled, make_task, phases, standard
from benchmarks.workloads import WORKLOADS, Workload

NOTES = Path(__file__).parent / "NOTES.md"


class Measured(NamedTuple):
    """What one workload gave."""

    workload: Workload
    milliseconds: float  # of the plain step
    schedules: dict[str, Spread]
    itself: Spread
    others: dict[str, Spread]  # phases, peers, compiled
    losses: dict[str, float]
    memory: float | None


def measure(task: Task, options: argparse.Namespace) -> Measured:
    """Time everything that the options ask for, in the same rounds."""
    steps = standard(task, options.estimator)
    own = set(steps)
    steps |= phases(task) if options.phases else {}
    steps |= peer_steps(task, installed()) if options.peers else {}
    steps |= {"compiled": compiled(task)} if options.compiled else {}
    race = Race(steps, task.device, 0.0 if options.quick else 0.25).warm(1 if options.quick else 3).run(options.rounds)
    losses = {name: race.loss(name) for name in steps}
    return Measured(
        task.workload,
        race.milliseconds(BASELINE),
        schedule_ratios(race),
        race.ratio("sgd again"),
        {name: race.ratio(name) for name in steps if name not in own},
        {name: loss for name, loss in losses.items() if loss is not None},
        memory_over_sgd(task, "full", options.estimator) if options.memory else None,
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table that is aligned as text too; the first row is the head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def schedules_table(found: Sequence[Measured]) -> str:
    """Ratios with quartiles, and the aim behind the slash."""
    rows = [["", "sgd ms", *SCHEDULES, "sgd again", "MB over sgd"]]
    for m in found:
        aims = m.workload.targets or {}
        cells = [f"{ratio} / {aims[name]:g}" if name in aims else str(ratio) for name, ratio in m.schedules.items()]
        aim = "" if m.workload.memory is None else f" / {m.workload.memory:g}"
        memory = "-" if m.memory is None else f"{m.memory:.0f}{aim}"
        rows.append([f"{m.workload.name} {m.workload.title}", f"{m.milliseconds:.2f}", *cells, str(m.itself), memory])
    return table(rows)


def others_table(found: Sequence[Measured]) -> str:
    """One step of everything else over a plain step: phases first, then peers."""
    names = list(dict.fromkeys(name for m in found for name in m.others))
    head = ["one step of", *(m.workload.name for m in found)]
    rows = [[name, *(str(m.others[name]) if name in m.others else "-" for m in found)] for name in names]
    return table([head, *rows])


def losses_table(found: Sequence[Measured]) -> str:
    """The loss that every training variant has reached: a sign of life, the numbers of steps differ."""
    names = list(dict.fromkeys(name for m in found for name in m.losses))
    head = ["loss at the end", *(m.workload.name for m in found)]
    rows = [[name, *(f"{m.losses[name]:.4g}" if name in m.losses else "-" for m in found)] for name in names]
    return table([head, *rows])


def rendered(found: Sequence[Measured], options: argparse.Namespace, device: torch.device) -> str:
    """All tables with the settings in front, as markdown."""
    facts = {"hardware": options.hardware} if options.hardware else {}
    facts |= settings(device) | {"estimator": options.estimator, "rounds": options.rounds}
    parts = [
        ", ".join(f"{key} {value}" for key, value in facts.items()),
        *(["QUICK: four examples, two rounds. The figures mean nothing."] if options.quick else []),
        "Ratio to the plain step, median [quartiles] / aim:",
        schedules_table(found),
        *([others_table(found)] if any(m.others for m in found) else []),
        losses_table(found),
    ]
    return "\n\n".join(parts)


def append(text: str, title: str, notes: Path = NOTES) -> None:
    """Add a measurement to the end of the notes."""
    notes.write_text(notes.read_text().rstrip("\n") + f"\n\n### {title}\n\n{text}\n")


def parser_for(name: str, text: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every table has in common."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(text or "").split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--estimator", choices=list(ESTIMATORS), default="monte_carlo")
    parser.add_argument("--quick", action="store_true", help="four examples, two rounds of single steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hardware", help='the machine in plain words, for the notes: "2-core CPU"')
    parser.add_argument("--append", action="store_true", help="add the tables to NOTES.md (needs --hardware)")
    return parser


def checked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    options = parser.parse_args(arguments)
    if options.append and (options.quick or not options.hardware):
        parser.error("--append needs --hardware, and a run that is not --quick")
    options.rounds = 2 if options.quick else options.rounds
    return options


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for("report", __doc__, 15)
    parser.add_argument("--phases", action="store_true", help=f"also {', '.join(PHASES)}")
    parser.add_argument("--peers", action="store_true", help="also the other optimisers that are installed")
    parser.add_argument("--compiled", action="store_true", help="also the compiled functional step")
    parser.add_argument("--memory", action="store_true", help="also peak memory over the plain step")
    return checked(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and append when asked."""
    options = parsed(arguments)
    configure(options.threads)
    device = torch.device(options.device)
    print(", ".join(f"{key} {value}" for key, value in settings(device).items()), flush=True)
    found = []
    for name in options.workloads:
        found.append(measure(make_task(WORKLOADS[name], device, 4 if options.quick else None), options))
        print(f"{name}: " + ", ".join(f"{k} {ratio}" for k, ratio in found[-1].schedules.items()), flush=True)
    text = rendered(found, options, device)
    print("\n" + text)
    if options.append:
        append(text, f"{options.hardware}, {datetime.date.today()}")


if __name__ == "__main__":
    main()
