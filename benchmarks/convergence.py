r"""How far training gets with nothing tuned: `python -m benchmarks.convergence`.

    python -m benchmarks.convergence --out benchmarks/results    writes convergence.md
    python -m benchmarks.convergence --problems digits           one of them, printed only

All are autoencoders with tanh, linear code and output, Xavier weights; sigmoid cross entropy summed over pixels, mean
over images; the loss is that of the whole training set, without the l2 term:

    small    144-100-50-25-6-...     1000 curves of 12 x 12 pixels, full batch, l2 1e-5, seeds 0, 1, 2
    curves   784-500-250-100-30-...  2000 curves of 28 x 28 pixels, batch 500
    deep     784-400-200-100-50-25-6-...  the same images and batch
    digits   64-60-50-40-30-20-10-...  1797 digits of 8 x 8 pixels, batch 128, seeds 0 to 19: the worst is shown

"auto" is `kfac_auto` with its defaults on all of them. "constrained" is the recipe `tselepidis` (K-FAC, then norm
constraint and momentum) with one setting for all: rate 0.1, damping 0.1, kl_clip 0.01, a refresh every 10 steps.
Seconds are those of training alone, with the first step and without the time that torch takes to load. "peak" is the
largest loss of a batch after the first 20 steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_func as kf
from benchmarks.harness import configure
from benchmarks.report import table
from kfac_func.demo import data
from kfac_func.demo.models import CURVES, DIGITS, autoencoder
from kfac_func.demo.training import batches

RESULTS = Path(__file__).parent / "results"
SECONDS = 10.0


class Problem(NamedTuple):
    """Images, widths, batch, l2, seeds and the steps after which the loss is shown."""

    images: Callable[[], Tensor]
    sizes: tuple[int, ...]
    batch: int
    l2: float
    seeds: range
    marks: tuple[int, ...]


def _curves() -> Tensor:
    return data.curves(2000, torch.Generator().manual_seed(0))


def _small() -> Tensor:
    return data.curves(1000, torch.Generator().manual_seed(0), side=12, sigma=0.8)


PROBLEMS = {
    "small": Problem(_small, (144, 100, 50, 25, 6), 1000, 1e-5, range(3), (50, 100, 300)),
    "curves": Problem(_curves, CURVES, 500, 0.0, range(1), (50, 100, 200)),
    "deep": Problem(_curves, (784, 400, 200, 100, 50, 25, 6), 500, 0.0, range(1), (50, 100, 200)),
    "digits": Problem(data.digits, DIGITS, 128, 0.0, range(20), (50, 100, 200)),
}


class Run(NamedTuple):
    """Losses at the marks, the loss at `SECONDS`, the seconds of one step at the end, and the peak."""

    losses: list[float]
    at_seconds: float | None
    per_step: float
    peak: float


Step = Callable[[Any, Any, Any, torch.Generator], tuple[Any, Any, Tensor]]


def auto(fn: Any, loss: kf.losses.Loss, problem: Problem) -> tuple[Callable[[Any], Any], Step]:
    """`kfac_auto`, nothing set but the objective."""
    made = kf.kfac_auto(fn, loss, l2=problem.l2)

    def step(params: Any, state: Any, batch: Any, generator: torch.Generator) -> tuple[Any, Any, Tensor]:
        params, state, info = made.step(params, state, batch, generator)
        return params, state, info.loss

    return made.init, step


def constrained(fn: Any, loss: kf.losses.Loss, problem: Problem) -> tuple[Callable[[Any], Any], Step]:
    """K-FAC with a norm constraint and momentum."""
    tx = kf.recipes.tselepidis(0.1, damping=0.1, kl_clip=1e-2, t_inv=10, solver="approx", weight_decay=problem.l2)
    run = kf.value_grad_and_stats(fn, loss)

    def step(params: Any, state: Any, batch: Any, generator: torch.Generator) -> tuple[Any, Any, Tensor]:
        value, grads, stats = run(params, batch, generator=generator)
        updates, state = tx.update(grads, state, params, stats=stats)
        return kf.apply_updates(params, updates), state, value

    return tx.init, step


METHODS = {"auto": auto, "constrained": constrained}


def trained(problem: Problem, method: str, seed: int, images: Tensor) -> Run:
    """One run; it goes on to the last mark."""
    fn, params = kf.make_functional(autoencoder(problem.sizes, seed))
    loss = kf.losses.bce_with_logits(reduction="batchmean")
    init, step = METHODS[method](fn, loss, problem)
    state, order = init(params), batches(len(images), problem.batch, seed)
    generator, full = torch.Generator().manual_seed(seed), problem.batch == len(images)
    losses, at_seconds, seconds, peak = [], None, 0.0, 0.0

    def evaluate() -> float:
        with torch.no_grad():
            return float(loss.value(fn(params, images), images))

    for count in range(1, problem.marks[-1] + 1):
        batch = images if full else images[next(order)]
        start = time.perf_counter()
        params, state, value = step(params, state, (batch, batch), generator)
        value = float(value)
        seconds += time.perf_counter() - start
        peak = max(peak, value if value == value else float("inf")) if count > 20 else peak
        if count in problem.marks:
            losses.append(evaluate())
        if at_seconds is None and seconds >= SECONDS:
            at_seconds = evaluate()
    return Run(losses, at_seconds, seconds / problem.marks[-1], peak)


def warmed() -> None:
    """Let torch load what differentiation needs."""
    fn, params = kf.make_functional(autoencoder((4, 3), 0))
    made = kf.kfac_auto(fn, kf.losses.bce_with_logits())
    batch = torch.ones(2, 4), torch.ones(2, 4)
    made.step(params, made.init(params), batch)


def rows(name: str, methods: Sequence[str]) -> list[list[str]]:
    """A row per method and seed; of more than three seeds the worst numbers."""
    problem = PROBLEMS[name]
    images, found = problem.images(), []
    for method in methods:
        runs = [trained(problem, method, seed, images) for seed in problem.seeds]
        if len(runs) > 3:
            worst = [max(run.losses[k] for run in runs) for k in range(len(problem.marks))]
            runs = [Run(worst, None, max(run.per_step for run in runs), max(run.peak for run in runs))]
        for run in runs:
            at = "-" if run.at_seconds is None else f"{run.at_seconds:.2f}"
            shown = [f"{k}: {loss:.2f}" for k, loss in zip(problem.marks, run.losses, strict=True)]
            found.append([name, method, *shown, at, f"{run.peak:.1f}", f"{1e3 * run.per_step:.0f}"])
            print(found[-1], flush=True)
    print(f"{name}: floor {data.entropy_floor(images):.2f}, mean image {data.mean_image_loss(images):.2f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence")
    parser.add_argument("--out", type=Path, help="folder for convergence.md; default: print only")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    configure(options.threads)
    warmed()
    head = ["", "", "loss at step", "", "", f"at {SECONDS:g} s", "peak", "ms per step"]
    text = table([head, *(row for name in options.problems for row in rows(name, options.methods))])
    levels = "\n".join(
        f"* {name}: entropy floor {data.entropy_floor(images):.2f}, mean image {data.mean_image_loss(images):.2f}"
        for name, images in ((name, PROBLEMS[name].images()) for name in options.problems)
    )
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        about = (__doc__ or "").split("\n\n", 2)[2].strip()
        title = "# Convergence with nothing tuned\n\nMade by `python -m benchmarks.convergence` on a 2-core CPU."
        (options.out / "convergence.md").write_text("\n\n".join([title, about, levels, text]) + "\n")


if __name__ == "__main__":
    main()
