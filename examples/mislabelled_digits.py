r"""Which labels are wrong? Self-influence finds flipped labels among handwritten digits.

One label in twenty of the training set is replaced by another one, and a small net is trained on what is there, until
it has learnt most of the wrong labels by heart. Then its own loss says little about them: it is small. The
self-influence

    score[n] = ∇l_nᵀ (F̂ + λ)⁻¹ ∇l_n

says how much the loss on a digit would rise had the net not seen this very digit, to first order. Whoever looks
through the digits in the order of their scores finds most wrong labels in the first tenth.

Beside it stand the norm of the gradient, which is self-influence without curvature, the loss, and chance.

    python examples/mislabelled_digits.py [--out DIR] [--seeds K]
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

FLIPPED = 0.05  # of the training labels
SHOWN = 20  # digits in the plot
LOSS = kf.losses.cross_entropy()
COLOURS = {"self-influence": "#0072B2", "gradient norm": "#E69F00", "loss": "#D55E00", "chance": "0.6"}


class Digits(NamedTuple):
    """Images [N, 64] in [0, 1], the labels given for training [N] and the true ones; and digits for a test."""

    images: Tensor
    given: Tensor
    true: Tensor
    test: tuple[Tensor, Tensor]

    @property
    def wrong(self) -> Tensor:
        return self.given != self.true


def digits(seed: int, train: int = 1437) -> Digits:
    """A random split with flipped labels: each of them is replaced by one of the nine others."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    mine, test = torch.randperm(len(x), generator=generator).tensor_split([train])
    flipped = torch.randperm(train, generator=generator)[: round(FLIPPED * train)]
    given = y[mine].clone()
    given[flipped] = (given[flipped] + torch.randint(1, 10, flipped.shape, generator=generator)) % 10
    return Digits(x[mine], given, y[mine], (x[test], y[test]))


def trained(data: Digits, seed: int, epochs: int = 20, size: int = 128) -> tuple[Callable, dict[str, Tensor]]:
    """A net with two hidden layers of 64 units, and its parameters after K-FAC with a decaying rate."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    fn, params = kf.make_functional(net)
    generator = torch.Generator().manual_seed(seed)
    rate = kf.schedules.cosine_decay(0.03, epochs * -(-len(data.images) // size))
    tx = kf.chain(kf.kfac(damping=1e-2), kf.add_decayed_weights(1e-3), kf.sgd(rate, momentum=0.9))
    step, state = kf.value_grad_and_stats(fn, LOSS), tx.init(params)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.images), generator=generator).split(size):
            batch = data.images[chosen], data.given[chosen]
            _, grads, stats = step(params, batch, generator=generator)
            updates, state = tx.update(grads, state, params, stats=stats)
            params = kf.apply_updates(params, updates)
    return fn, params


def rankings(data: Digits, fn: Callable, params: dict[str, Tensor], size: int = 256) -> dict[str, Tensor]:
    """The suspicion of every training digit [N], by method."""
    batches = list(zip(data.images.split(size), data.given.split(size), strict=True))
    state = kf.fit_curvature(fn, LOSS, params, batches)  # EKFAC with the exact Fisher
    mean = kf.linear_operator(state, params, damping=0.0).trace().item() / sum(p.numel() for p in params.values())
    norms = kf.products.per_example_norms(fn, LOSS)
    return {
        "self-influence": kf.influence.self_influence(fn, LOSS, params, state, batches, damping=0.1 * mean),
        "gradient norm": torch.cat([norms(params, batch) for batch in batches]),
        "loss": nn.functional.cross_entropy(fn(params, data.images), data.given, reduction="none"),
    }


def recalls(scores: Tensor, wrong: Tensor) -> Tensor:
    """The share [N] of the wrong labels among the 1, 2, …, N first."""
    return wrong[scores.argsort(descending=True)].cumsum(0) / wrong.sum()


def figures(found: dict[str, Tensor], wrong: Tensor) -> dict[str, dict[str, float]]:
    """Precision among as many digits as have wrong labels, recall in the first tenth, and recall averaged over all."""
    count, tenth, share = int(wrong.sum()), len(wrong) // 10, wrong.double().mean().item()
    curves = {name: recalls(scores, wrong) for name, scores in found.items()}
    measured = {
        name: {
            "precision@k": curve[count - 1].item(),
            "recall in 10%": curve[tenth - 1].item(),
            "mean recall": curve.mean().item(),
        }
        for name, curve in curves.items()
    }
    return measured | {"chance": {"precision@k": share, "recall in 10%": tenth / len(wrong), "mean recall": 0.5}}


def drawn(data: Digits, found: dict[str, Tensor]) -> Figure:
    """Recall of the methods, and the digits that self-influence suspects most."""
    figure = Figure(figsize=(12.5, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.15])[0]
    axes, wrong = left.subplots(), data.wrong
    looked = torch.arange(1, len(wrong) + 1) / len(wrong)
    for name, scores in found.items():
        axes.plot(looked * 100, recalls(scores, wrong) * 100, color=COLOURS[name], linewidth=2, label=name)
    axes.plot([0, 100], [0, 100], color=COLOURS["chance"], linewidth=1, label="chance")
    axes.axvline(10, color="0.3", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 30), ylim=(0, 102), xlabel="digits looked at (%)", ylabel="wrong labels found (%)")
    axes.set_title(f"{int(wrong.sum())} wrong labels among {len(wrong)}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    first = found["self-influence"].argsort(descending=True)[:SHOWN]
    right.suptitle("highest self-influence: the given label (the true one, where it is another)")
    for axes, n in zip(right.subplots(4, SHOWN // 4).flatten(), first.tolist(), strict=True):
        _digit(axes, data, n)
    return figure


def _digit(axes: Any, data: Digits, n: int) -> None:
    axes.imshow(data.images[n].reshape(8, 8).numpy(), cmap="gray_r")
    axes.set(xticks=[], yticks=[])
    given, true = int(data.given[n]), int(data.true[n])
    axes.set_title(f"{given} ({true})" if given != true else f"{given}", color="0.0" if given == true else "#D55E00")


def main(out: str | Path | None = "out", seed: int = 0) -> dict[str, dict[str, float]]:
    """The figures of every method, and of the net; `out` is the folder of the plot, None for none."""
    data = digits(seed)
    fn, params = trained(data, seed)
    found = rankings(data, fn, params)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        drawn(data, found).savefig(Path(out) / "mislabelled_digits.png", dpi=130)
    return figures(found, data.wrong) | {"net": accuracies(data, fn, params)}


def accuracies(data: Digits, fn: Callable, params: dict[str, Tensor]) -> dict[str, float]:
    """The share of test digits that the net knows, and of wrong labels that it has learnt."""
    answers, (x, y) = fn(params, data.images).argmax(1), data.test
    return {
        "test accuracy": (fn(params, x).argmax(1) == y).double().mean().item(),
        "wrong labels learnt": (answers == data.given)[data.wrong].double().mean().item(),
    }


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """The median of every figure over the runs, and its range."""
    lines = []
    for name, figures in runs[0].items():
        for key in figures:
            values = [run[name][key] for run in runs]
            spread = f"   {min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
            lines.append(f"{name:16}{key:22}{statistics.median(values):.3f}{spread}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of the plot")
    parser.add_argument("--seeds", type=int, default=1, help="runs with other splits, flips and nets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # two threads on matrices this small are slower than one
    print(table([main(arguments.out if k == 0 else None, seed=k) for k in range(arguments.seeds)]))
