r"""Which digits does a net have something to learn from? Gradients and Fishers of single examples.

A small net is trained on handwritten digits. Every test digit then has a gradient of its own, V_n = ∂l_n/∂w, and a
Fisher of its own, F_n = J_nᵀ Λ_n J_n. Two numbers sum them up, and neither needs V_n or J_n to be formed:

    ‖V_n‖       how far the digit would push the parameters; needs the label
    tr F_n      how much the prediction says about the parameters; needs no label

Few digits carry most of both. The trace is large where the net hesitates: among the digits with the largest traces are
most of those that it gets wrong, found without a single label.

    python examples/per_sample_fisher.py [--out DIR] [--seed K]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfac_func as kf

LOSS = kf.losses.cross_entropy()
SHOWN = 20  # digits in the plot
RIGHT, WRONG = "#0072B2", "#D55E00"


class Digits(NamedTuple):
    """Images [N, 64] in [0, 1] and labels [N]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Found(NamedTuple):
    """Of every test digit [N]: norm of the gradient, trace of the Fisher, and whether the net is wrong."""

    norms: Tensor
    traces: Tensor
    wrong: Tensor


def digits(seed: int, train: int = 800) -> Digits:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    mine, other = order.tensor_split([train])
    return Digits((x[mine], y[mine]), (x[other], y[other]))


def trained(data: tuple[Tensor, Tensor], seed: int, steps: int) -> tuple[Callable, dict[str, Tensor]]:
    """A net with two hidden layers of 64 units, and its parameters after Adam on the whole set."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    fn, params = kf.make_functional(net)
    x, y = data
    gradient = torch.func.grad(lambda p: LOSS.value(fn(p, x), y))
    tx = kf.adam(1e-2)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient(params), state, params)
        params = kf.apply_updates(params, updates)
    return fn, params


def timed(run: Callable[[], Any], repeats: int = 3) -> float:
    """The best of a few runs in milliseconds, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def share_of_top(values: Tensor, fraction: float = 0.1) -> float:
    """The part of the sum that the largest tenth has."""
    return (values.sort(descending=True).values[: round(fraction * len(values))].sum() / values.sum()).item()


def among_top(found: Found, fraction: float = 0.1) -> float:
    """The part of all wrong answers that is among the tenth with the largest traces."""
    top = found.traces.argsort(descending=True)[: round(fraction * len(found.traces))]
    return (found.wrong[top].sum() / found.wrong.sum()).item()


def drawn(found: Found, images: Tensor) -> Figure:
    """Distributions of norms and traces, the two against each other, and the digits with the largest traces."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 2])
    plots: Any = grid[0].subgridspec(1, 3).subplots()
    for axes, values, name in zip(plots, found[:2], ("gradient norm ‖∇l‖", "Fisher trace tr F"), strict=False):
        _histogram(axes, values, found.wrong, name)
    for wrong, colour in ((False, RIGHT), (True, WRONG)):
        chosen = found.wrong == wrong
        plots[2].scatter(found.traces[chosen], found.norms[chosen], s=9, color=colour, alpha=0.6)
    plots[2].set(xscale="log", yscale="log", xlabel="Fisher trace tr F", ylabel="gradient norm ‖∇l‖")
    cells: Any = grid[1].subgridspec(2, SHOWN // 2).subplots()
    for axes, n in zip(cells.ravel(), found.traces.argsort(descending=True).tolist(), strict=False):
        axes.imshow(images[n].reshape(8, 8).numpy(), cmap="gray_r")
        axes.set_title(f"{found.traces[n]:.0f}", fontsize=9, color=WRONG if found.wrong[n] else RIGHT)
        axes.axis("off")
    return figure


def _histogram(axes: Any, values: Tensor, wrong: Tensor, name: str) -> None:
    low, high = values.clamp(min=1e-6).log10().aminmax()
    edges = torch.logspace(low.item(), high.item(), 41)
    for chosen, colour, label in ((~wrong, RIGHT, "net is right"), (wrong, WRONG, "net is wrong")):
        axes.hist(values[chosen].numpy(), bins=edges.numpy(), color=colour, alpha=0.7, label=label)
    axes.set(xscale="log", xlabel=name, ylabel="test digits")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def main(out: str | Path | None = "out", seed: int = 0, steps: int = 150) -> dict[str, float]:
    """The figures of one net; `out` is the folder of the plot, None for none."""
    data = digits(seed)
    fn, params = trained(data.train, seed, steps)
    x, y = data.test
    norms, traces = kf.products.per_example_norms(fn, LOSS), kf.products.per_example_traces(fn, LOSS)
    found = Found(norms(params, data.test), traces(params, data.test), fn(params, x).argmax(1) != y)
    diagonal = kf.products.fisher_diagonal(fn, LOSS)(params, data.test)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        drawn(found, x).savefig(Path(out) / "per_sample_fisher.png", dpi=130)
    mapped = kf.products.per_example_norms(fn, LOSS, route="vmap")
    return {
        "accuracy": 1 - found.wrong.double().mean().item(),
        "norm: median": found.norms.median().item(),
        "norm: largest": found.norms.max().item(),
        "norm: sum of squares in the top 10%": share_of_top(found.norms**2),
        "trace: median": found.traces.median().item(),
        "trace: largest": found.traces.max().item(),
        "trace: sum in the top 10%": share_of_top(found.traces),
        "trace: mean over examples": found.traces.mean().item(),
        "trace of the diagonal": sum(leaf.sum().item() for leaf in diagonal.values()),
        "wrong answers in the top 10% of traces": among_top(found),
        "ms, norms": timed(lambda: norms(params, data.test)),
        "ms, norms by vmap": timed(lambda: mapped(params, data.test)),
        "ms, traces": timed(lambda: traces(params, data.test)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the plot")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # two threads on matrices this small are slower than one
    for name, value in main(arguments.out, arguments.seed).items():
        print(f"{name:42}{value:12.4g}")
