"""One K-FAC step of a net with the shape of GPT-2 small (124 million parameters): `python -m benchmarks.large`.

    python -m benchmarks.large --out benchmarks/results     writes large.md and large.json
    python -m benchmarks.large --quick                      a tiny net of the same kind: does it run?

50257 tokens, width 768, 12 layers, 12 heads, learned positions, head tied to the embedding (`--untied`: its own),
weights N(0, 0.02²), random tokens, one sampled vector. All factors are dense but those of more than 4096 rows: the head
has 50257 outputs, whose G is kept as its diagonal (`max_dim=4096, oversize="diagonal"`). The step is clipped by
`clip_by_kl`. Memory is the peak of resident memory of this process, as the kernel saw it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kfac_func as kf
from benchmarks import records
from benchmarks.harness import configure
from benchmarks.memory import peak_resident
from benchmarks.report import checked, facts, plain_parser, table
from benchmarks.workloads import SEED, DecoderLayer, seeded

SETTINGS = {"max_dim": 4096, "oversize": "diagonal", "damping": 1e-2, "rate": 1.0, "clip": 1e-2}


class Shape(NamedTuple):
    """Sizes of the net and of the batch."""

    vocabulary: int = 50257
    width: int = 768
    layers: int = 12
    heads: int = 12
    positions: int = 1024
    sequence: int = 128
    examples: int = 2


TINY = Shape(vocabulary=50, width=16, layers=2, heads=2, positions=16, sequence=8)


class Decoder(nn.Module):
    """Tokens [N, T] -> logits [N, T, vocabulary]; the head is the embedding's matrix or its own."""

    def __init__(self, shape: Shape, tied: bool):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.positions, shape.width)
        self.body = nn.Sequential(*(DecoderLayer(shape.width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.body(self.tokens(x) + self.places(places))))


def one_step(shape: Shape, tied: bool) -> dict[str, Any]:
    """Take the step and say what it took: seconds and peak MB after each part, the loss before and after."""
    model = seeded(lambda: Decoder(shape, tied))
    fn, params = kf.make_functional(model)
    generator = torch.Generator().manual_seed(SEED)
    text = torch.randint(shape.vocabulary, (shape.examples, shape.sequence + 1), generator=generator)
    batch = text[:, :-1].clone(), text[:, 1:].clone()
    step = kf.value_grad_and_stats(fn, kf.losses.cross_entropy(class_dim=-1))
    curvature = kf.curvature.kronecker(max_dim=SETTINGS["max_dim"], oversize=SETTINGS["oversize"])
    link = kf.kfac(curvature, damping=SETTINGS["damping"])
    tx = kf.chain(link, kf.clip_by_kl(SETTINGS["clip"], SETTINGS["rate"]), kf.sgd(SETTINGS["rate"]))
    seconds: dict[str, float] = {}
    peaks = {"model": peak_resident()}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds[name], peaks[name] = time.perf_counter() - start, peak_resident()
        return result

    timed("gradient alone", lambda: step(params, batch, stats=False))
    plan = timed("plan", lambda: kf.make_plan(fn, params, batch[0]))
    before, grads, stats = timed("statistics", lambda: step(params, batch, generator=generator, plan=plan))
    updates, _ = timed("update", lambda: tx.update(grads, tx.init(params), params, stats=stats, refresh=True))
    new = timed("apply", lambda: kf.apply_updates(params, updates))
    after, _, _ = step(new, batch, stats=False)
    return {
        "shape": shape._asdict() | {"tied": tied},
        "parameters": sum(p.numel() for p in model.parameters()),
        "kfac": SETTINGS,
        "seconds": seconds | {"whole step": sum(seconds[name] for name in ("statistics", "update", "apply"))},
        "peak_mb": peaks,
        "loss": {"before": float(before), "after": float(after)},
    }


def rendered(record: dict[str, Any]) -> str:
    """What it took, in words and a table."""
    settings, found = record["settings"], record["step"]
    facts_of_run = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("estimator", "rounds"))
    rows = [["part", "s", "peak MB so far"]]
    rows += [
        [name, f"{s:.2f}", f"{found['peak_mb'].get(name, max(found['peak_mb'].values())):.0f}"]
        for name, s in found["seconds"].items()
    ]
    return "\n\n".join(
        [
            facts_of_run,
            f"{found['parameters'] / 1e6:.1f} million parameters; "
            + ", ".join(f"{key} {value}" for key, value in (found["shape"] | found["kfac"]).items()),
            table(rows),
            f"Peak resident memory {max(found['peak_mb'].values()) * 1e6 / 2**30:.2f} GiB. "
            f"Loss {found['loss']['before']:.4f} before the step, {found['loss']['after']:.4f} after it.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Take the step, print, and write when asked."""
    parser = plain_parser("large", __doc__, 1)
    parser.add_argument("--untied", action="store_true", help="a head of its own: 163 million parameters")
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out", type=Path)
    options = checked(parser, arguments)
    configure(options.threads)
    given = {name: getattr(options, name) for name in ("sequence", "examples", "layers") if getattr(options, name)}
    shape = (TINY if options.quick else Shape())._replace(**given)
    found = one_step(shape, not options.untied)
    record = {"settings": facts(options, torch.device("cpu")), "step": found}
    text = rendered(record)
    print(text)
    if options.out is not None:
        records.write(record, options.out / "large.json")
        (options.out / "large.md").write_text(f"# One step of a large net\n\n{text}\n")
    return record


if __name__ == "__main__":
    main()
