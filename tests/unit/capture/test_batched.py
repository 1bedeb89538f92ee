"""Where the examples are: the model is asked, or told by `batched`; batches and outputs of any container."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func._errors import BatchError, HyperparameterError, PlanMismatchError, TreeMismatchError
from kfac_func.blocks import squares
from tests.zoo import close, randn

LOSS = kf.losses.mse("batchmean", scale=0.5)
P = {"w": randn(4, 5), "u": randn(5, 5, seed=1), "v": randn(5, 2, seed=2)}
N = 6
X, Y = randn(N, 4, seed=3), randn(N, 2, seed=4)


def gradient(fn: Any, params: Any, inputs: Any, targets: Tensor) -> Any:
    return torch.func.grad(lambda p: LOSS.value(fn(p, inputs), targets))(params)


def diagonals(fn: Any, params: dict, inputs: Any) -> dict[str, Tensor]:
    """Of the dense GGN of a half square: JᵀJ/N."""
    found = {}
    for path, leaf in params.items():
        j = torch.func.jacrev(lambda w, path=path: fn({**params, path: w}, inputs))(leaf)
        found[path] = j.flatten(0, -leaf.ndim - 1).square().sum(0) / len(j)
    return found


def right(model: Any, fn: Any, params: dict, inputs: Any, targets: Tensor = Y) -> kf.Plan:
    """Gradient and exact diagonal are those of autograd."""
    step: Any = kf.value_grad_and_stats(model, LOSS, estimator=kf.estimators.exact())
    _, grads, stats = step(params, (inputs, targets), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grads, gradient(fn, params, inputs, targets), rtol=1e-10, atol=1e-12)
    plan = stats.rules.value.plan
    if not plan.shared:
        wanted = diagonals(fn, params, inputs)
        for path, block in stats.blocks().items():
            own = wanted[path].permute(block.layout.order).flatten(1)
            assert close(squares(block)[:, : own.shape[1]], own), path
    return plan


def looked_up(p: dict, inputs: Any) -> Tensor:
    x, table = inputs
    return (torch.tanh(x @ p["w"]) @ table.mT).softmax(-1) @ table @ p["v"]


def attended(p: dict, inputs: Any) -> Tensor:
    x, mask = inputs
    scores = (x @ x.mT).masked_fill(~mask, -1e9).softmax(-1)
    return torch.tanh(scores @ x @ p["w"]).mean(1) @ p["v"]


def graph(p: dict, inputs: Any) -> Tensor:
    x, adjacency = inputs
    return adjacency @ torch.tanh(adjacency @ x @ p["w"]) @ p["v"]


def carried(p: dict, inputs: Any) -> Tensor:
    x, hidden = inputs
    return torch.tanh(x @ p["w"] + hidden[0] @ p["u"]) @ p["v"]


TABLE, MASK, STATE = randn(N, 5, seed=5), torch.ones(N, N).tril().bool(), randn(1, N, 5, seed=6)


def test_a_table_as_long_as_the_batch_is_not_cut():
    params = {k: P[k] for k in ("w", "v")}
    assert right(looked_up, looked_up, params, (X, TABLE)).cut.dims == (0, None)
    told = kf.batched(looked_up, shared="1")
    assert right(told, looked_up, params, (X, TABLE)).cut.dims == (0, None)
    assert right(looked_up, looked_up, params, (X, TABLE[:4])).cut.dims == (0, None)


def test_a_mask_as_long_as_the_batch_is_not_cut():
    params = {k: P[k] for k in ("w", "v")}
    rows = randn(N, N, 4, seed=7)
    assert right(attended, attended, params, (rows, MASK)).cut.dims == (0, None)


def test_in_dims_says_where_a_state_has_its_examples():
    with pytest.raises(BatchError, match="in_dims") as caught:
        kf.make_plan(carried, P, (X, STATE))
    assert "1: [1, 6, 5]" in str(caught.value)
    model = kf.batched(carried, in_dims=(0, 1))
    assert right(model, carried, P, (X, STATE)).cut.dims == (0, 1)
    plan = kf.make_plan(model, P, (X, STATE))
    assert plan == kf.make_plan(model, P, (X[:3], STATE[:, :3]))


def test_positions_in_front_of_the_examples():
    def fn(p: dict, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w"]).mean(0) @ p["v"]

    params, x = {k: P[k] for k in ("w", "v")}, randn(3, N, 4, seed=8)
    right(kf.batched(fn, in_dims=1), fn, params, x)


def test_a_graph_is_one_whole():
    params, inputs = {k: P[k] for k in ("w", "v")}, (X, randn(N, N, seed=9))
    with pytest.raises(BatchError, match="whole=True"):
        kf.make_plan(graph, params, inputs)
    plan = right(kf.batched(graph, whole=True), graph, params, inputs)
    assert plan.crossed
    assert plan.cut.whole


def test_a_first_input_that_is_no_batch():
    def fn(p: dict, inputs: dict) -> Tensor:
        return torch.tanh(inputs["x"] @ p["w"] + inputs["a_scale"]) @ p["v"]

    params = {k: P[k] for k in ("w", "v")}
    for scale in (randn(5, seed=1), torch.tensor(2.0).double(), randn(1, 5, seed=2), 3.0):
        plan = right(fn, fn, params, {"x": X, "a_scale": scale})
        assert plan.cut.dims[1] == 0
        assert plan.cut.count({"x": X, "a_scale": scale}) == N


@dataclass
class Record:
    x: Tensor
    name: str = "a"


class Pair(NamedTuple):
    x: Tensor
    scale: Tensor


CONTAINERS: dict[str, tuple[Any, Any]] = {
    "list": ([X], lambda i: i[0]),
    "nested": ({"a": [X, {"b": 2}]}, lambda i: i["a"][0]),
    "named tuple": (Pair(X, torch.ones(5)), lambda i: i.x),
    "mapping": (UserDict(x=X), lambda i: i["x"]),
    "dataclass": (Record(X), lambda i: i.x),
    "mapping of a dataclass": (UserDict(r=Record(X)), lambda i: i["r"].x),
    "with None": ((None, X), lambda i: i[1]),
}


@pytest.mark.parametrize(("inputs", "x"), CONTAINERS.values(), ids=CONTAINERS)
def test_inputs_of_any_container(inputs, x):
    params = {k: P[k] for k in ("w", "v")}

    def fn(p: dict, inputs: Any) -> Tensor:
        return torch.tanh(x(inputs) @ p["w"]) @ p["v"]

    right(fn, fn, params, inputs)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(5, 2)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(self.a(u)) + self.b(v)


@pytest.mark.parametrize(
    "pack", [tuple, list, lambda i: dict(zip("uv", i, strict=True)), lambda i: UserDict(u=i[0], v=i[1])]
)
def test_modules_take_several_inputs_in_any_container(pack):
    fn, params = kf.make_functional(Two().double())
    inputs = pack([X, randn(N, 5)])
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    grads = step(params, [inputs, Y])[1]
    torch.testing.assert_close(grads, gradient(fn, params, inputs, Y))


class Outputs(NamedTuple):
    logits: Tensor
    hidden: Tensor


PACKED: dict[str, tuple[Any, Any]] = {
    "dict": (lambda z, h: {"logits": z, "hidden": h}, "logits"),
    "tuple": (lambda z, h: (h, z), 1),
    "list, from the end": (lambda z, h: [h, z], -1),
    "named tuple": (Outputs, "logits"),
    "function": (lambda z, h: {"logits": z, "hidden": h}, lambda out: out["logits"]),
    "nested": (lambda z, h: {"a": [z, h]}, lambda out: out["a"][0]),
}


@pytest.mark.parametrize(("pack", "output"), PACKED.values(), ids=PACKED)
def test_outputs_of_any_tree(pack, output):
    params = {k: P[k] for k in ("w", "v")}

    def plain(p: dict, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w"]) @ p["v"]

    def fn(p: dict, x: Tensor) -> Any:
        return pack(plain(p, x), x @ p["w"])

    right(kf.batched(fn, output=output), plain, params, X)
    with pytest.raises(BatchError, match=r"kf\.batched"):
        kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())(params, (X, Y))
    with pytest.raises(BatchError, match=r"kf\.batched"):
        kf.value_grad_and_stats(fn, LOSS)(params, (X, Y), stats=False)


def test_an_output_that_is_not_there_is_named():
    model = kf.batched(lambda p, x: {"z": x @ p["w"]}, output="logits")
    with pytest.raises(BatchError, match="'z'"):
        kf.make_plan(model, {"w": P["w"]}, X)


@pytest.mark.parametrize("batch", [{"x": X, "labels": Y}, (X,), (X, Y, Y), X], ids=["dict", "one", "three", "tensor"])
def test_a_batch_is_a_pair(batch):
    fn = kf.make_functional(nn.Linear(4, 2).double())
    with pytest.raises(BatchError, match="pair"):
        kf.value_grad_and_stats(fn[0], LOSS)(fn[1], batch)


def test_options_that_contradict_each_other():
    with pytest.raises(HyperparameterError, match="whole=True"):
        kf.batched(graph, whole=True, shared="1")
    with pytest.raises(HyperparameterError, match="matches nothing"):
        kf.make_plan(kf.batched(graph, shared="table"), P, (X, X))
    with pytest.raises(TreeMismatchError):
        kf.make_plan(kf.batched(carried, in_dims=(0, 1, 2)), P, (X, STATE))


def test_inputs_that_disagree_about_the_examples():
    model = kf.batched(carried, in_dims=(0, 1))
    plan = kf.make_plan(model, P, (X, STATE))
    with pytest.raises(BatchError, match=r"'0': 6, '1': 5"):
        kf.value_grad_and_stats(model, LOSS)(P, ((X, STATE[:, :5]), Y), plan=plan)
    with pytest.raises(PlanMismatchError, match="inputs"):
        kf.value_grad_and_stats(model, LOSS)(P, (X, Y), plan=plan)


def test_a_model_for_which_one_example_is_another_thing():
    """Pooling and a squeeze: fine for two examples and more."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1)).double()
    inner, params = kf.make_functional(net)

    def fn(p: dict, x: Tensor) -> Tensor:
        return F.linear(inner(p, x).squeeze(), p["0.bias"].new_ones(2, 4))

    right(fn, fn, params, randn(N, 1, 8, 8, seed=1))


def test_the_number_of_examples_is_something_that_they_see_of_each_other():
    params = {k: P[k] for k in ("w", "v")}

    def fn(p: dict, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w"]) @ p["v"] / len(x)

    plan = right(fn, fn, params, X)
    assert "number" in plan.mixing
    assert not plan.crossed
    dropout = kf.make_functional(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)).double())
    assert not kf.make_plan(*dropout, X).mixing
