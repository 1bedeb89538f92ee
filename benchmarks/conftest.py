"""Options and shared fixtures of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from benchmarks.harness import configure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kfac_func benchmarks")
    group.addoption("--quick", action="store_true", help="four examples, two short rounds: shows that everything runs")
    group.addoption("--compiled", action="store_true", help="time the compiled functional step as well")
    group.addoption("--rounds", type=int, default=10, help="rounds of every test")
    group.addoption("--threads", type=int, default=2, help="torch.set_num_threads")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--estimator", choices=("monte_carlo", "empirical"), default="monte_carlo", help="for whole steps")


class Options(NamedTuple):
    """What the command line says, in the terms of the harness."""

    compiled: bool
    rounds: int
    examples: int | None
    block_seconds: float
    device: torch.device
    estimator: str


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> Iterator[Options]:
    """The options; threads are set for the session and put back."""
    given = request.config.option
    before = torch.get_num_threads()
    configure(given.threads)
    yield Options(
        given.compiled,
        2 if given.quick else given.rounds,
        4 if given.quick else None,
        0.0 if given.quick else 0.25,
        torch.device(given.device),
        given.estimator,
    )
    torch.set_num_threads(before)
