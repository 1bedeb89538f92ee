"""What every structure costs beside `kronecker()`: `python -m benchmarks.structures`.

    python -m benchmarks.structures --quick                            does everything run? (figures without meaning)
    python -m benchmarks.structures --workloads W2 --only kpsvd eigen  some workloads, structures whose names begin so
    python -m benchmarks.structures --hardware "2-core CPU" --append   add the tables to benchmarks/NOTES.md

    measure    the look at a new batch (all looks of the structure) and the moving average
    refresh    refresh, scalings and factorisation of a state that has been refreshed before
    solve      preconditioning a gradient
    a, b, c, d whole steps in the schedules of `harness`

All of it on a state that has seen another batch, so that warm starts count as in training. A structure has two races
with kronecker(), one of phases and one of whole steps, and figures are ratios inside their rounds. The preparation and
first round of a race must fit into --limit seconds, and there are as many other rounds as fit into as much again; what
does not fit, or is refused, is shown as such. The row "kronecker" is kronecker() against itself: the noise of the run.

The exit status says whether it ran, never whether it was fast.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_func as kf
from benchmarks.harness import SCHEDULES, Race, Spread, configure, settings, spread
from benchmarks.report import append, checked, parser_for, table
from benchmarks.steps import ESTIMATORS, KINDS, RATE, Step, Task, make_task
from benchmarks.workloads import SEED, WORKLOADS, Workload
from kfac_func.damping import Split
from kfac_func.precondition.averages import Observed, absorbed, factorized, refreshed, scaled

C = kf.curvature
PHASES = ("measure", "refresh", "solve")
DAMPING = 1e-3


def _exact_blocks() -> kf.curvature.Curvature:
    return C.blockwise(C.block_diagonal(), C.block_diagonal())


STRUCTURES: dict[str, Callable[[], C.Structure | C.Curvature]] = {
    "kronecker": C.kronecker,
    "kronecker, exact damping": C.kronecker,
    "kronecker, centred": lambda: C.kronecker(centred=True),
    "kronecker, sua": lambda: C.kronecker(sua=True),
    "kronecker, input side": lambda: C.kronecker(sides="input"),
    "kronecker, diagonal factors": lambda: C.kronecker(max_dim=1, oversize="diagonal"),
    "eigen": C.eigen,
    "eigen, iteration": lambda: C.eigen(basis="iteration"),
    "eigen, mean_gradient": lambda: C.eigen("mean_gradient"),
    "kpsvd": C.kpsvd,
    "kpsvd, exact damping": C.kpsvd,
    "kpsvd, radius 1": lambda: C.kpsvd(radius=1),
    "deflation": C.deflation,
    "deflation, rank 4": lambda: C.deflation(4),
    "corrected": C.corrected,
    "lanczos": C.lanczos,
    "inverse_free": C.inverse_free,
    "inverse_free, adaptive": lambda: C.inverse_free(adaptive=True),
    "inverse_free, triangular": lambda: C.inverse_free("lower_triangular"),
    "inverse_free, blocks of 8": lambda: C.inverse_free("block_diagonal", block_size=8),
    "inverse_free, diagonal": lambda: C.inverse_free("diagonal"),
    "diagonal": C.diagonal,
    "identity": C.identity,
    "block_diagonal": _exact_blocks,
    "full": C.full,
}
"""Every structure and the variants worth comparing, with default settings otherwise."""

SPLITS: dict[str, Split] = {name: "exact" for name in STRUCTURES if name.endswith("exact damping")}
"""Where the damping is not split by π."""

TWO_LEVEL: dict[str, Callable[[], C.Structure | C.Curvature]] = {
    "two_level": lambda: C.two_level(C.kronecker()),
    "two_level, additive": lambda: C.two_level(C.kronecker(), form="additive"),
    "two_level, tselepidis": lambda: C.two_level(C.kronecker(), "tselepidis", form="additive"),
    "two_level, krylov": lambda: C.two_level(C.kronecker(), krylov=True),
    "two_level, spectral": lambda: C.two_level(C.kronecker(), "spectral"),
    "two_level, residual": lambda: C.two_level(C.kronecker(), "residual"),
}
"""A coarse level over kronecker()."""

RARELY_SCALED = "eigen, scaled at refresh"
TIMED = STRUCTURES | TWO_LEVEL | {RARELY_SCALED: C.eigen}
"""What is timed: EKFAC also with scalings that are measured at refreshes only."""

AIMS = (
    {("W2", name, "a"): 20.0 for name in ("kpsvd", "deflation", "corrected", "lanczos")}
    | {(workload, "eigen", schedule): 1.3 for workload in WORKLOADS for schedule in "bcd"}
    | {(workload, name, schedule): 2.0 for workload in WORKLOADS for name in TWO_LEVEL for schedule in "abcd"}
)
"""By workload, structure and column: the aim behind the slash. It decides nothing."""


class Cell(NamedTuple):
    """One figure of one structure: the ratio to kronecker() and the milliseconds of that, or why there are none."""

    ratio: Spread | None = None
    milliseconds: float = float("nan")
    rounds: int = 0
    failure: str = "-"


class Batches(NamedTuple):
    """A workload with two batches, so that a state never meets the batch that it was warmed on."""

    task: Task
    step: Any
    params: Any
    data: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def batches(workload: Workload, device: torch.device, examples: int | None, estimator: str = "monte_carlo") -> Batches:
    """Two batches of a workload and its model."""
    task = make_task(workload, device, 2 * (examples or workload.examples))
    n = len(task.inputs) // 2
    first, second = zip(task.inputs.split(n), task.targets.split(n), strict=True)
    fn, params = kf.make_functional(task.module())
    step = kf.value_grad_and_stats(fn, workload.loss, estimator=ESTIMATORS[estimator]())
    return Batches(task, step, params, (first, second))


def transformation(name: str) -> kf.GradientTransformation:
    """`kfac()` with a structure of the table."""
    return kf.kfac(TIMED[name](), damping=DAMPING, split=SPLITS.get(name, "pi"))


def phases(given: Batches, name: str) -> dict[str, Step]:
    """Measure, refresh and solve for a second batch, on a state that the first one made."""
    tx, generator = transformation(name), torch.Generator(given.task.device).manual_seed(SEED)
    (_, _, first), (_, grads, second) = (given.step(given.params, batch, generator=generator) for batch in given.data)
    assert first is not None
    assert second is not None
    start = kf.observe(tx.init(given.params), first)
    seen = Observed(start, second)
    measured = absorbed(start, seen)
    scales = seen.curvature.scales

    def refresh() -> Any:
        state = refreshed(measured)
        return factorized(scaled(state, seen) if scales else state)

    return {
        "measure": Step(lambda: absorbed(start, Observed(start, second))),
        "refresh": Step(refresh),
        "solve": Step(lambda: kf.precondition(start, grads)),
    }


def whole(given: Batches, name: str) -> dict[str, Step]:
    """Training steps "full", "stats" and "pre" on the two batches in turn; scalings, if any, with all statistics."""
    tx, generator = kf.chain(transformation(name), kf.sgd(RATE)), torch.Generator(given.task.device).manual_seed(SEED)

    def move(batch: Any, params: Any, state: Any, kind: str) -> tuple[Any, Any]:
        _, grads, stats = given.step(params, batch, generator=generator, stats=kind != "pre")
        scale = kind == "full" or (kind == "stats" and name != RARELY_SCALED)
        updates, state = tx.update(grads, state, params, stats=stats, refresh=kind == "full", scale=scale)
        return kf.apply_updates(params, updates), state

    start = move(given.data[0], given.params, tx.init(given.params), "full")

    def training(kind: str) -> Step:
        data, now = itertools.cycle(given.data[::-1]), start

        def run() -> None:
            nonlocal now
            now = move(next(data), *now, kind)

        return Step(run, trains=True)

    return {kind: training(kind) for kind in KINDS}


PARTS: tuple[tuple[Callable[[Batches, str], dict[str, Step]], dict[str, dict[str, float]]], ...] = (
    (phases, {phase: {phase: 1.0} for phase in PHASES}),
    (whole, SCHEDULES),
)
"""The two races of a structure, each with its columns as mixes of steps."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError when the body takes longer (only in the main thread of a system with alarms)."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def raced(given: Batches, name: str, options: argparse.Namespace) -> dict[str, Cell]:
    """One structure against kronecker(), by column: as many rounds as fit into the seconds that they may take."""
    found: dict[str, Cell] = {}
    for make, mixes in PARTS:
        race, failure = None, ""
        try:
            with limited(options.limit):
                ours = {f"own {kind}": step for kind, step in make(given, name).items()}
                race = Race(make(given, "kronecker") | ours, given.task.device, options.block).warm(0)
                start = time.perf_counter()
                race.round()
                once = time.perf_counter() - start
            race.run(max(0, min(options.rounds, round(options.limit / once)) - 1))
        except TimeoutError:
            failure = f"over {options.limit:g} s"
        except (kf.errors.KFacError, RuntimeError) as error:
            failure = f"refused: {str(error).splitlines()[0]}"
        if race is None or failure:
            found |= dict.fromkeys(mixes, Cell()) | {next(iter(mixes)): Cell(failure=failure)}
            continue
        for column, mix in mixes.items():
            milliseconds = sum(share * race.milliseconds(kind) for kind, share in mix.items())
            found[column] = Cell(compared(race, mix), milliseconds, race.rounds)
    return found


