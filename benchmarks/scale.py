r"""How the cost of a step grows with width, depth and batch: `python -m benchmarks.scale`.

    python -m benchmarks.scale --out benchmarks/results      writes scale.json, scale.md and scale.png
    python -m benchmarks.scale --quick                       does everything run?

    width   256 ... 4096   three hidden layers, batch 128
    depth   2 ... 64       hidden layers of width 256, batch 128
    batch   32 ... 2048    three hidden layers of width 512

Nets of linear layers and relu from 784 inputs to 10 classes, cross entropy, default `kfac()`. All variants of a size
are timed in the same rounds. The exponent p of c · xᵖ is fitted by least squares, log c + p log x, to the times of the
larger half of the sizes: small ones cost what Python costs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from benchmarks import records
from benchmarks.harness import BASELINE, Race, configure
from benchmarks.report import checked, facts, plain_parser, table
from benchmarks.scale_plot import drawn
from benchmarks.steps import KINDS, make_task, plain, whole
from benchmarks.workloads import SEED, Workload, mlp, seeded

VARIANTS = (BASELINE, *KINDS)
AXES = {
    "width": (256, 512, 1024, 2048, 4096),
    "depth": (2, 4, 8, 16, 32, 64),
    "batch": (32, 64, 128, 256, 512, 1024, 2048),
}
QUICK = {"width": (8, 16), "depth": (1, 2), "batch": (4, 8)}
FIXED = {"width": (512, 3, 128), "depth": (256, 3, 128), "batch": (512, 3, 128)}
"""By axis: width, depth and batch, of which the axis replaces its own."""


def workload(width: int, depth: int, batch: int) -> Workload:
    """A net of `depth` hidden layers."""
    sizes = (784, *[width] * depth, 10)

    def vectors(examples: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(examples, 784, generator=generator), torch.randint(10, (examples,), generator=generator)

    def model() -> nn.Module:
        return seeded(lambda: mlp(sizes, nn.ReLU))

    title = f"width {width}, depth {depth}, batch {batch}"
    return Workload("scale", title, model, vectors, kf.losses.cross_entropy(), F.cross_entropy, batch)


def point(axis: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times at one size: milliseconds and ratios to the plain step."""
    at = dict(zip(AXES, FIXED[axis], strict=True)) | {axis: size}
    task = make_task(workload(**at), torch.device(options.device))
    steps = {BASELINE: plain(task)} | {kind: whole(task, kind, options.estimator) for kind in KINDS}
    race = Race(steps, task.device, 0.0 if options.quick else 0.1).warm(1)
    start = time.perf_counter()
    while race.rounds < 2 or (race.rounds < options.rounds and time.perf_counter() - start < options.seconds):
        race.round()
    return {
        "milliseconds": {name: race.milliseconds(name) for name in VARIANTS},
        "ratios": {kind: race.ratio(kind) for kind in KINDS},
        "rounds": race.rounds,
    }


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """p of the power law c · xᵖ through the larger half of the sizes (at least two), by least squares of logarithms."""
    first = min(len(sizes) // 2, len(sizes) - 2)
    x, y = ([math.log(value) for value in values[first:]] for values in (sizes, times))
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def exponents(points: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By variant, from the points of one axis."""
    sizes = [float(size) for size in points]
    return {name: exponent(sizes, [p["milliseconds"][name] for p in points.values()]) for name in VARIANTS}


def rendered(record: Mapping[str, Any]) -> str:
    """A table per axis, the exponents in the last line."""
    parts = [", ".join(f"{key} {value}" for key, value in record["settings"].items())]
    if record["settings"]["quick"]:
        parts.append("QUICK: tiny nets, two rounds. The figures mean nothing.")
    parts.append("Milliseconds of a step, and the ratio to the plain step of the same rounds, median [quartiles]:")
    for axis, found in record["axes"].items():
        rows = [[axis, *VARIANTS, "rounds"]]
        for size, one in found["points"].items():
            ms = one["milliseconds"]
            cells = [f"{ms[name]:.2f}, {one['ratios'][name]}" for name in KINDS]
            rows.append([size, f"{ms[BASELINE]:.2f}", *cells, str(one["rounds"])])
        rows.append(["exponent", *(f"{found['exponents'][name]:.2f}" for name in VARIANTS), ""])
        parts.append(table(rows))
    return "\n\n".join(parts)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = plain_parser("scale", __doc__, 9)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--seconds", type=float, default=8.0, help="no new round of a size after this time")
    parser.add_argument("--out", type=Path)
    return checked(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write when asked."""
    options = parsed(arguments)
    configure(options.threads)
    record: dict[str, Any] = {"settings": facts(options, torch.device(options.device)), "axes": {}}
    for axis in options.axes:
        points = {}
        for size in (QUICK if options.quick else AXES)[axis]:
            points[str(size)] = point(axis, size, options)
            ms = points[str(size)]["milliseconds"]
            print(f"{axis} {size}: " + ", ".join(f"{name} {t:.2f} ms" for name, t in ms.items()), flush=True)
        record["axes"][axis] = {"points": points, "exponents": exponents(points)}
    text = rendered(record)
    print("\n" + text)
    if options.out is not None:
        records.write(record, options.out / "scale.json")
        (options.out / "scale.md").write_text(f"# Scale\n\n{text}\n")
        drawn(record, options.out / "scale.png")
    return record


if __name__ == "__main__":
    main()
