"""Independent jobs side by side on the cores of a CPU, one thread each.

Factorisations of a few hundred rows do not gain from a second thread, they lose: two of them beside each other, one
thread each, are two to three times faster than one after the other on two threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kfac_func._tracing import at_hand

_pools: dict[int, ThreadPoolExecutor] = {}  # by their number of threads
os.register_at_fork(after_in_child=_pools.clear)  # threads do not live on in a child process


def side_by_side(jobs: Sequence[Callable[[], Any]], tensors: Sequence[Tensor]) -> list[Any]:
    """The results of the jobs, in their order; `tensors` are what they work on.

    On a CPU with several threads every job has one thread of its own; otherwise, and wherever a thread of its own would
    not see what the caller sees (torch.func transforms, torch.compile, modes, autocast), one job runs after the other.

    >>> side_by_side([lambda: 1, lambda: 2], [torch.ones(1)])
    [1, 2]
    """
    if torch.compiler.is_compiling() or torch.get_num_threads() == 1 or not all(map(at_hand, tensors)) or _context():
        return [job() for job in jobs]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(job: Callable[[], Any]) -> Any:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return job()

    return list(_pool(torch.get_num_threads()).map(run, jobs))


def _context() -> bool:
    """Whether the thread has a state that new threads do not inherit."""
    modes = _len_torch_function_stack() > 0 or _get_current_dispatch_mode() is not None
    return modes or torch.is_autocast_enabled("cpu")


def _pool(count: int) -> ThreadPoolExecutor:
    if count not in _pools:
        pool = ThreadPoolExecutor(count, "kfac_func", _alone)
        all_started = Barrier(count)
        list(pool.map(lambda _: all_started.wait(), range(count)))
        torch.set_num_threads(count)  # the default of threads still to come is what the last call says
        _pools[count] = pool
    return _pools[count]


def _alone() -> None:
    torch.get_num_threads()  # a thread takes the default when it first asks, which would undo what was set before
    torch.set_num_threads(1)
