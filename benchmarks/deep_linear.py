r"""Whether a coarse level helps K-FAC on a deep narrow linear net: `python -m benchmarks.deep_linear`.

    python -m benchmarks.deep_linear --out benchmarks/results    writes deep_linear.md

The net is 64 linear layers 10 wide without biases or normalisation, every W = I + 0.1 N(0, 1/10). It learns a Gaussian
linear map of inputs with a covariance of condition 1000, by ½‖z − y‖², without noise. Loss and F depend on the inputs
through (1/N) Σ x xᵀ alone: ten are as good as many. Statistics are exact, and every step refreshes.

Every layer's M⁻¹g aims at the whole residual: 64 together overshoot about 64 times. Plain K-FAC hides this in its
rate; a coarse level cannot, its part has the right length already. So M⁻¹g is taken ω₁ = 1/64 times,
`weights=(1/64, 1)`; rows with ω₁ = 1 do not, at rates 64 times smaller.
Without damping, K-FAC is here the natural gradient up to a factor: what two levels can win, they win from damping.

Every method has at every damping the better of the rates 0.3 / (64 ω₁) and 1 / (64 ω₁) by the median of the losses
after 200 steps:

    loss     that median, and behind it 64 ω₁ times the rate
    steps    the first step from which on the loss stays at or below that of plain K-FAC after 200 steps

"Tuned" takes the damping too that is best for each. Medians are over seeds 1, 2 and 3 (inputs, teacher and weights),
the steps of all three behind them; "-" is never within 200 steps, or a loss that is not finite. Time is that of one
step over one of plain K-FAC, one run at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

import kfac_func as kf
from benchmarks.harness import Race, Step, configure
from benchmarks.report import table

RESULTS = Path(__file__).parent / "results"
DEPTH, WIDTH, EXAMPLES, CONDITION, STEPS = 64, 10, 10, 1e3, 200
DAMPINGS, RATES, SEEDS = (1e-3, 1e-4, 1e-6), (0.3, 1.0), (1, 2, 3)


class Method(NamedTuple):
    """How to make the transformation from the damping, and ω₁, for which the rates are 64 ω₁ too large."""

    make: Callable[..., kf.GradientTransformation]
    first: float = 1 / DEPTH


def _level(space: Any, omega: float = 1 / DEPTH, **options: Any) -> Method:
    return Method(partial(kf.two_level_kfac, space, weights=(omega, 1.0), **options), omega)


PLAIN = "plain K-FAC"
METHODS = {
    PLAIN: Method(kf.kfac, 1.0),
    "residual": _level("residual"),
    "nicolaides, krylov": _level("nicolaides", krylov=True),
    "spectral": _level("spectral"),
    "nicolaides, additive": _level("nicolaides", form="additive"),
    "tselepidis, additive": _level("tselepidis", form="additive"),
    "residual, ω₁ = 1": _level("residual", 1.0),
    "nicolaides": _level("nicolaides"),
    "nicolaides, ω₁ = 1": _level("nicolaides", 1.0),
}


def net() -> nn.Sequential:
    """The architecture."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))).double()


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [64, 10, 10], inputs and targets [N, 10]."""
    generator = torch.Generator().manual_seed(seed)
    weights, (mix, teacher), x = (
        torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
        for shape in ((DEPTH, WIDTH), (2, WIDTH), (EXAMPLES,))
    )
    scales = CONDITION ** -torch.linspace(0, 0.5, WIDTH, dtype=torch.float64)
    x = torch.linalg.qr(x)[0] * EXAMPLES**0.5 * scales @ torch.linalg.qr(mix)[0]
    return torch.eye(WIDTH) + 0.1 * weights / WIDTH**0.5, x, x @ teacher / WIDTH**0.5


def stepper(method: Method) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(weights, λ) -> (params, state), and one step (params, state, x, y, rate) -> (loss, params, state)."""
    fn, like = kf.make_functional(net())
    run = kf.value_grad_and_stats(fn, kf.losses.mse("batchmean", scale=0.5), estimator=kf.estimators.exact())
    tx = method.make(refresh_every=1)

    def first(weights: Tensor, damping: Tensor) -> tuple[Any, Any]:
        params = dict(zip(like, weights, strict=True))
        return params, tx.init(params)._replace(damping=damping)

    def step(params: Any, state: Any, x: Tensor, y: Tensor, rate: Tensor) -> tuple[Tensor, Any, Any]:
        loss, grads, stats = run(params, (x, y))
        updates, state = tx.update(grads, state, params, stats=stats)
        return loss, {name: p - rate * updates[name] for name, p in params.items()}, state

    return first, step


