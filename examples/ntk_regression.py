r"""A net and its kernel: regression with the empirical neural tangent kernel on handwritten digits.

A wide net that is trained a little moves little: it behaves like its linearisation, and that is kernel regression,

    z(x) = z₀(x) + Θ(x, X) (Θ(X, X) + λ I)⁻¹ (Y − z₀(X)),        Θ(x, x')_{cd} = ⟨∂z_c(x)/∂w, ∂z_d(x')/∂w⟩

with Θ at the initial parameters. λ stands for stopping early. Four predictions of the same one-hot labels are compared:

    net                 trained by Adam on the squared error
    full kernel         the formula, 10 outputs coupled, Θ [N, N, 10, 10] at the initial parameters
    trace kernel        the same kernel for every output, (1/10) Σ_c Θ_cc: a tenth of the size, nearly as good
    trace kernel, after the same at the trained parameters and without z₀: what the net has learnt, as a kernel

Alignment ⟨K, Y Yᵀ⟩ / (‖K‖ ‖Y Yᵀ‖) of the centred kernels says how much the kernel already knows of the labels.

    python examples/ntk_regression.py [--out DIR] [--seed K]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfac_func as kf

LOSS = kf.losses.mse(reduction="batchmean", scale=0.5)
CLASSES = 10
DAMPING = 1e-3  # λ over the mean eigenvalue of Θ(X, X)
SIZES = (20, 50, 100, 200)
COLOURS = {"net": "#D55E00", "full kernel": "#0072B2", "trace kernel": "#56B4E9", "trace kernel, after": "#009E73"}


class Digits(NamedTuple):
    """Images [N, 64] in [0, 1] and labels [N], sorted by label among the training digits."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int, train: int, test: int = 500) -> Digits:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    mine, other = order[:train], order[-test:]
    mine = mine[y[mine].argsort(stable=True)]
    return Digits((x[mine], y[mine]), (x[other], y[other]))


def targets(y: Tensor) -> Tensor:
    """One-hot labels with mean zero."""
    return nn.functional.one_hot(y, CLASSES).float() - 1 / CLASSES


def initial(seed: int, width: int) -> tuple[Callable, dict[str, Tensor]]:
    """A net with one hidden layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kf.make_functional(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, CLASSES)))


def trained(fn: Callable, params: dict[str, Tensor], data: tuple[Tensor, Tensor], steps: int) -> dict[str, Tensor]:
    x, y = data
    gradient = torch.func.grad(lambda p: LOSS.value(fn(p, x), targets(y)))
    tx = kf.adam(3e-3)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient(params), state, params)
        params = kf.apply_updates(params, updates)
    return params


def coupled(theta: Tensor) -> Tensor:
    """[N, M, D, D] as a matrix [N·D, M·D]."""
    return theta.transpose(1, 2).flatten(2).flatten(0, 1)


def solved(kernel: Tensor, residual: Tensor) -> Tensor:
    """(K + λ I)⁻¹ r in double precision, λ relative to the mean eigenvalue of K."""
    kernel = kernel.double()
    damped = kernel + DAMPING * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
    return torch.cholesky_solve(residual.double(), torch.linalg.cholesky(damped)).float()


def regression(fn: Callable, params: dict[str, Tensor], data: Digits, outputs: Any, *, start: float = 1.0) -> Tensor:
    """start · z₀ and the regression of what is left, for the test digits [M, 10]."""
    (x, y), (other, _) = data
    theta = kf.products.empirical_ntk(fn, outputs)
    residual, known = targets(y) - start * fn(params, x), start * fn(params, other)
    if outputs == "full":
        weights = solved(coupled(theta(params, x)), residual.reshape(-1, 1))
        return known + (coupled(theta(params, other, x)) @ weights).reshape(-1, CLASSES)
    return known + theta(params, other, x) @ solved(theta(params, x), residual)


def alignment(kernel: Tensor, y: Tensor) -> float:
    """The cosine of the centred kernel and the centred kernel of the labels."""
    centred = [k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (kernel, targets(y) @ targets(y).T)]
    return torch.cosine_similarity(centred[0].flatten(), centred[1].flatten(), dim=0).item()


def compared(seed: int, train: int, width: int, steps: int) -> tuple[dict[str, float], list[Tensor], dict[str, float]]:
    """Accuracies, the trace kernels before and after training, and their alignments."""
    data = digits(seed, train)
    fn, start = initial(seed, width)
    end = trained(fn, start, data.train, steps)
    predictions = {
        "net": fn(end, data.test[0]),
        "full kernel": regression(fn, start, data, "full"),
        "trace kernel": regression(fn, start, data, "trace"),
        "trace kernel, after": regression(fn, end, data, "trace", start=0.0),
    }
    kernels = [kf.products.empirical_ntk(fn, "trace")(params, data.train[0]) for params in (start, end)]
    names = ("alignment, before", "alignment, after")
    aligned = {name: alignment(kernel, data.train[1]) for name, kernel in zip(names, kernels, strict=True)}
    return {name: accuracy(z, data.test[1]) for name, z in predictions.items()}, kernels, aligned


def accuracy(z: Tensor, y: Tensor) -> float:
    return (z.argmax(1) == y).double().mean().item()


def drawn(curves: dict[int, dict[str, float]], kernels: list[Tensor], aligned: dict[str, float]) -> Figure:
    """Accuracy over the size of the training set, and the kernels of the largest one, digits sorted by label."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, *maps = figure.subplots(1, 3)
    for name, colour in COLOURS.items():
        values = [found[name] for found in curves.values()]
        left.plot(list(curves), values, marker="o", markersize=4, color=colour, label=name)
    left.set(xscale="log", xlabel="training digits", ylabel="accuracy on test digits")
    left.set_xticks(list(curves), [str(size) for size in curves])
    left.minorticks_off()
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    for axes, kernel, (name, value) in zip(maps, kernels, aligned.items(), strict=True):
        axes.imshow((kernel / kernel.diagonal().mean()).numpy(), cmap="viridis", vmin=0, vmax=1)
        axes.set(title=f"{name} {value:.2f}", xticks=[], yticks=[], xlabel="training digits by label")
    return figure


def main(
    out: str | Path | None = "out",
    seed: int = 0,
    sizes: tuple[int, ...] = SIZES,
    width: int = 256,
    steps: int = 300,
) -> dict[str, float]:
    """The figures for the largest training set; `out` is the folder of the plot, None for none."""
    runs = {size: compared(seed, size, width, steps) for size in sizes}
    accuracies, kernels, aligned = runs[max(sizes)]
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        figure = drawn({size: run[0] for size, run in runs.items()}, kernels, aligned)
        figure.savefig(Path(out) / "ntk_regression.png", dpi=130)
    return accuracies | aligned


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the plot")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # two threads on matrices this small are slower than one
    for name, value in main(arguments.out, arguments.seed).items():
        print(f"{name:24}{value:8.3f}")
