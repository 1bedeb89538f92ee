r"""How sure should a net be? Laplace posteriors on handwritten digits.

A small net is trained on 200 digits until it fits them perfectly. It is then surer than it should be. The posterior
N(θ*, (N F̂ + τ I)⁻¹) around its parameters says how far they could move without the training data objecting, and so
which predictions hang on a thread. Prediction is with the linearised net, whose mean is the output of the net itself.

τ is one number, chosen on 100 digits held out: all candidates in one vmap, as the curvature is the same for all, with
the probit formula; the sampled predictions use the same τ. Two other uses of the same data stand beside it. Temperature
scaling divides all outputs by one number, and is as good on these digits. The evidence needs no held-out digits, but it
is far off here: it asks for τ ‖θ*‖² = γ, and a net that fits all its labels has so little curvature left that only
γ = 69 of its 6310 parameters count as determined (seed 0). Its τ is too small by a factor of hundreds.

    python examples/laplace_calibration.py [--out DIR] [--seeds K]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfac_func as kf

BINS = 15
TAUS = torch.logspace(-1, 4, 51)  # candidates of the prior precision
TEMPERATURES = torch.logspace(-0.5, 1, 51)
LAST = ("4.*",)  # the last layer of the net
STYLES = ("-", "-", "--")
COLOURS = {"MAP": "#D55E00", "Laplace, all layers": "#0072B2", "Laplace, last layer": "#009E73"}


class Split(NamedTuple):
    """Images [N, 64] in [0, 1] and labels [N], for training, for one choice, and for the figures."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Tuned(NamedTuple):
    """A posterior, its prior precision from held-out digits, and the losses of all candidates on them."""

    posterior: kf.laplace.Posterior
    tau: Tensor
    losses: Tensor


def digits(seed: int, train: int = 200, held_out: int = 100) -> Split:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([train, held_out, len(x) - train - held_out])
    return Split(*((x[part], y[part]) for part in parts))


