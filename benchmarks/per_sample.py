"""Per-example quantities from rows, and from gradients that are materialised: `python -m benchmarks.per_sample`.

    python -m benchmarks.per_sample --quick                              does it run? (figures without meaning)
    python -m benchmarks.per_sample --out benchmarks/results             writes per_sample.json and per_sample.md
    python -m benchmarks.per_sample --operations norms gram

    norms    Euclidean norms of the gradients of all examples
    gram     the inner products of all pairs of them
    ntk      the empirical neural tangent kernel of all pairs, its trace over the 10 outputs

    rows          `kf.products`, route "tape"
    vmap          `kf.products`, route "vmap" (not for ntk: all Jacobians at once are 27 GB, and in chunks they are made
                  again for every pair of chunks)
    materialised  torch.func.vmap(grad) and matrix products, leaf by leaf so that nothing is copied together; for ntk
                  one output at a time, or nothing would fit

Model and data are those of W2, batch 1000. Times are interleaved, ratios are inside rounds. Memory is what the
operation adds to the peak of a fresh process that has the model and the batch and has run it on two examples before.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kfac_func as kf
from benchmarks import records
from benchmarks.harness import Race, Step, configure
from benchmarks.memory import STATUS, peak_resident
from benchmarks.report import checked, facts, plain_parser, table
from benchmarks.steps import Task, make_task
from benchmarks.workloads import WORKLOADS

BASELINE = "rows"
EXAMPLES = 1000
ROUNDS = {"norms": 7, "gram": 3, "ntk": 1}
ROUTES = {"rows": "tape", "vmap": "vmap"}


def library(task: Task, operation: str, route: Any) -> Callable[[], Tensor]:
    """The operation by `kf.products`."""
    fn, params = kf.make_functional(task.module())
    loss, batch = task.workload.loss, (task.inputs, task.targets)
    if operation == "ntk":
        return partial(kf.products.empirical_ntk(fn, "trace", route=route), params, task.inputs)
    make = {"norms": kf.products.per_example_norms, "gram": kf.products.per_example_gram}[operation]
    return partial(make(fn, loss, route=route), params, batch)


def materialised(task: Task, operation: str) -> Callable[[], Tensor]:
    """The operation by the recipe of torch.func's tutorials."""
    fn, params = kf.make_functional(task.module())
    x, y = task.inputs, task.targets

    def own_loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
        return task.workload.torch_loss(fn(p, x[None]), y[None])

    def output(p: Any, x: Tensor, k: int) -> Tensor:
        return fn(p, x[None])[0, k]

    def products(grads: dict[str, Tensor]) -> Tensor:
        found = torch.zeros(len(x), len(x))
        for leaf in grads.values():
            found += leaf.flatten(1) @ leaf.flatten(1).T
        return found

    def norms() -> Tensor:
        grads = torch.func.vmap(torch.func.grad(own_loss), (None, 0, 0))(params, x, y)
        return torch.stack([leaf.flatten(1).norm(dim=1) for leaf in grads.values()]).norm(dim=0)

    def gram() -> Tensor:
        return products(torch.func.vmap(torch.func.grad(own_loss), (None, 0, 0))(params, x, y))

    def ntk() -> Tensor:
        total = torch.zeros(len(x), len(x))
        for k in range(fn(params, x[:1]).shape[1]):
            total += products(torch.func.vmap(torch.func.grad(output), (None, 0, None))(params, x, k))
        return total

    return {"norms": norms, "gram": gram, "ntk": ntk}[operation]


def variants(task: Task, operation: str) -> dict[str, Callable[[], Tensor]]:
    """Everything that is compared for one operation."""
    names = [name for name in ROUTES if (name, operation) != ("vmap", "ntk")]
    return {name: library(task, operation, ROUTES[name]) for name in names} | {
        "materialised": materialised(task, operation)
    }


def memory(operation: str, variant: str, examples: int, threads: int) -> float:
    """MB that the operation adds, from a fresh process."""
    if not STATUS.exists():
        return float("nan")
    command = [sys.executable, "-m", "benchmarks.per_sample", "--peak", operation, variant]
    command += ["--examples", str(examples), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout)


def added(operation: str, variant: str, examples: int) -> float:
    """MB by which the peak of this process grows, after a first run on two examples."""
    task = make_task(WORKLOADS["W2"], torch.device("cpu"), examples)
    variants(task._replace(inputs=task.inputs[:2], targets=task.targets[:2]), operation)[variant]()
    run, before = variants(task, operation)[variant], peak_resident()
    run()
    return peak_resident() - before


def compared(operation: str, examples: int, rounds: int, block: float, threads: int) -> dict[str, dict[str, Any]]:
    """Time, memory and largest difference of every variant of an operation."""
    runs = variants(make_task(WORKLOADS["W2"], torch.device("cpu"), examples), operation)
    values: dict[str, Tensor] = {}

    def kept(name: str) -> None:
        values[name] = runs[name]()

    race = Race({name: Step(partial(kept, name)) for name in runs}, torch.device("cpu"), block).warm(0).run(rounds)
    wanted = values[BASELINE]
    errors = {name: float((found - wanted).abs().max() / wanted.abs().max()) for name, found in values.items()}
    peaks = {name: memory(operation, name, examples, threads) for name in runs}
    return {
        name: {
            "milliseconds": race.milliseconds(name),
            "time": race.ratio(name, BASELINE),
            "megabytes": peaks[name],
            "memory": peaks[name] / max(peaks[BASELINE], 1.0),
            "error": errors[name],
            "rounds": rounds,
        }
        for name in runs
    }


def rendered(record: dict[str, Any]) -> str:
    """The figures as a table."""
    settings = record["settings"]
    rows = [["W2", "variant", "ms", "time / rows", "MB added", "memory / rows", "difference", "rounds"]]
    for operation, found in record["operations"].items():
        for name, cell in found.items():
            figures = [f"{cell['milliseconds']:.1f}", str(cell["time"]), f"{cell['megabytes']:.0f}"]
            more = [f"{cell['memory']:.1f}", f"{cell['error']:.0e}", str(cell["rounds"])]
            rows.append([operation, name, *figures, *more])
    return ", ".join(f"{key} {value}" for key, value in settings.items()) + "\n\n" + table(rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write when asked."""
    parser = plain_parser("per_sample", __doc__, 0)
    parser.add_argument("--operations", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    parser.add_argument("--examples", type=int)
    parser.add_argument("--peak", nargs=2, metavar=("OPERATION", "VARIANT"), help="print MB of one variant and leave")
    parser.add_argument("--out", type=Path)
    options = checked(parser, arguments)
    configure(options.threads)
    examples = options.examples or (4 if options.quick else EXAMPLES)
    if options.peak:
        operation, variant = options.peak
        print(added(operation, variant, examples))
        return {}
    given = {k: v for k, v in facts(options, torch.device("cpu")).items() if k not in ("estimator", "rounds")}
    record: dict[str, Any] = {"settings": given | {"examples": examples}, "operations": {}}
    for operation in options.operations:
        rounds, block = options.rounds or ROUNDS[operation], 0.0 if options.quick else 0.25
        record["operations"][operation] = compared(operation, examples, rounds, block, options.threads)
        print(rendered(record), flush=True)
    if options.out is not None:
        records.write(record, options.out / "per_sample.json")
        (options.out / "per_sample.md").write_text(f"# Per-example quantities\n\n{rendered(record)}\n")
    return record


if __name__ == "__main__":
    main()
