"""Functions that are written anew where they hold a parameter: tensordot as an einsum, bags as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from kfac_func.layers.einsum import tensordot
from kfac_func.layers.embedding import embedding_bag
from tests.zoo import close, randn

LOSS, Y = kf.losses.cross_entropy(), torch.tensor([0, 2, 1, 0])
BAGS = torch.tensor([[0, 1, 1], [4, 4, 2], [3, 4, 4], [2, 0, 4]])
SHARES = randn(4, 3, seed=5)


def own(fn: Callable[[Any, Tensor], Tensor], params: Any, x: Tensor, n: int) -> Any:
    return torch.func.grad(lambda p: LOSS.value(fn(p, x[n : n + 1]), Y[n : n + 1]))(params)


@pytest.mark.parametrize("dims", [1, 2, ([1], [2]), ([1, 2], [2, 0])])
def test_tensordot_is_an_einsum(dims: Any):
    x, w = randn(4, 3, 3), randn(3, 3, 3, seed=1)
    assert close(tensordot(x, w, dims), torch.tensordot(x, w, dims))
    fn = lambda p, x: torch.tensordot(x, p["w"], dims).tanh().flatten(1) @ p["head"]  # noqa: E731
    params = {
        "w": w,
        "head": randn(fn({"w": w, "head": torch.eye(torch.tensordot(x, w, dims)[0].numel()).double()}, x).shape[1], 3),
    }
    plan = kf.make_plan(fn, params, x)
    assert [block.layout.kind for block in plan.blocks] == ["einsum", "einsum"]
    found = kf.products.per_example_grads(fn, LOSS, route="tape")(params, (x, Y))
    assert all(close(found[path][n], leaf) for n in range(4) for path, leaf in own(fn, params, x, n).items())


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"mode": "sum"},
    "max": {"mode": "max"},
    "padding": {"padding_idx": 4},
    "padding from the end": {"padding_idx": -1, "mode": "sum"},
    "padding, max": {"padding_idx": 4, "mode": "max"},
    "shares": {"mode": "sum", "per_sample_weights": SHARES},
    "shares and padding": {"mode": "sum", "per_sample_weights": SHARES, "padding_idx": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bags_are_embeddings(name: str):
    options, w = OPTIONS[name], randn(5, 6, seed=2)
    assert close(embedding_bag(BAGS, w, **options), F.embedding_bag(BAGS, w, **options))

    def fn(p: Any, x: tuple[Tensor, Tensor]) -> Tensor:
        mine = options if "per_sample_weights" not in options else {**options, "per_sample_weights": x[1]}
        return F.embedding_bag(x[0], p["w"], **mine).tanh() @ p["head"]

    params, x = {"w": w, "head": randn(6, 3)}, (BAGS, SHARES)
    assert not kf.make_plan(fn, params, x).unclaimed
    found = kf.products.per_example_grads(fn, LOSS, route="tape")(params, (x, Y))
    for n in range(4):
        wanted = torch.func.grad(lambda p, n=n: LOSS.value(fn(p, (BAGS[n : n + 1], SHARES[n : n + 1])), Y[n : n + 1]))(
            params
        )
        assert all(close(found[path][n], leaf) for path, leaf in wanted.items())


def test_a_module_of_bags_and_bags_by_offsets():
    fn, params = kf.make_functional(nn.Sequential(nn.EmbeddingBag(5, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    tx = kf.chain(kf.kfac(damping=0.1), kf.sgd(0.1))
    _, grads, stats = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())(params, (BAGS, Y))
    assert stats is not None
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    assert all(leaf.isfinite().all() and leaf.any() for leaf in updates.values())

    def flat(p: Any, x: Tensor) -> Tensor:
        return F.embedding_bag(x.flatten(), p["w"], torch.arange(len(x)) * 3) @ p["head"]

    own = {"w": randn(5, 6), "head": randn(6, 3)}
    assert close(flat(own, BAGS), F.embedding_bag(BAGS, own["w"]) @ own["head"])
    value = kf.products.per_example_grads(flat, LOSS, route="loop")(own, (BAGS, Y))["w"]
    found = kf.products.per_example_grads(flat, LOSS, route="tape")(own, (BAGS, Y))["w"]
    assert close(found, value)
    counts = {
        "offsets": torch.tensor([0, 3, 6, 9]),
        "padding_idx": 4,
        "mode": "sum",
        "per_sample_weights": SHARES.flatten(),
    }
    assert close(embedding_bag(BAGS.flatten(), own["w"], **counts), F.embedding_bag(BAGS.flatten(), own["w"], **counts))
    with pytest.raises(errors.CaptureError, match="writes into its parameter 'w'"):
        kf.make_plan(lambda p, x: F.embedding_bag(x, p["w"], max_norm=1.0) @ p["head"], own, BAGS)
