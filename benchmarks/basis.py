"""The warm refresh of EKFAC's bases against `torch.linalg.eigh`, on the factors of W1 while it trains: cost and effect.

    python -m benchmarks.basis --data curves --threads 1 2
    python -m benchmarks.basis --burn 300 --then 0.03 --decay 0.99    # a slowly drifting stream

Cost: ratios to eigh inside interleaved rounds. Effect: ‖v − v_eigh‖ / ‖v_eigh‖ of the solved gradient, each variant
with averages of S in its own bases; "kept" never refreshes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_func as kf
from benchmarks.harness import Race, Step, configure, spread
from benchmarks.workloads import SEED, WORKLOADS
from kfac_func.blocks import pack
from kfac_func.curvature import Batch
from kfac_func.curvature.eigen import Bases, EigenState, reexpressed
from kfac_func.demo.data import curves
from kfac_func.linalg.rotation import refreshed_basis
from kfac_func.state import inside

EVERY, WIDE = 10, 1000
DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4)
Refresh = Callable[[Tensor, Tensor], Tensor]


class Moment(NamedTuple):
    """One step of the stream: the blocks of the batch, the averages of A and G, the gradients; all by block."""

    blocks: dict[str, Any]
    factors: dict[str, Any]
    grads: dict[str, Tensor]


def eigh(a: Tensor, _: Tensor) -> Tensor:
    """The basis made anew."""
    return torch.linalg.eigh(a)[1]


WARM: dict[str, Refresh] = {
    f"{share:g} x{sweeps}": lambda a, old, sweeps=sweeps, share=share: refreshed_basis(a, old, sweeps, share)
    for share in (0.125, 0.2, 0.25, 0.5)
    for sweeps in (1, 2)
}


def pictures(data: str) -> Iterator[Tensor]:
    """Batches of 500: the one of the workload again and again, or of the curves of the demo."""
    generator, workload = torch.Generator().manual_seed(SEED), WORKLOADS["W1"]
    images = curves(5000, generator) if data == "curves" else workload.batch(workload.examples)[0]
    while True:
        yield images[torch.randperm(len(images), generator=generator)[: workload.examples]]


def stream(data: str, decay: float, rate: Callable[[Tensor], Tensor]) -> Iterator[Moment]:
    """What W1 shows at every step while K-FAC trains it with the learning rate `rate(step)`."""
    workload, generator = WORKLOADS["W1"], torch.Generator().manual_seed(SEED)
    fn, params = kf.make_functional(workload.model())
    step = kf.value_grad_and_stats(fn, workload.loss)
    tx = kf.chain(kf.kfac(decay=decay, refresh_every=EVERY), kf.clip_by_global_norm(10.0), kf.sgd(rate))
    state = tx.init(params)
    for batch in pictures(data):
        _, grads, stats = step(params, (batch, batch), generator=generator)
        assert stats is not None
        updates, state = tx.update(grads, state, params, stats=stats)
        params, blocks = kf.apply_updates(params, updates), stats.blocks()
        packed = {name: pack(block.layout, grads) for name, block in blocks.items()}
        yield Moment(blocks, inside(state)[0].curvature.matrix, packed)


def followed(state: Any, refresh: Refresh) -> EigenState:
    """The state with refreshed bases, its scalings re-expressed in them."""
    (a, g), old = state.factors[:2], state.bases
    new = Bases(refresh(a, old.a), refresh(g, old.g))
    return EigenState(state.factors, new, reexpressed(state.scalings, old, new))


def effect(moments: Iterator[Moment], decay: float, refreshes: int) -> None:
    """Follow every variant along the stream and print, refresh by refresh, how far its solved gradient is off."""
    own = kf.curvature.eigen()
    variants: dict[str, Refresh] = {"eigh": eigh, "kept": lambda a, old: old, **WARM}
    states: dict[tuple[str, str], Any] = {}
    for time in range(1, EVERY * refreshes + 1):
        seen, due, squares = next(moments), time % EVERY == 0, {}
        fraction = torch.tensor(max(1 - decay, 1 / time))
        for name, block in seen.blocks.items():
            for variant, refresh in variants.items():
                state = states.get((variant, name), EigenState(seen.factors[name], (), ()))
                state = state._replace(factors=seen.factors[name])
                if time == 1:
                    state = own.refresh(state, fraction, "")
                elif due:
                    state = followed(state, refresh)
                assert own.scale is not None
                state = states[variant, name] = own.scale(state, Batch((), lambda ask, b=block: ask(b)), fraction)
                for damping in DAMPINGS if due else ():
                    v = own.solve(own.factorize(state, torch.tensor(damping), ""), seen.grads[name])
                    exact = v if variant == "eigh" else squares["eigh", damping, name][0]
                    squares[variant, damping, name] = v, float((v - exact).square().sum()), float(v.square().sum())
        for damping in DAMPINGS if due else ():
            print(f"\nrefresh {time // EVERY}, damping {damping:g}: all layers, then {', '.join(seen.blocks)}")
            for variant in list(variants)[1:]:
                off = [squares[variant, damping, name][1] for name in seen.blocks]
                size = [squares["eigh", damping, name][2] for name in seen.blocks]
                each = " ".join(f"{(x / y) ** 0.5:.3f}" for x, y in zip(off, size, strict=True))
                print(f"  {variant:9} {(sum(off) / sum(size)) ** 0.5:.3f}   {each}", flush=True)


def cost(moments: Iterator[Moment], threads: int, rounds: int) -> None:
    """Print the time of a refresh of all factors, and of those 1000 wide alone, and how many times cheaper it is."""
    configure(threads)
    before = next(moments).factors
    after = [next(moments).factors for _ in range(EVERY)][-1]
    pairs = [(after[name][k], eigh(old, old)) for name, found in before.items() for k, old in enumerate(found[:2])]
    for title, some in (("all", pairs), ("1000 wide", [p for p in pairs if WIDE <= len(p[0]) <= WIDE + 1])):
        steps = {
            name: Step(lambda refresh=refresh, some=some: [refresh(a, u) for a, u in some])
            for name, refresh in {"eigh": eigh, **WARM}.items()
        }
        race = Race(steps, torch.device("cpu"), block_seconds=0.0).warm().run(rounds)
        print(f"\n{title}: {len(some)} factors, {threads} threads; ms, times cheaper than eigh [quartiles]")
        for name in steps:
            times = spread([1 / ratio for ratio in race.ratios({name: 1.0}, "eigh")])
            print(f"  {name:9} {race.milliseconds(name):8.1f}   {times}", flush=True)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=("fixed", "curves"), default="curves")
    parser.add_argument("--burn", type=int, default=100, help="K-FAC steps before the measurements")
    parser.add_argument("--rate", type=float, default=0.3, help="learning rate")
    parser.add_argument("--then", type=float, help="learning rate after the burn-in (default: the same)")
    parser.add_argument("--decay", type=float, default=0.95, help="of the averages of A, G and S")
    parser.add_argument("--refreshes", type=int, default=4, help="refreshes to follow; 0: only the cost")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    then = options.rate if options.then is None else options.then

    def rate(step: Tensor) -> Tensor:
        return torch.where(step < options.burn, options.rate, then)

    moments = islice(stream(options.data, options.decay, rate), options.burn, None)
    for threads in options.threads:
        cost(moments, threads, options.rounds)
    effect(moments, options.decay, options.refreshes)


if __name__ == "__main__":
    main()
