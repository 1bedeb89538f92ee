"""`python -m tests.fuzz --cases 20000 [--start 0] [--hostile] [--workers 2] [--only SEED]`.

The exit status is 1 when something is wrong or raw.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.cases import case
from tests.fuzz.report import report
from tests.fuzz.trees import flat
from tests.fuzz.verdicts import FAILURES, Verdict, judged
from tests.fuzz.workers import run


def shown(seed: int, hostile: bool) -> list[Verdict]:
    """One case in full."""
    one = case(seed, hostile)
    print(f"seed {seed}: {', '.join(one.names)}\n  traits {sorted(one.traits)}, {one.dtype}, N = {one.examples}")
    for path, leaf in flat(one.problem.params).items():
        print(f"  {path:<30} {list(leaf.shape)}")
    verdicts = judged(seed, hostile)
    for v in verdicts:
        print(f"  {v.check:<26} {v.kind:<8} {v.said}")
        if v.trace:
            print("    " + v.trace.replace("\n", "\n    "))
    return verdicts


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz")
    options.add_argument("--cases", type=int, default=300)
    options.add_argument("--start", type=int, default=0)
    options.add_argument("--hostile", action="store_true", help="constructs that a tape cannot see, or that mix")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--only", type=int, help="one seed, in full")
    given = options.parse_args()
    if given.only is not None:
        verdicts = shown(given.only, given.hostile)
    else:
        began = time.perf_counter()
        verdicts = run(range(given.start, given.start + given.cases), given.hostile, given.workers)
        print(report(verdicts))
        print(f"\n{(time.perf_counter() - began) / given.cases * 1000:.0f} ms a case")
    return int(any(v.kind in FAILURES for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
