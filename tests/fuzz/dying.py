"""A judge for the test of the workers: its process dies at one seed."""

from __future__ import annotations

import os

from tests.fuzz.verdicts import Verdict

LAST = 2


def dying(seed: int, hostile: bool) -> list[Verdict]:
    if seed == LAST:
        os._exit(1)
    return [Verdict(seed, (), hostile, "gradient", "right")]
