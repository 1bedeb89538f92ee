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

STATUS = Path("/proc/self/status")
_STEPS = 5


def memory_over_sgd(task: Task, kind: str = "full", estimator: str = "monte_carlo", repeats: int = 1) -> list[float]:
    """MB of a step of ours beyond the plain step, as often as asked; empty where they cannot be had."""
    peak = _on_gpu if task.device.type == "cuda" else _on_cpu
    if peak is _on_cpu and (not STATUS.exists() or task.workload.name not in WORKLOADS):
        return []
    return [peak(task, kind, estimator) - peak(task, BASELINE, estimator) for _ in range(repeats)]


def peak_resident() -> float:
    """The peak of this process in MB, from the kernel: not `ru_maxrss`, which is inherited from the parent."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


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
    """Run one variant and print the peak of this process in MB."""
    name, kind, estimator, examples, threads = arguments
    configure(int(threads))
    _run(make_task(WORKLOADS[name], torch.device("cpu"), int(examples)), kind, estimator)
    print(peak_resident())


if __name__ == "__main__":
    main(sys.argv[1:])