def trained(data: tuple[Tensor, Tensor], seed: int, steps: int = 300) -> tuple[Callable, dict[str, Tensor]]:
    """A net with two hidden layers of 50 units, and its parameters after Adam on the whole set."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))
    fn, params = kf.make_functional(net)
    loss, (x, y) = kf.losses.cross_entropy(), data
    gradient = torch.func.grad(lambda p: loss.value(fn(p, x), y))
    tx = kf.adam(1e-2)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient(params), state, params)
        params = kf.apply_updates(params, updates)
    return fn, params


def tuned(posterior: kf.laplace.Posterior, fn: Callable, data: tuple[Tensor, Tensor]) -> Tuned:
    """The prior precision with the smallest loss on held-out digits: one pass through the net for all candidates."""
    x, y = data

    def loss(tau: Tensor) -> Tensor:
        return log_loss(kf.laplace.probabilities(kf.laplace.predict(posterior, fn, x, prior_precision=tau)), y)

    losses = torch.func.vmap(loss)(TAUS)
    tau = TAUS[losses.argmin()]
    return Tuned(kf.laplace.with_prior(posterior, tau), tau, losses)


def log_loss(p: Tensor, y: Tensor) -> Tensor:
    """−(1/N) Σ_n log p_n(y_n), in nats."""
    return -p.gather(1, y[:, None]).clamp(min=1e-30).log().mean()


def reliability(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share of all predictions, mean confidence and accuracy of every bin of confidence, [15]."""
    confidence, answer = p.double().max(1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    inside = nn.functional.one_hot(bins, BINS).double()
    count = inside.sum(0).clamp(min=1)
    mean = (inside * confidence[:, None]).sum(0) / count
    return inside.mean(0), mean, (inside * (answer == y)[:, None]).sum(0) / count


def figures(p: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood in nats and expected calibration error Σ_b share |accuracy − confidence|."""
    share, confidence, accuracy = reliability(p, y)
    return {
        "accuracy": (p.argmax(1) == y).double().mean().item(),
        "nll": log_loss(p, y).item(),
        "ece": (share * (accuracy - confidence).abs()).sum().item(),
    }


def predictions(split: Split, seed: int) -> tuple[dict[str, Tensor], dict[str, Tuned], float]:
    """Class probabilities of the test digits by method, the posteriors behind them, and the evidence's choice of τ."""
    fn, params = trained(split.train, seed)
    loss, x = kf.losses.cross_entropy(), split.test[0]
    z, held = fn(params, x), fn(params, split.held_out[0])
    cooled = torch.stack([log_loss((held / t).softmax(1), split.held_out[1]) for t in TEMPERATURES])
    found = {"MAP": z.softmax(1), "MAP, temperature": (z / TEMPERATURES[cooled.argmin()]).softmax(1)}
    chosen: dict[str, Tuned] = {}
    for name, only in (("Laplace, all layers", None), ("Laplace, last layer", LAST)):
        fitted = kf.laplace.fit(fn, loss, params, [split.train], only=only)
        chosen[name] = tuned(fitted, fn, split.held_out)
        prediction = kf.laplace.predict(chosen[name].posterior, fn, x)
        generator = torch.Generator().manual_seed(seed)
        found[name] = kf.laplace.probabilities(prediction)
        found[f"{name}, sampled"] = kf.laplace.probabilities(prediction, "sampled", samples=200, generator=generator)
        found[f"{name}, nets"] = kf.laplace.sampled_predictive(
            chosen[name].posterior, fn, x, samples=50, generator=generator
        )
    evidence = kf.laplace.tune_prior_precision(chosen["Laplace, all layers"].posterior)
    found["Laplace, all layers, evidence"] = kf.laplace.probabilities(kf.laplace.predict(evidence, fn, x))
    return found, chosen, next(iter(evidence.prior_precision.values())).item()


def drawn(found: dict[str, Tensor], chosen: dict[str, Tuned], evidence: float, y: Tensor) -> Figure:
    """Reliability, confidence of the wrong answers, and the loss of every prior precision on the held-out digits."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    edges = torch.linspace(0, 1, 11)
    for style, (name, colour) in zip(STYLES, COLOURS.items(), strict=True):
        share, confidence, accuracy = reliability(found[name], y)
        seen = share * len(y) >= 5
        left.plot(confidence[seen], accuracy[seen], marker="o", markersize=4, color=colour, label=name)
        top, answer = found[name].max(1)
        counts = torch.histogram(top[answer != y].detach(), edges).hist
        middle.stairs(
            counts, edges, color=colour, linewidth=2, linestyle=style, label=f"{name}: {int(counts.sum())} wrong"
        )
    for name, one in chosen.items():
        right.plot(TAUS, one.losses, color=COLOURS[name], label=name)
        right.plot(one.tau, one.losses.min(), marker="o", color=COLOURS[name])
    right.axvline(evidence, color=COLOURS["Laplace, all layers"], linestyle=":", label="chosen by the evidence")
    right.set_xscale("log")
    _labelled(left, "reliability", "confidence (mean of a bin)", "accuracy")
    _labelled(middle, "wrong answers", "confidence", "test digits")
    _labelled(right, "held-out digits", "prior precision τ", "negative log-likelihood (nats)")
    return figure


def _labelled(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def main(out: str | Path | None = "out", seed: int = 0) -> dict[str, dict[str, float]]:
    """The figures of every method on the test digits; `out` is the folder of the plot, None for none."""
    split = digits(seed)
    found, chosen, evidence = predictions(split, seed)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        drawn(found, chosen, evidence, split.test[1]).savefig(Path(out) / "laplace_calibration.png", dpi=130)
    return {name: figures(p, split.test[1]) for name, p in found.items()}


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """The median of every figure over the runs."""
    lines = [f"{'':32}{'accuracy':>10}{'nll':>10}{'ece':>10}"]
    for name in runs[0]:
        medians = [statistics.median(run[name][key] for run in runs) for key in ("accuracy", "nll", "ece")]
        lines.append(f"{name:32}" + "".join(f"{value:10.4f}" for value in medians))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the plot")
    parser.add_argument("--seeds", type=int, default=1, help="runs with other splits and nets; medians are printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # two threads on matrices this small are slower than one
    print(table([main(arguments.out if k == 0 else None, seed=k) for k in range(arguments.seeds)]))
