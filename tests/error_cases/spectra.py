"""Cases of `test_errors` for randomised spectra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kfac_func as kf
from kfac_func import errors
from tests.error_cases import Case, wrong

LIKE = {"b": torch.zeros(2), "w": torch.zeros(3, 2)}
HYPER, MISMATCH = errors.HyperparameterError, errors.TreeMismatchError
TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def same(v: Any) -> Any:
    return v


def density(matvec: Any = same, like: Any = LIKE, **options: Any) -> Any:
    return lambda: kf.spectra.spectral_density(matvec, like, generator=generator(), **options)


def top(k: int = 2, matvec: Any = same, like: Any = LIKE, **options: Any) -> Any:
    return lambda: kf.spectra.top_eigenpairs(matvec, like, k, generator=generator(), **options)


def trace(matvec: Any = same, like: Any = LIKE, **options: Any) -> Any:
    return lambda: kf.spectra.trace(matvec, like, generator=generator(), **options)


def turned(v: Any) -> Any:
    return {"b": v["b"] @ TURN, "w": v["w"] @ TURN}


def broken(v: Any) -> Any:
    w: Tensor = v["w"].clone()
    w[2, 1] = torch.nan
    return {"w": w, "b": v["b"]}


CASES = {
    "no steps": Case(lambda: kf.spectra.lanczos(same, LIKE, 0, generator=generator()), HYPER, "steps", "at least 1"),
    "no pairs": Case(top(0), HYPER, "k must", "at least 1"),
    "too many pairs": Case(top(9), HYPER, "9", "at most 8"),
    "room": Case(top(2, room=3), HYPER, "room", "at least 4"),
    "which": Case(top(which=wrong("largest magnitude")), HYPER, "'largest magnitude'", "'smallest' or 'magnitude'"),
    "tolerance": Case(top(tolerance=0.0), HYPER, "tolerance", "above 0"),
    "width": Case(density(width=float("nan")), HYPER, "width", "above 0"),
    "chunk size": Case(density(chunk_size=0), HYPER, "chunk_size", "at least 1"),
    "products": Case(trace(products=3), HYPER, "products", "at least 4"),
    "method": Case(trace(method=wrong("hutch")), HYPER, "'hutch'", "'hutch++' or 'xtrace'"),
    "not symmetric: pairs": Case(top(matvec=turned), HYPER, "not symmetric", "dropout"),
    "not symmetric: lanczos": Case(density(turned), HYPER, "not symmetric", "in one matvec"),
    "not finite": Case(trace(broken), HYPER, "NaN or infinity at 'w'", "check the loss"),
    "singular": Case(
        lambda: kf.spectra.log_determinant(
            lambda v: {"b": v["b"], "w": 0 * v["w"]}, LIKE, damping=-0.5, generator=generator()
        ),
        HYPER, "logarithm at the node", "damping=λ",
    ),
    "no parameters": Case(trace(like={"w": None}), HYPER, "no parameters", "None leaves are allowed"),
    "integers": Case(trace(like={"a": {"w": torch.arange(3)}}), HYPER, "'a.w'", "float16 to float64"),
    "another tree": Case(trace(lambda v: {"w": v["w"]}), MISMATCH, "'b'", "the same parameters"),
    "another shape": Case(trace(lambda v: {**v, "w": v["w"].T}), MISMATCH, "'w'", "wanted   [3, 2]"),
    "nothing returned": Case(trace(lambda v: {**v, "w": None}), MISMATCH, "'w'", "got      None"),
}  # fmt: skip