def losses(method: Method, settings: Sequence[tuple[int, float, float]], steps: int) -> Tensor:
    """The loss [settings, steps + 1] after 0, …, `steps` steps of (seed, damping, 64 ω₁ · rate); ∞ once diverged."""
    first, step = stepper(method)
    weights, x, y = (torch.stack(part) for part in zip(*(problem(seed) for seed, _, _ in settings), strict=True))
    damping, rate = torch.tensor([[d, r / DEPTH / method.first] for _, d, r in settings], dtype=torch.float64).unbind(1)
    whole = vmap(lambda w, d, x, y, r: step(*first(w, d), x, y, r))
    loss, params, state = whole(weights, damping, x, y, rate)
    found = [loss]
    for _ in range(steps):
        loss, params, state = vmap(step)(params, state, x, y, rate)
        found.append(loss)
    return torch.stack(found, 1).nan_to_num(nan=torch.inf)


def reached(loss: Tensor, aim: Tensor) -> Tensor:
    """The first step from which on the loss stays at or below the aim, by seed; ∞ where there is none."""
    above = (loss > aim.unsqueeze(1)).double()
    steps = (above * torch.arange(1, loss.shape[1] + 1)).amax(1)
    return torch.where(steps < loss.shape[1], steps, torch.inf)


def times(rounds: int) -> Race:
    """One step of every method against the others, again and again from its second step."""

    def timed(method: Method) -> Step:
        first, step = stepper(method)
        weights, x, y = problem(0)
        now = step(*first(weights, torch.tensor(DAMPINGS[0])), x, y, RATES[0] / DEPTH / method.first)[1:]
        return Step(lambda: step(*now, x, y, RATES[0] / DEPTH / method.first))

    return Race({k: timed(m) for k, m in METHODS.items()}, torch.device("cpu"), 0.0).warm(2).run(rounds)


def compared(steps: int, rounds: int) -> list[list[str]]:
    """The rows of the table."""
    race, curves, cells = times(rounds), {}, {}
    for name, method in METHODS.items():
        run = losses(method, list(product(SEEDS, DAMPINGS, RATES)), steps)
        run = run.view(len(SEEDS), len(DAMPINGS), len(RATES), -1).movedim(0, 2)
        medians, best = run[..., -1].median(-1)[0].min(1)
        own = [run[d, r] for d, r in enumerate(best)]
        curves[name] = [*own, own[int(medians.argmin())]]
        cells[name] = [f"{m:.1e} ({RATES[r]:g})" for m, r in zip(medians.tolist(), best.tolist(), strict=True)]
        print(name, run[..., -1].median(-1)[0].tolist(), flush=True)
    rows = []
    for name, own in curves.items():
        told = [_told(reached(mine, plain[:, -1])) for mine, plain in zip(own, curves[PLAIN], strict=True)]
        both = [cell for pair in zip(cells[name], told[:-1], strict=True) for cell in pair]
        rows.append([name, *both, told[-1], f"{race.ratio(name, PLAIN).median:.2f}"])
    return rows


def _told(steps: Tensor) -> str:
    median, *each = ("-" if step == torch.inf else f"{step:.0f}" for step in (steps.median(), *steps))
    return f"{median} ({', '.join(each)})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, compare, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deep_linear")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    configure(options.threads)
    head = ["", *(f"{what}, λ = {d:g}" for d in DAMPINGS for what in ("loss", "steps")), "steps, tuned", "time"]
    text = table([head, *compared(options.steps, options.rounds)])
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    title = "# Two levels on a deep linear net\n\nMade by `python -m benchmarks.deep_linear` on a 2-core CPU."
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "deep_linear.md").write_text("\n\n".join([title, about, text]) + "\n")


if __name__ == "__main__":
    main()
