"""The figures of one training step: `python -m benchmarks.report`, or `make bench`.

    python -m benchmarks.report --quick                            does everything run? (figures without meaning)
    python -m benchmarks.report --workloads W1 W2 --parts phases   some workloads, eager steps and their phases only
    python -m benchmarks.report --out benchmarks/results           write steps.json, steps.md and steps.png
    python -m benchmarks.report --parts peers --name peers         other optimisers in the same rounds

Everything is a ratio to the plain step inside one round (see NOTES.md). A run compares itself with the record that is
there before it writes its own. The exit status says whether it ran, never whether it was fast.
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.harness import BASELINE, Race, configure, schedule_ratios, settings
from benchmarks.memory import memory_over_sgd
from benchmarks.peers import PEERS, peer_steps
from benchmarks.records import MEMORY
from benchmarks.step_plot import drawn
from benchmarks.steps import (
    COMPILED,
    ESTIMATORS,
    PARTS_OF_FULL,
    Task,
    make_task,
    phases,
    plain_compiled,
    standard,
)
from benchmarks.tables import rendered, table
from benchmarks.workloads import WORKLOADS

__all__ = ["append", "checked", "main", "parser_for", "plain_parser", "table"]
NOTES = Path(__file__).parent / "NOTES.md"
RESULTS = Path(__file__).parent / "results"
PARTS = ("compiled", "phases", "memory", "peers")


def measure(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Time everything that the options ask for in the same rounds: the entry of one workload in a record."""
    asked = set(options.parts)
    compiled = "compiled" in asked
    torch.compiler.reset()  # graphs of other workloads count towards the limit of recompilations
    steps = standard(task, options.estimator, compiled)
    steps |= {"sgd compiled": plain_compiled(task)} if compiled else {}
    own = [name for name in steps if name != BASELINE]
    parts = phases(task, options.estimator) if "phases" in asked else {}
    others, missing = peer_steps(task) if "peers" in asked else ({}, {})
    race = Race(steps | parts | others, task.device, 0.0 if options.quick else options.block)
    race.warm(1 if options.quick else 3).run(options.rounds)
    figures = {"schedules": schedule_ratios(race), "steps": {name: race.ratio(name) for name in own}}
    if compiled:
        figures["schedules"] |= {COMPILED.format(n): r for n, r in schedule_ratios(race, COMPILED).items()}
    if parts:
        total = records.spread(race.ratios(dict.fromkeys(PARTS_OF_FULL, 1.0)))
        figures["phases"] = {name: race.ratio(name) for name in parts} | {"sum of phases": total}
    if others:
        figures["peers"] = {name: race.ratio(name) for name in others}
        for peer in PEERS:
            found = schedule_ratios(race, peer + " {}")
            figures["schedules"] |= {f"{schedule} {peer}": ratio for schedule, ratio in found.items()}
    memory = memory_over_sgd(task, "full", options.estimator, 1 if options.quick else 3) if "memory" in asked else []
    if memory:
        figures[MEMORY] = {"full": records.spread(memory)}
    losses = {name: race.loss(name) for name in race.steps}
    return {
        "title": task.workload.title,
        "examples": len(task.inputs),
        "milliseconds": race.milliseconds(BASELINE),
        "targets": (task.workload.targets or {}) | ({MEMORY: task.workload.memory} if task.workload.memory else {}),
        "figures": figures,
        "losses": {name: loss for name, loss in losses.items() if loss is not None},
        "missing": missing,
    }


def hardware(device: torch.device) -> str:
    """The machine in plain words, when nobody says better."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()}-core CPU"


def facts(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    given = {"estimator": options.estimator, "rounds": options.rounds, "quick": options.quick}
    machine = {"hardware": options.hardware or hardware(device), "date": str(datetime.date.today())}
    return machine | settings(device) | given


def append(text: str, title: str, notes: Path = NOTES) -> None:
    """Add a measurement to the end of the notes."""
    notes.write_text(notes.read_text().rstrip("\n") + f"\n\n### {title}\n\n{text}\n")


def plain_parser(name: str, text: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every measurement has in common."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(text or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--estimator", choices=list(ESTIMATORS), default="monte_carlo")
    parser.add_argument("--quick", action="store_true", help="four examples, two rounds of single steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hardware", help='the machine in plain words, for the notes: "2-core CPU"')
    return parser


def parser_for(name: str, text: str | None, rounds: int) -> argparse.ArgumentParser:
    """Those and the options of tables of workloads that go to the notes."""
    parser = plain_parser(name, text, rounds)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--append", action="store_true", help="add the tables to NOTES.md (needs --hardware)")
    return parser


def checked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    options = parser.parse_args(arguments)
    if getattr(options, "append", False) and (options.quick or not options.hardware):
        parser.error("--append needs --hardware, and a run that is not --quick")
    out = getattr(options, "out", None)
    if options.quick and out is not None and out.resolve() == RESULTS:
        parser.error("the figures of a --quick run mean nothing: write them elsewhere")
    options.rounds = 2 if options.quick else options.rounds
    return options


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = plain_parser("report", __doc__, 15)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS[:3], help="besides the eager steps")
    parser.add_argument("--block", type=float, default=0.25, help="seconds of one block")
    parser.add_argument("--out", type=Path, help="write NAME.json, NAME.md and NAME.png into this folder")
    parser.add_argument("--name", default="steps")
    parser.add_argument("--against", type=Path, help="the record to compare with; default results/NAME.json")
    options = checked(parser, arguments)
    options.against = options.against or RESULTS / f"{options.name}.json"
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, compare with the last record, and write when asked."""
    options = parsed(arguments)
    configure(options.threads)
    device = torch.device(options.device)
    record: dict[str, Any] = {"settings": facts(options, device), "workloads": {}}
    print(", ".join(f"{key} {value}" for key, value in record["settings"].items()), flush=True)
    for name in options.workloads:
        found = measure(make_task(WORKLOADS[name], device, 4 if options.quick else None), options)
        record["workloads"][name] = found
        print(f"{name}: " + ", ".join(f"{k} {r}" for k, r in found["figures"]["schedules"].items()), flush=True)
    text = rendered(record)
    print("\n" + text)
    if options.against.exists():
        print("\n" + records.verdict(records.read(options.against), record))
    if options.out is not None:
        records.write(record, options.out / f"{options.name}.json")
        (options.out / f"{options.name}.md").write_text(f"# {options.name.capitalize()}\n\n{text}\n")
        drawn(record, options.out / f"{options.name}.png")
    return record


if __name__ == "__main__":
    main()
