"""Everything that a reader can copy runs: README and docs blocks, docstring examples; every public function has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import kfac_func

pytestmark = pytest.mark.examples

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = sorted((ROOT / "kfac_func").rglob("*.py"))
MODULES = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in FILES]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _seeded_and_single_threaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def blocks(text: str) -> list[str]:
    """The python blocks of a page, each behind as many empty lines as precede it, so that tracebacks name its lines."""
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in BLOCK.finditer(text)]


def run_page(text: str, filename: str) -> dict[str, Any]:
    """Run the blocks of a page in order, in one namespace."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(text):
        exec(compile(block, filename, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path):
    run_page(page.read_text(), str(page))


def test_the_readme_has_examples():
    assert blocks(PAGES[0].read_text())


def test_a_page_shares_one_namespace_and_a_broken_block_is_found():
    assert run_page("```python\na = 1\n```\n\n```python\nb = a + 1\n```\n", "page.md")["b"] == 2
    with pytest.raises(ZeroDivisionError) as error:
        run_page("text\n\n```python\n1 / 0\n```\n", "page.md")
    assert error.traceback[-1].lineno == 3


def failures(module: ModuleType) -> tuple[int, str]:
    """Run the docstring examples of a module, which may use `kf` and `torch`: the number of failures and their text."""
    said: list[str] = []
    known = {"kf": kfac_func, "torch": torch}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__, extraglobs=known):
        runner.run(test, out=said.append)
    return runner.failures, "".join(said)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str):
    failed, said = failures(importlib.import_module(name))
    assert not failed, said


def test_a_wrong_docstring_is_found():
    module = ModuleType("planted", ">>> 1 + 1\n3\n")
    assert failures(module)[0] == 1


def listed(module: ModuleType) -> list[str]:
    """The public names of a door: those that it imports as themselves or defines."""
    names: list[str] = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.asname for alias in node.names if alias.asname]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


def public_functions(module: ModuleType, prefix: str) -> dict[str, Any]:
    """The functions that a reader reaches from a door, by the name under which he does; namespaces are entered."""
    found: dict[str, Any] = {}
    for name in listed(module):
        value = getattr(module, name)
        if inspect.ismodule(value) and value.__name__.startswith("kfac_func."):
            found |= public_functions(value, f"{prefix}.{name}")
        elif inspect.isfunction(value):
            found[f"{prefix}.{name}"] = value
    return found


def without_example(functions: dict[str, Any]) -> list[str]:
    return [name for name, value in functions.items() if ">>> " not in (value.__doc__ or "")]


def test_every_public_function_has_an_example():
    functions = public_functions(kfac_func, "kf")
    assert {"kf.chain", "kf.kfac", "kf.losses.mse"} <= set(functions)
    assert without_example(functions) == []


def test_a_function_without_an_example_is_found():
    assert without_example({"kf.planted": blocks}) == ["kf.planted"]
