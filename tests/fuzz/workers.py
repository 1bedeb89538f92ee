"""Seeds in several processes. A process that dies, or hangs, costs its seed a verdict and nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from tests.fuzz.verdicts import Verdict, admitted, judged

PATIENCE = 120.0  # seconds for one case
Judge = Callable[[int, bool], list[Verdict]]


class Worker(NamedTuple):
    """A process and the seeds that it has still to answer for, in order."""

    process: Any
    answers: Connection
    seeds: list[int]


def run(seeds: Sequence[int], hostile: bool, workers: int, judge: Judge = judged) -> list[Verdict]:
    """The verdicts of many seeds, in their order."""
    torch.set_num_threads(1)
    if workers < 2:
        return [v for seed in seeds for v in judge(seed, hostile)]
    found: dict[int, list[Verdict]] = {}
    active = [_started(list(seeds[k::workers]), hostile, judge) for k in range(workers)]
    while active:
        ready = wait([worker.answers for worker in active], PATIENCE)
        for worker in [worker for worker in active if worker.answers in ready or not ready]:
            verdicts = _answer(worker) if ready else None
            if verdicts is not None:
                found[worker.seeds.pop(0)] = verdicts
                continue
            active.remove(worker)
            worker.process.kill()
            if worker.seeds:
                lost = worker.seeds.pop(0)
                found[lost] = [_lost(lost, hostile)]
                active.append(_started(worker.seeds, hostile, judge))
    return [v for seed in seeds for v in found[seed]]


def _started(seeds: list[int], hostile: bool, judge: Judge) -> Worker:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, seeds, hostile, judge), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, mine, seeds)


def _work(answers: Any, seeds: list[int], hostile: bool, judge: Judge) -> None:
    torch.set_num_threads(1)
    for seed in seeds:
        answers.send(judge(seed, hostile))


def _answer(worker: Worker) -> list[Verdict] | None:
    """The verdicts on the worker's next seed; None when it is no more."""
    try:
        return worker.answers.recv()
    except EOFError:
        return None


def _lost(seed: int, hostile: bool) -> Verdict:
    """torch itself may be what kills the process: its part is run alone."""
    process = multiprocessing.get_context("spawn").Process(target=admitted, args=(seed, hostile))
    process.start()
    process.join(PATIENCE)
    kind = "raw" if process.exitcode == 0 else "skipped"
    process.kill()
    return Verdict(seed, ("process lost",), hostile, "process", kind, "the process died or hung")
