"""Peak memory of a step over that of the plain step.

On a GPU it is what torch's allocator had handed out at most while a few steps ran. On a CPU nothing counts tensors
alone, so each variant runs in a process of its own and the figure is the peak of that process's resident memory, read
from the kernel (Linux). The parent subtracts: what importing torch takes is in both and falls out; what the allocator
keeps for itself does not.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import BASELINE, configure
from benchmarks.steps import Task, make_task, plain, whole
from benchmarks.workloads import WORKLOADS

_STATUS = Path("/proc/self/status")
_STEPS = 5


def memory_over_sgd(task: Task, kind: str = "full", estimator: str = "monte_carlo") -> float | None:
    """MB of a step of ours beyond the plain step, or None where they cannot be had."""
    if task.device.type == "cuda":
        return _on_gpu(task, kind, estimator) - _on_gpu(task, BASELINE, estimator)
    if not _STATUS.exists() or task.workload.name not in WORKLOADS:
        return None
    return _on_cpu(task, kind, estimator) - _on_cpu(task, BASELINE, estimator)


def _run(task: Task, kind: str, estimator: str) -> None:
    step = plain(task) if kind == BASELINE else whole(task, kind, estimator)
    for _ in range(_STEPS):
        step.run()


def _on_gpu(task: Task, kind: str, estimator: str) -> float:
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(task.device)
    torch.cuda.reset_peak_memory_stats(task.device)
    _run(task, kind, estimator)
    return (torch.cuda.max_memory_allocated(task.device) - held) / 1e6


def _on_cpu(task: Task, kind: str, estimator: str) -> float:
    words = [task.workload.name, kind, estimator, str(len(task.inputs)), str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout)


def main(arguments: list[str]) -> None:
    """Run one variant, print the peak of this process in MB: not `ru_maxrss`, which is inherited from the parent."""
    name, kind, estimator, examples, threads = arguments
    configure(int(threads))
    _run(make_task(WORKLOADS[name], torch.device("cpu"), int(examples)), kind, estimator)
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    print(int(found[1]) * 1024 / 1e6)


if __name__ == "__main__":
    main(sys.argv[1:])
