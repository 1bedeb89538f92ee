r"""How near every structure is to the exact curvature of a trained net: `python -m benchmarks.fisher_quality`.

    python -m benchmarks.fisher_quality --out benchmarks/results    writes fisher_quality.md and fisher_quality.png

F is the Gauss-Newton matrix Jᵀ H J of a batch, made by automatic differentiation with no part of the library's
curvature; F_D is its blocks, one per layer. By structure:

    error      ‖F_D − F̂‖ / ‖F_D‖                        Frobenius norms over all blocks together
    spectrum   ‖eig(F_D) − eig(F̂)‖ / ‖eig(F_D)‖         both sorted, all blocks together
    cosine     of (F̂ + λ)⁻¹g with (F + λ)⁻¹g, and with (F_D + λ)⁻¹g, λ in units of tr(F)/dim: the mean over the
               gradients g of eight parts of the batch

Two small nets after 200 steps of Adam, in float64, with the exact estimator on one batch. No random number is left
open: a run gives the same table again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import kfac_func as kf
from benchmarks.harness import configure
from benchmarks.quality_plot import drawn
from benchmarks.report import table
from benchmarks.structures import SPLITS, STRUCTURES
from benchmarks.workloads import GlobalMean, mlp, seeded
from kfac_func.demo.data import curves

RESULTS = Path(__file__).parent / "results"
STEPS, RATE, PARTS, LOOKS = 200, 1e-2, 8, 2
DAMPINGS = (1e-2, 1.0)  # times the mean eigenvalue of F
NAMES = [name + more for name in STRUCTURES for more in (("", ", reduce") if name == "kronecker" else ("",))]
SIGNS = {"estimator": kf.estimators.curvature_prop(64)}  # for what subtracts or squares means: vectors of mean zero
STATISTICS: dict[str, dict[str, Any]] = {
    "kronecker, reduce": {"sharing": "reduce"},
    "kronecker, centred": SIGNS,
    "eigen, mean_gradient": SIGNS,
}
"""Where the statistics are not those of `exact()` with every position on its own."""


class Net(NamedTuple):
    """A model, its batch [N, ...] and its loss."""

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: kf.losses.Loss


class Truth(NamedTuple):
    """A trained net with its exact curvature on the batch.

    whole [P, P] is F, blocks its diagonal blocks, damping the two λ; gradients [P] of the parts of the batch, as trees
    """

    net: Net
    fn: Any
    params: Any
    data: tuple[Tensor, Tensor]
    whole: Tensor
    blocks: dict[str, Tensor]
    dampings: tuple[float, ...]
    gradients: list[Any]


class Quality(NamedTuple):
    """The figures of one structure on one net; cosines by damping."""

    error: float
    spectrum: float
    whole: tuple[float, ...]
    blocks: tuple[float, ...]


def _pictures() -> tuple[Tensor, Tensor]:
    """Curve images of 4 x 4 pixels, to be reproduced."""
    images = curves(128, torch.Generator().manual_seed(1)).view(-1, 1, 28, 28)
    small = F.avg_pool2d(images, 7).flatten(1).double()
    small = (small / small.max()).clamp(0, 1)
    return small, small.clone()


def _gratings() -> tuple[Tensor, Tensor]:
    """Noisy plane waves on maps of 6 x 9 pixels in two channels, a quarter of a wave apart; the class is one of four
    directions.
    """
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(128) % 4
    angle, phase = classes * torch.pi / 4, 2 * torch.pi * torch.rand(128, generator=generator)
    u, v = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    waves = angle.cos().view(-1, 1, 1) * u + angle.sin().view(-1, 1, 1) * v + phase.view(-1, 1, 1)
    images = torch.stack([waves.sin(), waves.cos()], dim=1) + torch.randn(128, 2, 6, 9, generator=generator)
    return images.double(), classes


def _convolutional() -> nn.Module:
    convolutions = [nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 7, (2, 3), stride=(2, 1)), nn.Tanh()]
    return nn.Sequential(*convolutions, GlobalMean(), nn.Linear(7, 4))


NETS = {
    "mlp": Net(
        "autoencoder 16-12-5-12-16, tanh, on curve images",
        lambda: mlp((16, 12, 5, 12, 16), nn.Tanh, linear=(1,)),
        _pictures,
        kf.losses.bce_with_logits(reduction="batchmean"),
    ),
    "conv": Net(
        "two convolutions on maps of 6 x 9, tanh, mean, linear, on noisy gratings",
        _convolutional,
        _gratings,
        kf.losses.cross_entropy(),
    ),
}


def trained(net: Net, steps: int = STEPS) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """The step function, the parameters after some steps of Adam, and the batch."""
    fn, params = kf.make_functional(seeded(net.model).double())
    step, tx, data = kf.value_grad_and_stats(fn, net.loss, estimator=kf.estimators.exact()), kf.adam(RATE), net.batch()
    state = tx.init(params)
    for _ in range(steps):
        _, grads, _ = step(params, data, stats=False)
        updates, state = tx.update(grads, state, params)
        params = kf.apply_updates(params, updates)
    return fn, params, data


def by_block(leaves: dict[str, Tensor], lead: int = 0) -> dict[str, Tensor]:
    """[*lead, p] for every layer: the row-major order of [W | b]."""
    return {
        path: torch.cat([w.flatten(lead + 1), leaves[path[:-6] + "bias"].unsqueeze(-1)], -1).flatten(lead)
        for path, w in leaves.items()
        if path.endswith("weight")
    }


def flat(leaves: dict[str, Tensor]) -> Tensor:
    """[P], block after block."""
    return torch.cat(list(by_block(leaves).values()))


def truth(net: Net, steps: int = STEPS) -> Truth:
    """Train, and take F = Jᵀ H J with J the Jacobian of all outputs and H the Hessian of the loss in them."""
    fn, params, (x, y) = trained(net, steps)
    step = kf.value_grad_and_stats(fn, net.loss, estimator=kf.estimators.exact())
    z = fn(params, x)
    hessian = jacrev(grad(lambda z: net.loss.value(z, y)))(z).reshape(z.numel(), z.numel())
    own = jacrev(lambda p, example: fn(p, example.unsqueeze(0)).squeeze(0))
    jacobians = {name: j.flatten(0, 1) for name, j in by_block(vmap(own, (None, 0))(params, x), 2).items()}
    blocks = {name: j.mT @ hessian @ j for name, j in jacobians.items()}
    j = torch.cat(list(jacobians.values()), dim=-1)
    whole = j.mT @ hessian @ j
    mean = float(whole.trace()) / len(whole)
    parts = zip(x.chunk(PARTS), y.chunk(PARTS), strict=True)
    gradients = [step(params, part, stats=False)[1] for part in parts]
    return Truth(net, fn, params, (x, y), whole, blocks, tuple(mean * d for d in DAMPINGS), gradients)


def quality(true: Truth, name: str) -> Quality:
    """The figures of one structure. It sees the same batch twice, so that warm starts have been of use."""
    settings: dict[str, Any] = {"estimator": kf.estimators.exact()} | STATISTICS.get(name, {})
    step = kf.value_grad_and_stats(true.fn, true.net.loss, **settings)
    _, _, stats = step(true.params, true.data, generator=torch.Generator().manual_seed(0))
    assert stats is not None
    make = STRUCTURES[name.removesuffix(", reduce")]
    solutions, dense = [], {}
    for damping in true.dampings:
        state = kf.kfac(make(), damping=damping, split=SPLITS.get(name, "pi")).init(true.params)
        for _ in range(LOOKS):
            state = kf.observe(state, stats)
        dense = state.rules.value.curvature.dense(state.curvature)
        solutions.append([flat(kf.precondition(state, g)) for g in true.gradients])
    spectra = [torch.cat([torch.linalg.eigvalsh(m[k]) for k in true.blocks]).sort()[0] for m in (true.blocks, dense)]
    norm = sum(float(m.square().sum()) for m in true.blocks.values()) ** 0.5
    distance = sum(float((m - dense[k]).square().sum()) for k, m in true.blocks.items()) ** 0.5
    cosines = [
        tuple(_cosine(matrix, damping, true, own) for damping, own in zip(true.dampings, solutions, strict=True))
        for matrix in (true.whole, torch.block_diag(*true.blocks.values()))
    ]
    return Quality(distance / norm, float((spectra[0] - spectra[1]).norm()) / norm, *cosines)


def _cosine(matrix: Tensor, damping: float, true: Truth, own: list[Tensor]) -> float:
    """The mean cosine with (matrix + λ)⁻¹ g."""
    gs = torch.stack([flat(g) for g in true.gradients], dim=-1)
    wanted = torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), gs)
    return float(torch.cosine_similarity(wanted, torch.stack(own, dim=-1), dim=0).mean())


ORDERS = (
    ("eigen", "kronecker"),
    ("kpsvd", "kronecker"),
    ("deflation", "kpsvd"),
    ("deflation, rank 4", "deflation"),
    ("corrected", "kronecker"),
    ("lanczos", "kpsvd"),
)
"""Pairs of which the first has no larger error: theorems (for power and Lanczos steps that have converged)."""


def broken(found: dict[str, Quality]) -> list[str]:
    """The theorems that the figures contradict."""
    orders = [f"{a} > {b}" for a, b in ORDERS if found[a].error > found[b].error * (1 + 1e-6)]
    exact = [
        f"{name} is not exact"
        for name, one in found.items()
        if (name in ("block_diagonal", "full") and one.error > 1e-9)
        or (name == "block_diagonal" and min(one.blocks) < 1 - 1e-9)
        or (name == "full" and min(one.whole) < 1 - 1e-9)
    ]
    return orders + exact


def rendered(net: Net, found: dict[str, Quality]) -> str:
    """The table of one net."""
    units = [f"λ = {d:g}" for d in DAMPINGS]
    head = ["", "error", "spectrum", *(f"cosine, {u}" for u in units), *(f"with F_D, {u}" for u in units)]
    rows = [
        [name, f"{q.error:.3f}", f"{q.spectrum:.3f}", *(f"{c:.3f}" for c in (*q.whole, *q.blocks))]
        for name, q in found.items()
    ]
    verdict = "Found: " + ("; ".join(broken(found)) or "all of these orders, and no exception") + "."
    return f"## {net.title}\n\n{table([head, *rows])}\n\n{verdict}"


def report(found: dict[str, dict[str, Quality]]) -> str:
    """All tables, with what their columns mean and what is expected."""
    meaning = (__doc__ or "").split("\n\n", 2)[2]
    orders = "; ".join(f"{a} ≤ {b}" for a, b in ORDERS)
    return "\n\n".join(
        [
            "# How near every structure is to the exact curvature",
            "Made by `python -m benchmarks.fisher_quality`.",
            "![the same figures as a plot](fisher_quality.png)",
            meaning.strip(),
            f"Expected of the errors: {orders}.\nblock_diagonal and full have none, and cosine 1 with their own F.",
            "Where the statistics differ: `reduce` averages inputs and sums gradients over positions; `centred`\n"
            "and `mean_gradient` want vectors of mean zero and get 64 random signs per example (`curvature_prop`).",
            *(rendered(NETS[net], one) for net, one in found.items()),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Quality]]:
    """Train, compare, print, and write the table and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fisher_quality")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    configure(options.threads)
    found = {}
    for net in options.nets:
        true = truth(NETS[net], options.steps)
        found[net] = {name: quality(true, name) for name in NAMES}
    text = report(found)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fisher_quality.md").write_text(text + "\n")
    drawn({net: {name: one._asdict() for name, one in rows.items()} for net, rows in found.items()}, options.out)
    return found


if __name__ == "__main__":
    main()
