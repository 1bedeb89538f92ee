"""Kronecker details that the contracts do not see: ties of transposed uses, padding, shared positions."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import Diagonal, balanced, mean_eigenvalue, merged
from tests import oracles
from tests.oracles import Spec
from tests.zoo import CASES, Case, close, direction, measured, outer, randn, run

K = kf.curvature.kronecker()


def test_padding_counts_for_nothing():
    """F̂ = (1/N) Σ_kept g gᵀ ⊗ diag(frequency of the kept tokens)."""
    case = CASES["tokens"]
    state = K.measure(measured(case)["embedding.weight"])
    kept = case.inputs[case.inputs != 0]
    n = len(case.targets)
    frequency = torch.bincount(kept, minlength=11).double() / len(kept)
    a = merged(state)[0]
    assert isinstance(a, Diagonal)
    assert close(a.values / a.values.sum(), frequency)
    assert close(state.kept, torch.tensor(len(kept) / n, dtype=torch.float64))
    block = measured(case)["embedding.weight"]
    grads = block.uses[0].grads
    assert grads is not None
    g = grads.permute(1, 0, 2, 3).double()
    mask = (case.inputs != 0)[:, None, :, None]
    wanted = torch.einsum("nvto,nvtp->op", g * mask, g * mask)
    assert close(K.dense(state), torch.kron(wanted / n, torch.diag(frequency)))


def _summed(p: dict, tokens: torch.Tensor) -> torch.Tensor:
    return F.linear(torch.tanh(F.embedding(tokens, p["e"], padding_idx=0).sum(1)), p["head"])


def _padded(columns: int) -> Case:
    """Three tokens per example, some of them padding, and more columns of padding."""
    tokens = F.pad(torch.arange(21).reshape(7, 3) * 5 % 11, (0, columns))
    kept = torch.arange(11) > 0  # padding adds nothing to the sum
    params = {"e": randn(11, 4) * kept.unsqueeze(1), "head": randn(3, 4, seed=1)}
    data, loss = (tokens, torch.arange(7) % 3), kf.losses.cross_entropy()
    return Case(_summed, params, *data, loss, F.cross_entropy, {"e": Spec("e", form="in_out")}, {})


ESTIMATORS = [kf.estimators.exact(), kf.estimators.empirical(), kf.estimators.forward_only()]


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)
def test_more_padding_changes_nothing(estimator, sharing, split):
    options = {"estimator": estimator, "sharing": sharing}
    one, two = (direction(_padded(k), options=options, damping=0.01, split=split) for k in (0, 2))
    assert close(one["e"], two["e"], 1e-9)


@pytest.mark.parametrize("columns", [0, 2])
def test_reduce_is_exact_for_sums_of_embeddings_with_padding(columns):
    """Kept positions have one gradient, so their mean input and summed gradient say everything."""
    case = _padded(columns)
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value).block(case.blocks["e"])
    assert close(outer(measured(case)["e"]), dense)
    assert close(outer(measured(case, sharing="reduce")["e"]), dense)


def test_a_tie_adds_its_parts_in_one_unit():
    """A·c and G/c with equal mean eigenvalues, both parts weighted by their positions."""
    state = K.measure(measured(CASES["tied"])["embedding"])
    a, g, t = merged(state)
    parts = [state, state.turned]
    assert close(t, torch.tensor(4.0, dtype=torch.float64))
    sums = []
    for part in parts:
        one, two = (_full(f) for f in (part.a, part.g))
        c = float(((two.trace() / len(two)) / (one.trace() / len(one))) ** 0.5)
        sums.append((0.5 * c * one, 0.5 / c * two))
    for found, halves in zip((a, g), zip(*sums, strict=True), strict=True):
        assert close(_full(found), torch.stack(halves).sum(0))


def _full(factor: Any) -> Tensor:
    return torch.diag_embed(factor.values) if isinstance(factor, Diagonal) else factor


def test_balanced_is_the_same_product():
    a, g = torch.diag(torch.tensor([4.0, 2.0])), torch.eye(3) * 0.5
    one, two = balanced(a, g)
    assert isinstance(one, torch.Tensor)
    assert isinstance(two, torch.Tensor)
    assert close(torch.kron(two, one), torch.kron(g, a), 1e-6)
    assert close(mean_eigenvalue(one), mean_eigenvalue(two), 1e-6)
    dead = torch.zeros(3, 3)
    same = [cast(torch.Tensor, x) == y for x, y in zip(balanced(a, dead), (a, dead), strict=True)]
    assert [bool(entries.all()) for entries in same] == [True, True]


def test_reduce_by_hand():
    """ā is the mean of the inputs of an example, g the sum of its gradients, T = 1."""
    w, x = randn(5, 4), randn(7, 3, 4, seed=1)
    loss, targets = kf.losses.mse(reduction="batchmean", scale=0.5), randn(7, 5, seed=2)
    value = cast(Any, None)  # not used here
    case = Case(lambda p, x: torch.tanh(F.linear(x, p["w"])).sum(1), {"w": w}, x, targets, loss, value, {}, {})
    state = K.measure(measured(case, sharing="reduce")["w"])
    mean = x.mean(1)
    slope = 1 - torch.tanh(F.linear(x, w)) ** 2
    total = slope.sum(1)
    assert close(state.a, mean.T @ mean / 7)
    assert close(state.g, torch.diag(total.square().mean(0)))
    assert float(state.positions) == 1
    expand = K.measure(measured(case)["w"])
    rows = x.flatten(0, 1)
    assert close(expand.a, rows.T @ rows / 21)
    assert close(expand.g, torch.diag(slope.square().mean((0, 1))))
    assert float(expand.positions) == 3


@pytest.mark.parametrize("split", ["pi", "exact"])
def test_a_shared_bias_is_a_block_of_its_own(split):
    """Two weights, one bias: the bias is a layer whose only input is 1."""
    params = {"one": randn(5, 4), "two": randn(5, 3, seed=1), "bias": randn(5, seed=2)}

    def fn(p, x):
        return torch.tanh(F.linear(x[:, :4], p["one"], p["bias"])) + torch.tanh(F.linear(x[:, 4:], p["two"], p["bias"]))

    data = randn(8, 7, seed=3), randn(8, 5, seed=4)
    case = Case(fn, params, *data, kf.losses.mse(), F.mse_loss, {"bias": Spec(None, "bias")}, {})
    blocks = measured(case)
    dense = oracles.ggn(fn, params, *data, F.mse_loss)
    assert set(blocks) == {"one", "two", "bias"}
    assert close(outer(blocks["bias"]), dense.block(Spec(None, "bias")))
    assert close(outer(blocks["one"]), dense.block(Spec("one")))
    state = K.measure(blocks["bias"])
    assert close(_full(state.a), torch.ones(1, 1, dtype=torch.float64))
    assert blocks["bias"].positions == 2
    grads = oracles.flat(run(case)[1])
    matrix = oracles.damped(_full(state.a), state.g, 2.0, 0.01, split)
    found = direction(case, damping=0.01, split=split)
    assert close(matrix @ found["bias"], grads["bias"], 1e-9)
