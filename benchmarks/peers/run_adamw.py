"""torch.optim.AdamW, as cheap as adaptive methods get."""

from __future__ import annotations

import torch

from benchmarks.harness import Step
from benchmarks.steps import Task, plain


def steps(task: Task) -> dict[str, Step]:
    """One kind of step."""
    return {"step": plain(task, torch.optim.AdamW)}
