"""One thread, shapes and types checked on every call of the library, and the fixtures that all tests share.

The jaxtyping hook rewrites `kfac_func` on import, so it is installed before anything imports the library. Dynamo cannot
trace what it makes, so runs that ask for such tests (`-m "compile or examples"`), or set KFAC_FUNC_NO_TYPECHECK=1, go
without it; in all other runs the tests marked `compile` are skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config as checking

from tests import typechecking

torch.set_num_threads(1)


def _checked(config: pytest.Config) -> bool:
    asked = re.sub(r"\bnot\s+\w+", "", config.option.markexpr)
    return os.environ.get("KFAC_FUNC_NO_TYPECHECK") != "1" and not re.search(r"\b(compile|examples)\b", asked)


def pytest_configure(config: pytest.Config) -> None:
    """Install the hook, unless jaxtyping's own command-line option has done it."""
    if _checked(config) and not config.getoption("jaxtyping_packages", None):
        typechecking.install("kfac_func")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run here, with the reason."""
    reasons = {"gpu": None if torch.cuda.is_available() else "needs a CUDA device"}
    reasons["compile"] = 'needs the library without the checking hook: -m "compile"' if _checked(config) else None
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed, fresh for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No type checks, so that values of the wrong type reach the library's own errors, as they do for users."""
    checking.update("jaxtyping_disable", True)
    yield
    checking.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Modules draw their first weights from the global generator. torch.manual_seed would write down, for every device
    that is not there, who called it: milliseconds for each of many thousand tests.
    """
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
