"""Public dense matrices against the brute force of the test suite, which loops over examples, and stored results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kfac_func as kf
from kfac_func import _tree
from tests import oracles
from tests.zoo import CASES, close, curvature_of, measured, outer, position_case, randn, run, subset, unclaimed_case
from tests.zoo.models import mlp

T = kf.testing
SHARED = {"position": position_case(), "unclaimed": unclaimed_case()}
names = pytest.mark.parametrize("name", CASES)


def dense(f, case, **options):
    return f(case.fn, case.loss, case.params, case.batch, **options)


def order(case) -> list[str]:
    return [leaf.path for leaf in _tree.leaves_with_paths(case.params)]


@names
def test_ggn(name):
    case = CASES[name]
    assert close(dense(T.dense_ggn, case), curvature_of(name).whole(order(case)))


@names
def test_blocks_are_in_the_order_of_their_arrays(name):
    case = CASES[name]
    found = dense(T.dense_ggn, case, blocks=True)
    assert list(found) == list(measured(case))
    assert set(found) == set(case.blocks)
    assert all(close(found[block], curvature_of(name).block(spec)) for block, spec in case.blocks.items())


@pytest.mark.parametrize("name", SHARED)
def test_uses_that_all_examples_share_and_leaves_that_no_kind_sees(name):
    case = SHARED[name]
    truth = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    found = dense(T.dense_ggn, case, blocks=True)
    assert set(found) == set(case.blocks)
    assert all(close(found[block], truth.block(spec)) for block, spec in case.blocks.items())


@names
def test_fisher(name):
    case = CASES[name]
    assert close(dense(T.dense_fisher, case), curvature_of(name).whole(order(case)))
    blocks = dense(T.dense_fisher, case, blocks=True)
    assert all(close(blocks[block], outer(mine)) for block, mine in measured(case).items())


@names
@pytest.mark.parametrize(
    "estimator", [kf.estimators.monte_carlo(2), kf.estimators.curvature_prop()], ids=["mc", "prop"]
)
def test_drawn_fisher_is_that_of_the_statistics(name, estimator):
    case = CASES[name]
    found = dense(T.dense_fisher, case, estimator=estimator, generator=torch.Generator().manual_seed(3), blocks=True)
    statistics = run(case, estimator, seed=3)[2].blocks()
    assert all(close(found[block], outer(mine)) for block, mine in statistics.items())


@names
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher(name, reduction):
    case = summed(name) if reduction == "sum" else CASES[name]
    each = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, case.value)
    rows = torch.cat([each[path].flatten(1) for path in order(case)], dim=1)
    wanted = rows.T @ rows / (len(rows) if reduction == "mean" else 1)
    assert close(dense(T.dense_empirical_fisher, case), wanted)
    assert close(dense(T.dense_fisher, case, estimator=kf.estimators.empirical()), wanted)


SUM = {
    "deep_linear": kf.losses.mse("sum", scale=0.5),
    "mean_square": kf.losses.mse("sum"),
    **dict.fromkeys(["bernoulli", "grouped"], kf.losses.bce_with_logits(reduction="sum")),
    **dict.fromkeys(["attention", "tied"], kf.losses.cross_entropy(reduction="sum", class_dim=-1)),
}


def summed(name):
    """The case with the sum as its reduction."""
    loss = SUM.get(name, kf.losses.cross_entropy(reduction="sum"))
    return CASES[name]._replace(loss=loss, value=loss.value)


@names
def test_reduction_sum_is_n_times_the_mean(name):
    case = CASES[name]
    total, mean = (one.value(case.fn(case.params, case.inputs), case.targets) for one in (summed(name), case))
    for f in (T.dense_ggn, T.dense_fisher, T.dense_hessian):
        assert close(dense(f, summed(name)), total / mean * dense(f, case))


@pytest.mark.parametrize("name", ["mlp", "deep_linear", "conv", "recurrent", "tied", "tokens", "attention"])
def test_hessian(name):
    case = CASES[name]
    whole, parts = dense(T.dense_hessian, case), dense(T.dense_hessian, case, blocks=True)
    for path, rows in T.slices(case.params).items():
        wanted = oracles.loss_hessian(case.fn, case.params, case.inputs, case.targets, case.value, path)
        assert close(whole[rows, rows], wanted, 1e-9)
    assert close(whole, whole.T)
    index = T.block_indices(case.fn, case.params, case.inputs)
    assert all(close(parts[block], whole[rows][:, rows]) for block, rows in index.items())
    assert not close(whole, dense(T.dense_ggn, case), 1e-2)


def test_off_diagonal_of_the_hessian_by_differences():
    case = CASES["mlp"]
    theta, unravel = _tree.ravel(case.params)
    gradient = torch.func.grad(lambda x: case.value(case.fn(unravel(x), case.inputs), case.targets))
    step = 1e-5 * torch.eye(len(theta), dtype=theta.dtype)
    wanted = torch.stack([(gradient(theta + d) - gradient(theta - d)) / 2e-5 for d in step])
    assert close(dense(T.dense_hessian, case), wanted, 1e-7)


def test_a_model_that_mixes_examples():
    """Batch statistics: the Jacobian has entries between examples, which a loop over examples would miss."""

    def fn(p, x):
        h = x @ p["w"]
        return torch.tanh((h - h.mean(0)) * p["gain"])

    params, x, y = {"w": randn(3, 2), "gain": randn(2, seed=1)}, randn(5, 3, seed=2), randn(5, 2, seed=3)
    theta, unravel = _tree.ravel(params)
    j = torch.func.jacrev(lambda v: fn(unravel(v), x).flatten())(theta)
    assert close(T.dense_ggn(fn, kf.losses.mse("sum", scale=0.5), params, (x, y)), j.T @ j)


def test_more_rows_than_are_multiplied_at_once():
    p, x, y = {"w": randn(2, 3)}, randn(601, 3, seed=1), randn(601, 2, seed=2)
    fn, loss = (lambda p, x: F.linear(x, p["w"])), kf.losses.mse("batchmean", scale=0.5)
    assert close(T.dense_ggn(fn, loss, p, (x, y)), torch.kron(torch.eye(2, dtype=x.dtype), x.T @ x / len(x)))
    gradients = ((fn(p, x) - y).unsqueeze(2) * x.unsqueeze(1)).flatten(1)
    assert close(T.dense_empirical_fisher(fn, loss, p, (x, y)), gradients.T @ gradients / len(x))


def test_rows_of_the_leaves():
    tree = {"b": [torch.zeros(2), None, torch.zeros(3, 2)], "a": torch.zeros(())}
    assert T.slices(tree) == {"a": slice(0, 1), "b.0": slice(1, 3), "b.2": slice(3, 9)}


def test_inputs_that_are_trees_and_integers():
    def fn(p, inputs):
        return F.linear(F.embedding(inputs["tokens"], p["table"]).mean(1) * inputs["scale"], p["w"])

    params = {"table": randn(4, 3), "w": randn(2, 3, seed=1)}
    tokens = torch.tensor([[0, 1], [2, 2], [3, 1]])
    inputs, targets = {"tokens": tokens, "scale": randn(3, 1, seed=2)}, torch.tensor([0, 1, 1])
    found = T.dense_ggn(fn, kf.losses.cross_entropy(), params, (inputs, targets))
    theta, unravel = _tree.ravel(params)
    j = torch.func.jacrev(lambda v: fn(unravel(v), inputs).flatten())(theta)
    hessian = oracles.output_hessian(F.cross_entropy, fn(params, inputs), targets)
    assert close(found, j.T @ hessian @ j)


def test_it_composes_with_vmap_and_grad():
    case = subset(CASES["mlp"], 0, 3)
    many = _tree.tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), case.params)

    def ggn(p):
        return T.dense_ggn(case.fn, case.loss, p, case.batch)

    found = torch.func.vmap(ggn)(many)
    assert close(found[0], ggn(case.params))
    assert close(found[1], ggn(_tree.tree_map(lambda leaf: 2 * leaf, case.params)))
    slope = torch.func.grad(lambda s: ggn(_tree.tree_map(lambda leaf: s * leaf, case.params)).trace())
    one, step = torch.ones((), dtype=torch.float64), 1e-5
    traces = [ggn(_tree.tree_map(lambda leaf, s=s: s * leaf, case.params)).trace() for s in (1 + step, 1 - step)]
    assert close(slope(one), (traces[0] - traces[1]) / (2 * step), 1e-7)


# ------------------------------------------------------------------ stored results

FILE = Path(__file__).parents[2] / "data" / "golden_mlp.npz"
SHARED_FILE = Path(__file__).parents[3].parent / "shared" / "golden" / "golden_mlp.npz"
GOLDEN = {key: torch.tensor(value) for key, value in np.load(FILE).items()}
LAYERS = ("l0", "l1", "l2")
LOSSES = {
    "ce": (kf.losses.cross_entropy(), "y"),
    "half_sq": (kf.losses.mse(reduction="batchmean", scale=0.5), "t_squared"),
    "bernoulli": (kf.losses.bce_with_logits(reduction="batchmean"), "t_bernoulli"),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher", "hessian"])
def test_stored_dense_matrices(name, kind):
    """Leaves in the order l0/b, l0/w, l1/b, …: that of the tree."""
    loss, targets = LOSSES[name]
    params = {layer: {c: GOLDEN[f"params/{layer}/{c}"] for c in "wb"} for layer in LAYERS}
    wanted = GOLDEN[f"{name}/{'ggn' if kind == 'fisher' else kind}_dense"]
    f = getattr(T, f"dense_{kind}")
    assert close(f(mlp, loss, params, (GOLDEN["x"], GOLDEN[targets])), wanted)
