r"""Eight nets for little more than one: an ensemble trained by K-FAC in a single vmap.

Every net has its own initial parameters, its own batches, its own draws for the Fisher and its own K-FAC state; all of
them are stacked, and one call of the step moves all. The mean of their predicted probabilities is a better forecast
than those of a typical member,

    −log (1/M) Σ_m p_m(y)  ≤  (1/M) Σ_m −log p_m(y)          (Jensen: − log is convex)

and where the members disagree, the mean is less sure.

    python examples/ensemble.py [--out DIR] [--steps T]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

import kfac_func as kf

BATCH, REFRESH_EVERY, TIMED = 100, 5, 10
LOSS = kf.losses.cross_entropy()


class Digits(NamedTuple):
    """Images [N, 64] in [0, 1] and labels [N] of the digits to learn from, and of the test."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(generator: torch.Generator, train: int = 500) -> Digits:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=generator)
    first, rest = order[:train], order[train:]
    return Digits(x[first], y[first], x[rest], y[rest])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def nets(members: int, seed: int) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """One pure function, and the parameters of all members stacked: [members, ...] at every leaf."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = [net() for _ in range(members)]
    fn, _ = kf.make_functional(modules[0])
    stacked, _ = stack_module_state(modules)
    return fn, {name: leaf.detach() for name, leaf in stacked.items()}


def stepper(fn: Callable[..., Tensor], tx: kf.GradientTransformation) -> Callable[..., Any]:
    """The step of ONE member: (params, state, batch, noise, refresh) -> (params, state, loss)."""
    step = kf.value_grad_and_stats(fn, LOSS)

    def train(params: Any, state: Any, batch: Any, noise: Tensor, refresh: bool) -> Any:
        value, grads, stats = step(params, batch, noise=noise)
        updates, state = tx.update(grads, state, params, stats=stats, refresh=refresh)
        return kf.apply_updates(params, updates), state, value

    return train


def batches(data: Digits, members: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A batch of its own for every member, and the uniform numbers that its draws from the model take."""
    picked = torch.randint(len(data.x), (members, BATCH), generator=generator)
    return (data.x[picked], data.y[picked]), torch.rand(members, 1, BATCH, generator=generator)


def log_loss(p: Tensor, y: Tensor) -> Tensor:
    """−log p(y) in nats, mean over examples; p [..., N, C]."""
    return -p[..., torch.arange(len(y)), y].log().mean(-1)


def accuracy(p: Tensor, y: Tensor) -> Tensor:
    return (p.argmax(-1) == y).double().mean(-1)


def timed(fn: Callable[..., Tensor], tx: Any, params: dict[str, Tensor], drawn: Any) -> dict[str, float]:
    """Milliseconds of a step of all members, in one vmap and one after the other, without and with a refresh."""
    train, (batch, noise) = stepper(fn, tx), drawn
    alone = []
    for k in range(len(noise)):
        own = {name: leaf[k] for name, leaf in params.items()}
        rest = (batch[0][k], batch[1][k]), noise[k]
        alone.append((own, train(own, tx.init(own), *rest, True)[1], *rest))
    _, state, _ = vmap(lambda p, *rest: train(p, tx.init(p), *rest, True))(params, *drawn)

    def together(refresh: bool) -> None:
        vmap(lambda *args: train(*args, refresh))(params, state, batch, noise)

    def one_by_one(refresh: bool) -> None:
        for one in alone:
            train(*one, refresh)

    kinds = {"plain": False, "refresh": True}
    return {f"vmap, {kind}": milliseconds(together, refresh) for kind, refresh in kinds.items()} | {
        f"one by one, {kind}": milliseconds(one_by_one, refresh) for kind, refresh in kinds.items()
    }


