"""`compile_step`: the numbers of the loop that it stands for, in a fixed number of graphs.

These run without the type-checking hook, which Dynamo cannot trace. "eager" is one graph, "aot_eager" traces forwards
and backwards too; one case goes through the default compiler.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # torch's own, when it imports the compiler
    pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning"),  # torch's own, when it lowers a diagonal
]

G = torch.Generator().manual_seed(0)
X, MAPS = torch.randn(4, 9, generator=G).double(), torch.randn(4, 2, 5, generator=G).double()
Y = torch.randint(3, (4,), generator=G)
LOSS = kf.losses.cross_entropy()


def wide() -> nn.Module:  # wider than the batch is long: solved by rows
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))


class Contracted(nn.Module):
    """Raw weights in products that are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", torch.tanh(x @ self.one), self.two)


def narrow() -> nn.Module:
    return nn.Linear(9, 3)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3))


def plain() -> Any:
    return kf.chain(kf.kfac(damping=0.1, refresh_every=3, growing=False), kf.sgd(0.1, momentum=0.9))


def clipped() -> Any:
    decayed = kf.schedules.exponential_decay(0.1, 0.5, 10)
    return kf.chain(kf.ema(0.5), kf.kfac(damping=0.1, refresh_every=3), kf.clip_by_global_norm(1.0), kf.sgd(decayed))


def scaled() -> Any:
    return kf.chain(kf.ekfac(damping=0.1, refresh_every=4, scale_every=2, growing=False), kf.sgd(0.1))


def staggered() -> Any:
    return kf.chain(kf.kfac(damping=0.1, refresh_every=2, growing=False, stagger=True), kf.sgd(0.1))


def without() -> Any:
    return kf.adam(0.1)


CASES = {
    "wide": (wide, X, plain, None, "eager"),
    "narrow, inductor": (narrow, X, plain, None, "inductor"),
    "normed, exact": (normed, X, clipped, kf.estimators.exact(), "eager"),
    "conv, empirical": (conv, MAPS, plain, kf.estimators.empirical(), "aot_eager"),
    "scalings": (narrow, X, scaled, None, "eager"),
    "contracted": (Contracted, X, plain, None, "eager"),
    "staggered": (wide, X, staggered, None, "eager"),
    "no curvature": (wide, X, without, None, "eager"),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def loop(fn: Any, tx: Any, estimator: Any, params: Any, x: Tensor, wanted: list[bool]) -> list[Any]:
    """The loop that a compiled step stands for."""
    step = kf.value_grad_and_stats(fn, LOSS, estimator=estimator)
    state, draws, found = tx.init(params), generator(), []
    for stats in wanted:
        value, grads, seen = step(params, (x, Y), generator=draws, stats=stats)
        updates, state = tx.update(grads, state, params, stats=seen)
        params = kf.apply_updates(params, updates)
        found.append((value, params, state))
    return found


@pytest.mark.parametrize(("module", "x", "make", "estimator", "backend"), CASES.values(), ids=CASES)
def test_it_is_the_loop(module, x, make, estimator, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    fn, params = kf.make_functional(module().double())
    wanted = [True, True, False, True, False, False, True, True]
    want = loop(fn, make(), estimator, params, x, wanted)
    tx = make()
    train = kf.compile_step(fn, LOSS, tx, estimator=estimator, backend=backend)
    state, draws = tx.init(params), generator()
    for stats, expected in zip(wanted, want, strict=True):
        value, params, state = train(params, state, (x, Y), generator=draws, stats=stats)
        got, wish = _tree.leaves((value, params, state)), _tree.leaves(expected)
        torch.testing.assert_close(got, wish, rtol=1e-8, atol=1e-10)
    assert not torch.equal(_tree.leaves(want[0][1])[0], _tree.leaves(want[1][1])[0])


def test_three_graphs_and_no_more():
    torch._dynamo.reset()
    torch.manual_seed(0)
    fn, params = kf.make_functional(wide().double())
    tx = plain()
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        del inputs
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    train = kf.compile_step(fn, LOSS, tx, backend=counting)
    state, draws, made = tx.init(params), generator(), []
    for k in range(14):
        _, params, state = train(params, state, (X, Y), generator=draws, stats=k % 2 == 0)
        made.append(len(graphs))
    # not the first step; then without statistics, with, and the pass before a refresh
    assert made == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]


def test_steps_with_statistics_may_stay_as_they_are():
    torch._dynamo.reset()
    fn, params = kf.make_functional(narrow().double())
    tx, graphs = plain(), []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(inputs)
        return graph.forward

    train = kf.compile_step(fn, LOSS, tx, statistics=False, backend=counting)
    state, draws, made = tx.init(params), generator(), []
    for k in range(8):
        _, params, state = train(params, state, (X, Y), generator=draws, stats=k != 4)
        made.append(len(graphs))
    assert made == [0, 0, 0, 0, 1, 1, 1, 1]


def test_asked_for_a_refresh_or_for_none():
    torch._dynamo.reset()
    fn, params = kf.make_functional(narrow().double())
    tx = plain()
    train = kf.compile_step(fn, LOSS, tx, backend="eager")
    _, params, state = train(params, tx.init(params), (X, Y), generator=generator())
    moved = train(params, state, (X, Y), generator=generator(), refresh=True)[2]
    stale = train(params, state, (X, Y), generator=generator(), refresh=False)[2]
    before, new, old = (_tree.leaves(each[0].factored) for each in (state, moved, stale))
    torch.testing.assert_close(old, before, rtol=0, atol=0)
    assert not torch.allclose(new[0], before[0])


def test_a_state_from_a_file_goes_on():
    torch._dynamo.reset()
    fn, params = kf.make_functional(narrow().double())
    tx, draws = plain(), generator()
    train = kf.compile_step(fn, LOSS, tx, backend="eager")
    _, params, state = train(params, tx.init(params), (X, Y), generator=draws)
    _, params, state = train(params, state, (X, Y), generator=draws, refresh=False)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    one, two = params, params
    loaded = torch.load(file, weights_only=True)
    for _ in range(2):
        _, one, state = train(one, state, (X, Y), stats=False)
        _, two, loaded = train(two, loaded, (X, Y), stats=False)
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)


def test_draws_need_a_generator():
    fn, params = kf.make_functional(narrow().double())
    tx = plain()
    train = kf.compile_step(fn, LOSS, tx, backend="eager")
    with pytest.raises(kf.errors.HyperparameterError, match=r"monte_carlo draws random numbers and got no generator"):
        train(params, tx.init(params), (X, Y))


def test_any_number_of_steps_may_be_compiled():
    torch._dynamo.reset()
    fn, params = kf.make_functional(narrow().double())
    for rate in range(1, 10):  # torch stops at eight graphs of one function, whatever is in them
        tx = kf.sgd(0.1 * rate)
        train = kf.compile_step(fn, LOSS, tx, backend="eager")
        _, params, state = train(params, tx.init(params), (X, Y), stats=False)
        value, params, state = train(params, state, (X, Y), stats=False)
        assert value.isfinite()
