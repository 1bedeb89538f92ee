"""One side of `benchmarks.between`: the package and the benchmarks of one checkout, timed when a line asks for it.

    python benchmarks/between_worker.py TREE WORKLOAD THREADS

Reads names of what to time, one a line, and answers with the seconds of one call.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

SMALL = 3
"""Examples of the small passes that planning is compared with."""


def variants(workload: str) -> Any:
    """The race of this checkout: phases of a step, making a plan, and a plain pass on a few examples."""
    steps = importlib.import_module("benchmarks.steps")
    harness = importlib.import_module("benchmarks.harness")
    torch = importlib.import_module("torch")
    kf = importlib.import_module("kfac_func")
    task = steps.make_task(importlib.import_module("benchmarks.workloads").WORKLOADS[workload], torch.device("cpu"))
    few = steps.make_task(task.workload, task.device, SMALL)
    parts = steps.phases(task)
    fn, params = kf.make_functional(task.module())
    known = {name: parts[name] for name in ("gradient", "statistics", "capture", "measure")}
    planned = harness.Step(lambda: kf.make_plan(fn, params, task.inputs))
    return harness.Race({"sgd": steps.plain(task), "small": steps.plain(few), "plan": planned, **known}, task.device)


def main() -> None:
    tree, workload, threads = sys.argv[1:4]
    sys.path[0] = tree
    importlib.import_module("benchmarks.harness").configure(int(threads))
    race = variants(workload).warm()
    print(" ".join(race.steps), flush=True)
    for line in sys.stdin:
        print(race.block(line.strip()), flush=True)


if __name__ == "__main__":
    main()
