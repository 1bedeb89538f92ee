"""Between refreshes nothing asks a device for a value. Shown on the CPU, by taking away the right to read what is at
hand there: then no truth value may be asked for (the counts of updates are integers, and are on the CPU always).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_func as kf
from kfac_func import _tree
from kfac_func.linalg import krylov, psd
from kfac_func.precondition import averages, batch
from tests.zoo.cases import CASES
from tests.zoo.run import run

CURVATURES = {
    "kronecker": kf.curvature.kronecker(),
    "eigen": kf.curvature.eigen(),
    "eigen, intra_batch": kf.curvature.eigen("intra_batch"),
    "kpsvd": kf.curvature.kpsvd(),
    "diagonal": kf.curvature.diagonal(),
    "inverse_free": kf.curvature.inverse_free(),
}


class Asked(TorchDispatchMode):
    """Counts the values that Python asks for, other than integers."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.int64:
            self.values.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_step_between_refreshes_asks_for_nothing(curvature: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES["mlp"]
    tx = kf.chain(kf.kfac(CURVATURES[curvature], damping=0.1), kf.clip_by_global_norm(1.0), kf.sgd(0.1, momentum=0.9))
    _, grads, stats = run(case)
    _, state = tx.update(grads, tx.init(case.params), case.params, stats=stats)
    want = tx.update(grads, state, case.params, stats=stats, refresh=False)
    for module in (krylov, psd, averages, batch):
        monkeypatch.setattr(module, "at_hand", lambda x: False)
    with Asked() as asked:
        got = tx.update(grads, state, case.params, stats=stats, refresh=False)
    assert asked.values == []
    torch.testing.assert_close(_tree.leaves(got), _tree.leaves(want), rtol=1e-9, atol=1e-11)


def test_what_asks_is_seen():
    with Asked() as asked:
        bool(torch.tensor(True))
        int(torch.tensor(1))
    assert asked.values == [torch.bool]
