"""Other optimisers beside ours, each in the same rounds as the plain step: `make bench-peers`.

A peer NAME is a module run_NAME.py of this folder with a function `steps` from a task to steps by kind: "full",
"stats", "pre" (as many as it has), or "step" when it knows only one. A peer that is not installed, or that a workload
makes fail, is reported with the reason. To add one: that module, a line in PEERS and a pin in requirements.txt.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

from benchmarks.harness import Step
from benchmarks.steps import Task

PEERS = {
    "adamw": "torch",
    "curvlinops": "curvlinops",
    "singd": "singd",
    "nngeometry": "nngeometry",
    "backpack": "backpack",
    "kfac_jax": "kfac_jax",
}
"""By name: the package that must be installed."""


def installed(peers: Mapping[str, str] = PEERS) -> list[str]:
    """The peers whose package is here."""
    return [name for name, package in peers.items() if find_spec(package) is not None]


def peer_steps(task: Task, peers: Mapping[str, str] = PEERS) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps named "adamw step", "curvlinops full" and so on, each of which has run once; and why the others do not."""
    found: dict[str, Step] = {}
    missing = {name: f"{peers[name]} is not installed" for name in peers if name not in installed(peers)}
    for name in installed(peers):
        try:
            made = import_module(f"{__name__}.run_{name}").steps(task)
            for step in made.values():
                step.run()
        except Exception as error:  # whatever a foreign package raises is the reason to show
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
        else:
            found |= {f"{name} {kind}": step for kind, step in made.items()}
    return found, missing
