"""The laws of the house. A law is a function from one source file to its violations, and each is shown to find one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DOOR = "__init__"
FLOORS = {
    **dict.fromkeys(["_typing", "_errors", "_tracing", "_containers"], 1),
    **dict.fromkeys(["_tree", "_patterns", "blocks", "losses"], 2),
    **dict.fromkeys(["linalg", "layers", "transforms", "checkpoint"], 3),
    **dict.fromkeys(["capture", "damping", "spectra"], 4),
    **dict.fromkeys(["estimators", "curvature", "adapters", "state"], 5),
    **dict.fromkeys(["precondition", "products", "distributed"], 6),
    **dict.fromkeys(["control", "compiled", "operators"], 7),
    **dict.fromkeys(["laplace", "influence", "testing", "diagnostics"], 8),
    **dict.fromkeys(["recipes", "demo", DOOR], 9),
}
# On the top floor the door shows the recipes, and the demo uses the library through the door as its readers do.
SAME_FLOOR = {(DOOR, "recipes"), ("demo", DOOR)}
LEAVES = {"recipes", "adapters", "diagnostics", "checkpoint", "laplace", "influence", "testing"}
OPTIONAL = {"matplotlib", "scipy", "sklearn", "tqdm", "torchopt", "posteriors"}
HOMES = {
    "optree": "_tree",
    "torch.distributed": "distributed.comm",
    "matplotlib": "diagnostics.plots",
    "torchopt": "adapters.torchopt",
    "posteriors": "adapters.posteriors",
    "scipy": "products.scipy_view",
    "sklearn": "demo.data",
    "tqdm": "demo.run",
}
SIBLINGS = {"curvature", "layers", "losses"}
SIBLING_IMPORTS = {
    ("curvature.two_level", "curvature.coarse"),
    ("curvature.two_level", "curvature.blockwise"),  # what wraps a curvature lifts a structure first
    ("curvature.blockwise", "curvature.diagonal"),  # the lift falls back on it
}
CURVATURE_SEES = {"curvature", "blocks", "linalg", "damping", "_tree", "_errors", "_typing", "_tracing", "_patterns"}
FILE_LINES, FUNCTION_LINES = 300, 60


class Source(NamedTuple):
    """A file of the package: dotted name inside kfac_func ("losses.base", "losses.__init__", "__init__") and text."""

    name: str
    text: str

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


class Import(NamedTuple):
    line: int
    module: str  # the full dotted target: "kfac_func.losses.base.Loss", "torch.nn"
    asname: str | None
    level: int


def imports(tree: ast.AST) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, alias.asname, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(node.lineno, f"{node.module or ''}.{alias.name}", alias.asname, node.level)


def inside(source: Source) -> Iterator[tuple[int, str]]:
    """Line and target inside the package of every import of it; the door itself is the target "__init__"."""
    for found in imports(source.tree):
        parts = found.module.split(".")
        if parts[0] == "kfac_func" and not found.level:
            room = len(parts) > 2 or parts[-1] in FLOORS  # else a name of the door: `from kfac_func import kfac`
            yield found.line, ".".join(parts[1:]) if room and parts[1:] else DOOR


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def climbs(source: Source) -> Iterator[str]:
    """Imports go to floors strictly below, or stay in the room."""
    if source.room not in FLOORS:
        yield f"room {source.room!r} has no floor: add it to FLOORS"
        return
    for line, target in inside(source):
        room = target.split(".")[0]
        if room not in FLOORS:
            yield f"{line}: {target} has no floor: add {room!r} to FLOORS"
        elif room != source.room and (source.room, room) not in SAME_FLOOR and FLOORS[room] >= FLOORS[source.room]:
            yield f"{line}: {source.room} (floor {FLOORS[source.room]}) imports {target} (floor {FLOORS[room]})"


def hidden_imports(source: Source) -> Iterator[str]:
    """Imports are absolute and at the top, except those of optional packages; no TYPE_CHECKING circles."""
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for found in imports(node):
                if found.module.split(".")[0] not in OPTIONAL:
                    yield f"{found.line}: import of {found.module} inside the function {node.name}"
        if "TYPE_CHECKING" in (getattr(node, "id", ""), getattr(node, "attr", "")):
            yield f"{getattr(node, 'lineno', 0)}: TYPE_CHECKING"
    for found in imports(source.tree):
        if found.level:
            yield f"{found.line}: relative import of {found.module}"


def strangers(source: Source) -> Iterator[str]:
    """A heavy package has one home; optional ones may only be imported inside its functions."""
    uses = [(found.line, found.module) for found in imports(source.tree)]
    uses += [(node.lineno, ast.unparse(node)) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
    for package, home in HOMES.items():
        for line, module in uses:
            if within(module, package) and source.name != home:
                yield f"{line}: {module} outside of its home {home}"
    at_top = [found for node in source.tree.body if not isinstance(node, ast.FunctionDef) for found in imports(node)]
    for found in at_top:
        if found.module.split(".")[0] in OPTIONAL:
            yield f"{found.line}: optional package {found.module} imported at the top"


def sibling_imports(source: Source) -> Iterator[str]:
    """In the rooms of equals a file imports no other than `base`; what two share goes a floor down."""
    if source.room not in SIBLINGS or source.name == f"{source.room}.__init__":
        return
    for line, target in inside(source):
        sibling = ".".join(target.split(".")[:2])
        allowed = sibling == f"{source.room}.base" or (source.name, sibling) in SIBLING_IMPORTS
        if target.split(".")[0] == source.room and not allowed:
            yield f"{line}: {source.name} imports its sibling {sibling}"


def curvature_looks_out(source: Source) -> Iterator[str]:
    """Curvature sees only the waist and mathematics; layers never see curvature."""
    for line, target in inside(source):
        room = target.split(".")[0]
        if source.room == "curvature" and room not in CURVATURE_SEES:
            yield f"{line}: curvature imports {target}"
        if source.room == "layers" and room == "curvature":
            yield f"{line}: layers imports {target}"


def leaf_imports(source: Source) -> Iterator[str]:
    """Nothing but the door and the demo imports a leaf room: deleting one leaves the rest green."""
    for line, target in inside(source):
        room = target.split(".")[0]
        if room in LEAVES and source.room not in (room, DOOR, "demo"):
            yield f"{line}: {source.name} imports {target}"


def sizes(source: Source) -> Iterator[str]:
    """Files stay below 300 lines, functions below 60 (their docstrings not counted)."""
    yield from long_file(source)
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            documented = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
            lines = (node.end_lineno or 0) - node.lineno + 1 - documented
            if lines >= FUNCTION_LINES:
                yield f"{node.lineno}: function {node.name} has {lines} lines"


def long_file(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines >= FILE_LINES:
        yield f"1: the file has {lines} lines"


def crooked_door(source: Source) -> Iterator[str]:
    """The door is a list of `from kfac_func.x import name as name`, and a version."""
    if source.name != DOOR:
        return
    for node in source.tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if not isinstance(node, ast.ImportFrom) or not within(node.module or "", "kfac_func"):
            yield f"{node.lineno}: {ast.unparse(node)}"
        elif any(alias.asname != alias.name.removeprefix("_") for alias in node.names):
            yield f"{node.lineno}: not of the form `import name as name`: {ast.unparse(node)}"


Law = Callable[[Source], Iterator[str]]
PACKAGE_LAWS: list[Law] = [
    climbs,
    hidden_imports,
    strangers,
    sibling_imports,
    curvature_looks_out,
    leaf_imports,
    sizes,
    crooked_door,
]


def sources(folder: str) -> list[Source]:
    top = ROOT / folder
    paths = sorted(top.rglob("*.py"))
    return [Source(".".join(path.relative_to(top).with_suffix("").parts), path.read_text()) for path in paths]


def broken(law: Law, folder: str) -> list[str]:
    return [f"{folder}/{source.name}:{violation}" for source in sources(folder) for violation in law(source)]


@pytest.mark.parametrize("law", PACKAGE_LAWS, ids=lambda law: law.__name__)
def test_the_package_keeps_the_law(law: Law):
    assert broken(law, "kfac_func") == []


def test_benchmarks_and_tests_stay_small():
    assert broken(sizes, "benchmarks") + broken(long_file, "tests") == []


def test_the_laws_see_the_package():
    assert {source.name for source in sources("kfac_func")} > {DOOR, "_errors", "losses.base", "demo.run"}


PLANTED = [
    (climbs, "losses.base", "from kfac_func.layers import linear"),
    (climbs, "blocks.base", "import kfac_func.losses.base"),
    (climbs, "transforms.base", "import kfac_func as kf"),
    (climbs, "precondition", "from kfac_func import recipes"),
    (climbs, "cellar", "import torch"),
    (climbs, "recipes", "from kfac_func.cellar import wine"),
    (hidden_imports, "losses.base", "from . import categorical"),
    (hidden_imports, "losses.base", "def f():\n    import math"),
    (hidden_imports, "losses.base", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import math"),
    (hidden_imports, "losses.base", "import typing\nif typing.TYPE_CHECKING:\n    import math"),
    (strangers, "losses.base", "import optree"),
    (strangers, "losses.base", "from torch import distributed"),
    (strangers, "losses.base", "import torch\ntorch.distributed.barrier()"),
    (strangers, "demo.run", "def f():\n    from matplotlib import pyplot"),
    (strangers, "demo.run", "import tqdm"),
    (strangers, "adapters.torch_optim", "def f():\n    import torchopt"),
    (sibling_imports, "losses.gaussian", "from kfac_func.losses.categorical import cross_entropy"),
    (sibling_imports, "losses.gaussian", "from kfac_func.losses import cross_entropy"),
    (sibling_imports, "curvature.eigen", "from kfac_func.curvature import blockwise"),
    (sibling_imports, "curvature.coarse", "from kfac_func.curvature.two_level import two_level"),
    (curvature_looks_out, "curvature.eigen", "from kfac_func.layers.base import Kind"),
    (curvature_looks_out, "layers.conv", "from kfac_func.curvature.base import Structure"),
    (leaf_imports, "precondition", "from kfac_func.diagnostics.plots import loss_curves"),
    (leaf_imports, "distributed.sharded", "from kfac_func import checkpoint"),
    (sizes, "losses.base", "\n" * 300),
    (sizes, "losses.base", "def f():\n" + "    pass\n" * 59),
    (crooked_door, DOOR, "from kfac_func.recipes import kfac"),
    (crooked_door, DOOR, "from kfac_func.recipes import kfac as natural_gradient"),
    (crooked_door, DOOR, "import torch"),
    (crooked_door, DOOR, "def kfac(): ..."),
]
INNOCENT = [
    (climbs, "recipes", "from kfac_func.precondition import precondition\nfrom kfac_func.losses.base import Loss"),
    (climbs, DOOR, "from kfac_func.recipes import kfac as kfac\nfrom kfac_func import losses as losses"),
    (climbs, "demo.run", "import kfac_func as kf\nfrom kfac_func.demo import data"),
    (hidden_imports, "demo.run", "def f():\n    from tqdm import tqdm"),
    (strangers, "_tree", "import optree\nfrom optree import tree_map"),
    (strangers, "distributed.comm", "import torch.distributed\ntorch.distributed.barrier()"),
    (strangers, "losses.base", "import torch.distributions\ntorch.distributions.Normal"),
    (sibling_imports, "losses.__init__", "from kfac_func.losses.gaussian import mse as mse"),
    (sibling_imports, "losses.gaussian", "from kfac_func.losses.base import Loss\nfrom kfac_func.losses import base"),
    (sibling_imports, "curvature.two_level", "from kfac_func.curvature.coarse import project"),
    (curvature_looks_out, "curvature.eigen", "from kfac_func.blocks import Block\nfrom kfac_func._tree import leaves"),
    (leaf_imports, "diagnostics.progress", "from kfac_func.diagnostics.metrics import trace"),
    (leaf_imports, "demo.run", "from kfac_func.diagnostics.plots import loss_curves"),
    (sizes, "losses.base", 'def f():\n    """' + "\n" * 90 + '"""\n' + "    pass\n" * 50),
    (crooked_door, DOOR, '"""Doc."""\nfrom kfac_func import _errors as errors\n__version__ = "1"'),
]


def _ids(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("law", "name", "text"), PLANTED, ids=_ids)
def test_a_planted_violation_is_found(law: Law, name: str, text: str):
    assert list(law(Source(name, text)))


@pytest.mark.parametrize(("law", "name", "text"), INNOCENT, ids=_ids)
def test_innocent_code_is_left_alone(law: Law, name: str, text: str):
    assert list(law(Source(name, text))) == []