def milliseconds(run: Callable[[bool], None], refresh: bool) -> float:
    """The median of some calls, after two that do not count."""
    times = []
    for _ in range(TIMED + 2):
        start = time.perf_counter()
        run(refresh)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def trained(
    fn: Callable[..., Tensor], tx: Any, params: dict[str, Tensor], data: Digits, steps: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], list[dict[str, list[float]]]]:
    """The stacked parameters after some steps, and what the test digits said along the way."""
    train, state, told = stepper(fn, tx), vmap(tx.init)(params), []
    for t in range(steps):
        batch, noise = batches(data, len(params["0.weight"]), generator)
        move = vmap(lambda *args, t=t: train(*args, t % REFRESH_EVERY == 0))
        params, state, _ = move(params, state, batch, noise)
        if (t + 1) % max(1, steps // 20) == 0 or t == steps - 1:
            told.append(judged(fn, params, data) | {"step": [t + 1]})
    return params, told


def judged(fn: Callable[..., Tensor], params: dict[str, Tensor], data: Digits) -> dict[str, list[float]]:
    """Accuracy and log loss on the test digits of every member, and of the mean of their probabilities."""
    p = vmap(fn, in_dims=(0, None))(params, data.test_x).double().softmax(-1)
    return {
        "member_accuracy": accuracy(p, data.test_y).tolist(),
        "member_nll": log_loss(p, data.test_y).tolist(),
        "ensemble_accuracy": [accuracy(p.mean(0), data.test_y).item()],
        "ensemble_nll": [log_loss(p.mean(0), data.test_y).item()],
    }


def drawn(told: list[dict[str, list[float]]], times: dict[str, float], members: int) -> Figure:
    """Log loss and error of members and ensemble along the steps, and what a step costs."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = [one["step"][0] for one in told]
    panels = (
        (left, "nll", lambda x: x, (0.1, 0.2, 0.5, 1, 2)),
        (middle, "accuracy", lambda x: 100 * (1 - x), (3, 5, 10, 20, 50)),
    )
    for axes, key, shown, ticks in panels:
        for k in range(members):
            line = [shown(one[f"member_{key}"][k]) for one in told]
            axes.plot(steps, line, color="#56B4E9", linewidth=1, label="members" if k == 0 else None)
        axes.plot(
            steps, [shown(one[f"ensemble_{key}"][0]) for one in told], color="#D55E00", linewidth=2.5, label="mean"
        )
        axes.set(xlabel="step", yscale="log")
        axes.set_yticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.legend(frameon=False)
    left.set_title("log loss on the test digits [nats]")
    middle.set_title("error on the test digits [%]")
    bars = right.bar(range(len(times)), list(times.values()), color=["#0072B2"] * 2 + ["0.6"] * 2)
    right.bar_label(bars, fmt="%.0f")
    right.set_xticks(range(len(times)), [name.replace(", ", "\n") for name in times])
    right.set_title(f"a step of all {members} members [ms]")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(steps: int = 60, members: int = 8, out: str | Path | None = None, seed: int = 0) -> dict[str, float]:
    """Train, judge, time and draw; the figures by name. Times are in milliseconds for a step of all members."""
    generator = torch.Generator().manual_seed(seed)
    data = digits(generator)
    fn, params = nets(members, seed)
    rate = kf.schedules.cosine_decay(0.3, steps, alpha=0.05)
    tx = kf.chain(kf.kfac(damping=0.1), kf.clip_by_kl(0.01, rate), kf.sgd(rate, momentum=0.9))
    params, told = trained(fn, tx, params, data, steps, generator)
    times = timed(fn, tx, params, batches(data, members, generator))
    last = told[-1]
    found = {
        "member_accuracy": statistics.mean(last["member_accuracy"]),
        "best_member_accuracy": max(last["member_accuracy"]),
        "ensemble_accuracy": last["ensemble_accuracy"][0],
        "member_nll": statistics.mean(last["member_nll"]),
        "best_member_nll": min(last["member_nll"]),
        "ensemble_nll": last["ensemble_nll"][0],
        **times,
    }
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        drawn(told, times, members).savefig(folder / "ensemble.png", dpi=150)
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An ensemble of nets on digits, trained by K-FAC in one vmap.")
    parser.add_argument("--out", type=Path, help="folder for the plot")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--members", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)  # two threads on matrices this small are slower than one
    options = parsed()
    for name, value in main(options.steps, options.members, options.out).items():
        print(f"{name:<24}{value:10.4f}" if value < 10 else f"{name:<24}{value:10.1f}")
