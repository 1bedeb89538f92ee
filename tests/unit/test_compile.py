"""One whole step (pass, statistics, K-FAC, momentum, update) in one graph, equal to eager in float64.

These run without the type-checking hook, which Dynamo cannot trace: `pytest -m compile`. "aot_eager" traces everything,
forwards and backwards, and runs the graph as it is; one case goes through the default compiler. "eager" stops at the
graph, where another case of the same net goes on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # torch's own, when it imports the compiler
    pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning"),  # torch's own, when it lowers a diagonal
]


class Attention(nn.Module):
    """An embedding tied to the head, a norm, and positions that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.mix = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        weights = torch.softmax(self.norm(h) @ h.mT, dim=-1)
        return F.linear((weights @ self.mix(h)).mean(1), self.words.weight)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv1d(4, 3, 2), nn.Flatten(), nn.Linear(9, 2)
    )


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(2, 3, 1, bias=False),
        nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(12, 2),
    )


G = torch.Generator().manual_seed(0)
ROWS = torch.randn(6, 3, generator=G).double()
MAPS = torch.randn(6, 2, 4, generator=G).double()
TOKENS = torch.randint(5, (6, 3), generator=G)
Y, NOISE = torch.randint(2, (6,), generator=G), torch.rand(1, 6, generator=G)

CASES = {
    "mlp, exact": (mlp, ROWS, kf.estimators.exact(), (True, False, True), "eager"),
    "mlp, monte carlo": (mlp, ROWS, kf.estimators.monte_carlo(), (True, True), "inductor"),
    "conv, exact": (conv, MAPS, kf.estimators.exact(), (True, True), "aot_eager"),
    "conv, empirical": (conv, MAPS, kf.estimators.empirical(), (True, True), "eager"),
    "encoder, exact": (encoder, MAPS, kf.estimators.exact(), (True, True), "eager"),
    "attention, monte carlo": (Attention, TOKENS, kf.estimators.monte_carlo(), (True, True), "eager"),
}


@pytest.mark.parametrize(("module", "x", "estimator", "refreshes", "backend"), CASES.values(), ids=CASES)
def test_a_whole_step_is_one_graph(module, x, estimator, refreshes, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    fn, params = kf.make_functional(module().double())
    stats_of = kf.value_grad_and_stats(fn, kf.losses.cross_entropy(), estimator=estimator)
    tx = kf.chain(kf.kfac(damping=0.1), kf.sgd(0.1, momentum=0.9))

    def step(params: Any, state: Any, refresh: bool) -> tuple[Any, Any, Any]:
        value, grads, stats = stats_of(params, (x, Y), noise=NOISE)
        updates, state = tx.update(grads, state, params, stats=stats, refresh=refresh)
        return kf.apply_updates(params, updates), state, value

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    _, state, _ = step(params, tx.init(params), True)  # the first statistics give the state its shape
    one = two = (params, state)
    for refresh in refreshes:
        value, other = step(*one, refresh), compiled(*two, refresh)
        one, two = value[:2], other[:2]
        torch.testing.assert_close(_tree.leaves(other), _tree.leaves(value), rtol=1e-8, atol=1e-10)
    assert not torch.equal(_tree.leaves(one)[0], _tree.leaves(params)[0])
