"""Jobs side by side: one thread each where that changes nothing but the time, one after the other everywhere else."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import kfac_func as kf
from kfac_func import _tree
from kfac_func.linalg.workers import side_by_side
from tests.zoo.cases import CASES
from tests.zoo.run import run

ONE = [torch.ones(1)]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def where() -> tuple[str, int]:
    return threading.current_thread().name, torch.get_num_threads()


def test_every_job_has_one_thread_of_its_own_and_the_order_stays():
    found = side_by_side([lambda k=k: (k, *where()) for k in range(5)], ONE)
    assert [k for k, _, _ in found] == list(range(5))
    assert all(name.startswith("kfac_func") and count == 1 for _, name, count in found)


def test_nobody_else_loses_threads():
    side_by_side([where], ONE)
    seen: list[int] = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert (torch.get_num_threads(), seen) == (2, [2])


def test_an_error_of_a_job_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1 / 0, where], ONE)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_jobs_inherit_the_modes_of_differentiation(inference: bool, grad: bool):
    def job() -> tuple[bool, bool, str]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), where()[0]

    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        want = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        (got,) = side_by_side([job], ONE)
    assert got[:2] == want
    assert got[2].startswith("kfac_func")


def test_gradients_flow_through_the_jobs():
    x = torch.tensor(3.0, requires_grad=True)
    (y,) = side_by_side([lambda: x.square()], [x])
    y.backward()
    assert x.grad is not None
    assert x.grad.item() == 6.0


def test_the_caller_does_it_where_a_thread_would_not_see_what_it_sees():
    here = threading.current_thread().name

    def name(x: torch.Tensor) -> str:
        return side_by_side([lambda: where()[0]], [x])[0]

    seen = [name(torch.ones(1)) == here]
    torch.func.vmap(lambda x: seen.append(name(x) == here) or x)(torch.ones(2, 1))
    with torch.device("cpu"):
        seen.append(name(torch.ones(1)) == here)
    with torch.autocast("cpu"):
        seen.append(name(torch.ones(1)) == here)
    torch.set_num_threads(1)
    seen.append(name(torch.ones(1)) == here)
    assert seen == [False, True, True, True, True]


def test_a_child_process_has_workers_of_its_own():
    script = """
import os, sys, torch
from kfac_func.linalg.workers import side_by_side
torch.set_num_threads(2)
side_by_side([lambda: 1, lambda: 2], [torch.ones(1)])
child = os.fork()
if child == 0:
    os._exit(sum(side_by_side([lambda: 3, lambda: 4], [torch.ones(1)])))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "7", done.stderr


@pytest.mark.parametrize("curvature", [kf.curvature.kronecker(), kf.curvature.eigen()], ids=["kronecker", "eigen"])
def test_the_factorisation_is_that_of_one_thread(curvature):
    case = CASES["mlp"]
    _, grads, stats = run(case)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = kf.observe(kf.kfac(curvature, damping=0.1).init(case.params), stats)
        found.append(_tree.leaves(kf.precondition(state, grads)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