def compared(race: Race, mix: dict[str, float]) -> Spread:
    """The same mix of steps with the structure and with kronecker(), round by round."""
    ours, theirs = (
        race.ratios({start + k: share for k, share in mix.items()}, next(iter(race.steps))) for start in ("own ", "")
    )
    return spread([x / y for x, y in zip(ours, theirs, strict=True)])


def rendered(workload: Workload, found: dict[str, dict[str, Cell]]) -> str:
    """The table of one workload."""

    def text(name: str, column: str, cell: Cell) -> str:
        aim = AIMS.get((workload.name, name, column))
        return f"{cell.ratio or cell.failure}" + ("" if aim is None else f" / {aim:g}")

    columns = [*PHASES, *SCHEDULES]
    usual = {c: next((row[c].milliseconds for row in found.values() if row[c].ratio), float("nan")) for c in columns}
    lines = [
        [f"{workload.name} {workload.title}", *columns, "rounds"],
        ["kronecker(), ms", *(f"{usual[c]:.2f}" for c in columns), "-"],
    ]
    for name, row in found.items():
        rounds = ", ".join(str(row[mixes].rounds) for mixes in ("measure", "a"))
        lines.append([name, *(text(name, c, row[c]) for c in columns), rounds])
    return table(lines)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for("structures", __doc__, 7)
    parser.add_argument("--only", nargs="+", default=[""], help="structures whose names begin so")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for the first round of a race")
    options = checked(parser, arguments)
    options.block = 0.0 if options.quick else 0.1
    return options


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and append when asked."""
    options = parsed(arguments)
    configure(options.threads)
    device = torch.device(options.device)
    facts = {"hardware": options.hardware} if options.hardware else {}
    facts |= settings(device) | {"estimator": options.estimator, "limit": f"{options.limit:g} s"}
    parts = [", ".join(f"{key} {value}" for key, value in facts.items())]
    parts += ["QUICK: four examples, two rounds. The figures mean nothing."] if options.quick else []
    parts += ["Ratio to kronecker() in the same rounds, median [quartiles] / aim:"]
    print("\n\n".join(parts), flush=True)
    for workload in (WORKLOADS[name] for name in options.workloads):
        given = batches(workload, device, 4 if options.quick else None, options.estimator)
        found: dict[str, dict[str, Cell]] = {}
        for name in (name for name in TIMED if name.startswith(tuple(options.only))):
            start = time.perf_counter()
            found[name] = raced(given, name, options)
            print(f"{workload.name} {name}: {time.perf_counter() - start:.1f} s", flush=True)
        parts.append(rendered(workload, found))
        print("\n" + parts[-1], flush=True)
    text = "\n\n".join(parts)
    if options.append:
        append(text, f"Structures, {options.hardware}, {datetime.date.today()}")
    return text


if __name__ == "__main__":
    main()
