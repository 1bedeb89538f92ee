"""Verdicts by construct: failures first, with a seed to reproduce each; then what is refused."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from tests.fuzz.bodies import HOSTILE
from tests.fuzz.mixing import WRAPPERS
from tests.fuzz.modules import HOSTILE_MODULES
from tests.fuzz.verdicts import FAILURES, Verdict

BOLD = set(HOSTILE) | set(WRAPPERS) | set(HOSTILE_MODULES)
BORING = ("N = ", "head: ", "mse", "bce", "cross-entropy", "float", "nn activation", "params ", "inputs ", "batch: ")


def blamed(names: tuple[str, ...], rates: dict[str, float]) -> str:
    """The construct of a case whose cases go wrong most often."""
    return max(names, key=lambda name: rates.get(name, 0.0), default="nothing")


def rates(verdicts: list[Verdict], kinds: Iterable[str]) -> dict[str, float]:
    """How often the cases with a construct end in one of these kinds."""
    bad, all_, kinds = Counter(), Counter(), set(kinds)
    for seed, names in {(v.seed, v.names) for v in verdicts}:
        del seed
        all_.update(set(names))
    for _, names in {(v.seed, v.names) for v in verdicts if v.kind in kinds}:
        bad.update(set(names))
    return {name: _weight(name) * bad[name] / (all_[name] + 3) for name in all_}


def _weight(name: str) -> float:
    """Common and harmless things are seldom to blame."""
    return 0.6 if name.startswith(BORING) else 1.6 if name in BOLD else 1.0


def _share(name: str, verdicts: list[Verdict], kinds: tuple[str, ...]) -> float:
    mine = [v for v in verdicts if name in v.names]
    return len({v.seed for v in mine if v.kind in kinds}) / max(1, len({v.seed for v in mine}))


def _table(verdicts: list[Verdict], kinds: tuple[str, ...], seen: list[Verdict]) -> list[str]:
    found, rate = defaultdict(list), rates(seen, kinds)
    for v in verdicts:
        if v.kind in kinds:
            found[blamed(v.names, rate)].append(v)
    lines = []
    for name, mine in sorted(found.items(), key=lambda item: -len(item[1])):
        lines.append(
            f"  {name}  ({len({v.seed for v in mine})} cases, {_share(name, seen, kinds):.0%} of those with it)"
        )
        said = Counter((v.kind, v.check, v.said if v.kind != "wrong" else v.said.split(":")[0]) for v in mine)
        for (kind, check, text), count in said.most_common(4):
            seed = min(v.seed for v in mine if (v.kind, v.check) == (kind, check) and v.said.startswith(text[:40]))
            lines.append(
                f"      {count:4d} {kind} {check}: {text}   [--only {seed}{' --hostile' if mine[0].hostile else ''}]"
            )
    return lines


def report(verdicts: list[Verdict]) -> str:
    """The whole report."""
    cases = {v.seed for v in verdicts}
    counts = Counter(v.kind for v in verdicts)
    worst = Counter()
    for seed_kinds in _kinds(verdicts).values():
        worst[next(k for k in ("wrong", "raw", "refused", "right", "skipped") if k in seed_kinds)] += 1
    lines = [
        f"{len(cases)} cases, {len(verdicts)} checks: " + ", ".join(f"{counts[k]} {k}" for k in counts),
        "cases by their worst check: " + ", ".join(f"{n} {k}" for k, n in worst.most_common()),
        "",
        "FAILURES by construct",
        *_table(verdicts, FAILURES, verdicts),
        "",
        "REFUSED by construct" + ("" if any(v.hostile for v in verdicts) else " (all of them harmless)"),
        *_table(verdicts, ("refused",), verdicts),
        "",
        "REFUSED by headline",
        *(f"  {n:5d} {text}" for text, n in Counter(v.said for v in verdicts if v.kind == "refused").most_common(40)),
        "",
        "SKIPPED by torch",
        *(
            f"  {n:5d} {text}  [--only {min(v.seed for v in verdicts if v.said == text)}]"
            for text, n in Counter(v.said for v in verdicts if v.check == "torch").most_common(25)
        ),
    ]
    return "\n".join(lines)


def _kinds(verdicts: list[Verdict]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = defaultdict(set)
    for v in verdicts:
        found[v.seed].add(v.kind)
    return found
