"""What became of a case: right, refused, wrong, raw or skipped, check by check."""

from __future__ import annotations

import re
import traceback
import warnings
from typing import NamedTuple

import torch

import kfac_func as kf
from tests.fuzz.cases import Case, case
from tests.fuzz.checks import CHECKS
from tests.fuzz.draw import Draw
from tests.fuzz.looking import Look, Pointless, Wrong
from tests.fuzz.oracles import Disagrees, Truth, joined

FAILURES = ("wrong", "raw")
CHECKED = 3  # checks of a case, beside the gradient


class Verdict(NamedTuple):
    """One check of one case. `said`: the first line of the error."""

    seed: int
    names: tuple[str, ...]
    hostile: bool
    check: str
    kind: str
    said: str = ""
    trace: str = ""


def judged(seed: int, hostile: bool = False, checks: tuple[str, ...] = ()) -> list[Verdict]:
    """Every verdict on the case of a seed, by these checks or by those it draws; the same whatever ran before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            one = case(seed, hostile)
        except Exception as error:  # of the fuzzer itself, or of make_functional
            said = f"{type(error).__name__}: {headline(error)}"
            return [Verdict(seed, ("no case",), hostile, "the case", "raw", said, traceback.format_exc())]
        return _judged(one, checks)


def admitted(seed: int, hostile: bool) -> Truth:
    """The oracles of a case. Raises Disagrees where torch itself cannot."""
    one = case(seed, hostile)
    truth = Truth(one.problem, one.seed)
    truth.check(0.1 if one.traits & {"rough", "half"} else 1e-3 if one.dtype == torch.float32 else 1e-8)
    if one.dtype == torch.float32 and "random" not in one.traits:
        narrow, wide = (joined(each.value_and_gradient[1]) for each in (truth, Truth(one.wide(), seed)))
        if (narrow - wide).norm() > 1e-3 * wide.norm():
            raise Disagrees("float32 is not enough for this gradient")
    return truth


def _judged(one: Case, checks: tuple[str, ...]) -> list[Verdict]:
    head = (one.seed, one.names, one.hostile)
    try:
        truth = admitted(one.seed, one.hostile)
    except Disagrees as error:
        return [Verdict(*head, "torch", "skipped", headline(error))]
    draw = Draw(one.seed + 1)
    rates = {name: rate for name, (_, rate) in CHECKS.items()}
    names = checks or ("gradient", *dict.fromkeys(draw.weighted(rates) for _ in range(CHECKED)))
    return [Verdict(*head, name, *_one(name, Look(one, truth, draw))) for name in names]


def _one(name: str, look: Look) -> tuple[str, str, str]:
    try:
        CHECKS[name][0](look)
    except (Pointless, Disagrees):
        return "skipped", "", ""
    except Wrong as error:
        return "wrong", str(error), ""
    except kf.errors.KFacError as error:
        return "refused", headline(error), ""
    except Exception as error:
        return "raw", f"{type(error).__name__}: {headline(error)}", traceback.format_exc()
    return "right", "", ""


def headline(error: Exception) -> str:
    """The first line of a message, without the names in it."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"'[^']*'|\b\d+\b|0x[0-9a-f]+", "…", line)[:150]
