"""The command line of the demo: train, report, plot; or search the settings again with `--tune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from kfac_func.demo import data, models
from kfac_func.demo.packages import require
from kfac_func.demo.report import table, verdict
from kfac_func.demo.training import MOMENTUM, RADIUS, Budget, Method, Problem, train
from kfac_func.diagnostics.plots import History, loss_curves

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SETTINGS = {
    "curves": (Method("K-FAC", 0.3), Method("Adam", 0.003), Method("SGD", 0.03)),
    "digits": (Method("K-FAC", 0.1), Method("Adam", 0.003), Method("SGD", 0.01)),
}
FAIRNESS = f"""\
Each method has one tuned number, its rate, from one grid for all, {RATES},
chosen by the training loss at the end of full runs; `--tune` repeats the search. All three are clipped to the global
norm {RADIUS:g}. SGD has momentum {MOMENTUM}, K-FAC none (it did no good). All else is a default of the library.
All start from the same weights and see the same batches. Adam and SGD train for at least as many steps and as many
seconds as K-FAC. Seconds are of training alone. Losses are on the training set: this is about optimisation, not
generalisation."""


def problems(names: str, *, seed: int = 0, steps: int | None = None, quick: bool = False) -> list[Problem]:
    """The problems called "curves", "digits" or "both"; `quick` cuts them down to a few seconds.

    >>> [(p.name, tuple(p.images.shape), p.steps) for p in problems("curves", steps=7, quick=True)]
    [('curves', (200, 784), 7)]
    """
    found = []
    if names in ("curves", "both"):
        images = data.curves(200 if quick else 2000, torch.Generator().manual_seed(seed))
        sizes = (784, 60, 20) if quick else models.CURVES
        found.append(Problem("curves", images, sizes, 100 if quick else 500, 200))
    if names in ("digits", "both"):
        found.append(Problem("digits", data.digits(), models.DIGITS, 300, 400))
    return [problem._replace(steps=steps or (6 if quick else problem.steps)) for problem in found]


def compare(problem: Problem, methods: Sequence[Method], *, seed: int, device: str) -> list[History]:
    """Train with every method: the first for its steps, the others for as many steps and seconds at least.

    A method whose step is cheaper therefore gets more steps.
    """
    histories: list[History] = []
    for method in methods:
        budget = Budget(problem.steps, histories[0].seconds[-1] if histories else 0.0)
        histories.append(_watched(problem, method, budget, seed=seed, device=device))
    return histories


def _watched(problem: Problem, method: Method, budget: Budget, *, seed: int, device: str) -> History:
    from tqdm import tqdm

    total = None if budget.seconds else budget.steps
    with tqdm(total=total, desc=f"{problem.name:<7}{method.name:<6}", unit=" steps", leave=False, disable=None) as bar:

        def progress(done: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            bar.update(done - bar.n)

        every = max(1, problem.steps // 20)
        return train(problem, method, budget, seed=seed, device=device, every=every, progress=progress)


def tune(problem: Problem, *, seed: int, device: str) -> list[Method]:
    """Print the final training loss for every rate of the grid, in runs as long as the demo's; return the best methods.

    The baselines get the seconds of the slowest K-FAC run.
    """
    best, seconds = [], 0.0
    for name in ("K-FAC", "Adam", "SGD"):
        budget, finals = Budget(problem.steps, seconds), {}
        for rate in RATES:
            history = _watched(problem, Method(name, rate), budget, seed=seed, device=device)
            finals[rate] = history.losses[-1]
            seconds = max(seconds, history.seconds[-1]) if name == "K-FAC" else seconds
            print(f"  {name:<6}rate {rate:<6g}{finals[rate]:>12.3f} after {history.steps[-1]} steps", flush=True)
        best.append(Method(name, min(finals, key=lambda rate: finals[rate])))
    return best


def show(problem: Problem, methods: Sequence[Method], histories: Sequence[History], folder: Path) -> None:
    """Print the tables and the verdict of one problem, and write its plot to `folder`."""
    runs = {method.name: history for method, history in zip(methods, histories, strict=True)}
    print(table(runs, leader=methods[0].name))
    print(verdict(runs, leader=methods[0].name, rival="Adam"))
    floor, plateau = data.entropy_floor(problem.images), data.mean_image_loss(problem.images)
    path = loss_curves(
        {f"{method.name}, rate {method.rate:g}": history for method, history in zip(methods, histories, strict=True)},
        folder / f"{problem.name}.png",
        title=f"{problem.name}: training loss of the autoencoder " + "-".join(map(str, problem.sizes)) + "-…",
        ylabel="training loss, nats per image",
        levels={"entropy floor": floor, "mean image": plateau},
    )
    print(f"plot: {path}\n", flush=True)


def introduce(problem: Problem) -> None:
    """Print what is trained on what."""
    floor, plateau = data.entropy_floor(problem.images), data.mean_image_loss(problem.images)
    print(
        f"{problem.name}: {len(problem.images)} images, batch {problem.batch}, autoencoder "
        f"{'-'.join(map(str, problem.sizes))} and back, tanh, linear code.\n"
        f"Loss: sigmoid cross entropy in nats per image; entropy floor {floor:.2f}, mean image {plateau:.2f}."
    )


def parser() -> argparse.ArgumentParser:
    """The options of the command line.

    >>> parser().parse_args(["--data", "digits"]).data
    'digits'
    """
    options = argparse.ArgumentParser(
        "python -m kfac_func.demo", description="K-FAC, Adam and SGD on two autoencoders."
    )
    options.add_argument("--data", choices=("curves", "digits", "both"), default="both")
    options.add_argument("--steps", type=_positive, help="steps of K-FAC (default: 200 on curves, 400 on digits)")
    options.add_argument("--seed", type=int, default=0, help="of data, weights, batches and draws")
    options.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    options.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the plots")
    options.add_argument("--quick", action="store_true", help="a few steps on little data: only shows that it runs")
    options.add_argument("--tune", action="store_true", help="search the rates again first (takes minutes)")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo with command line arguments; return the exit status. A missing package ends it with a message."""
    command = parser()
    options = command.parse_args(arguments)
    try:
        require("matplotlib", "sklearn", "tqdm")
    except ImportError as error:
        command.exit(1, f"{error}\n")
    print(FAIRNESS + "\n")
    for problem in problems(options.data, seed=options.seed, steps=options.steps, quick=options.quick):
        introduce(problem)
        methods = SETTINGS[problem.name]
        if options.tune:
            methods = tune(problem, seed=options.seed, device=options.device)
        print("Rates: " + ", ".join(f"{method.name} {method.rate:g}" for method in methods) + ".\n", flush=True)
        show(problem, methods, compare(problem, methods, seed=options.seed, device=options.device), options.output)
    return 0
