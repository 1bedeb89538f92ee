"""The contract of layer kinds: one row per kind and option, against per-example Jacobians and loops over rows.

The layer of a row is the first thing the model does, and what follows is a fixed mixing of each example's values:
z = tanh(layer(params, x)) M. So the layer's inputs are known, and its output gradients are a Jacobian of the mixing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func import _tree
from kfac_func.blocks import Diagonal, kronecker_state, pack, per_example, squares, unpack
from tests.contracts import kinds, kinds_composed
from tests.contracts.kinds import N, Row, ints

SEED = 5
ROWS = kinds.ROWS | kinds_composed.ROWS
LOSS = kf.losses.cross_entropy()

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's own, for even kernels
ids = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))


def model(row: Row) -> Callable:
    def fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return mixed(row.layer(params, x))

    return fn


def mixed(y: Tensor) -> Tensor:
    flat = y.reshape(len(y), -1).tanh()
    return flat @ torch.arange(1.0, 3 * flat.shape[1] + 1, dtype=y.dtype).sin().reshape(-1, 3)


def taken(row: Row, **options: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    step = kf.value_grad_and_stats(model(row), LOSS, estimator=kf.estimators.exact(), **options)
    return step(row.params, (row.x, ints(N, high=3)), generator=torch.Generator().manual_seed(SEED))


def columns(row: Row, fn: Callable, stats: Any) -> Tensor:
    """The exact output vectors [V, N, 3], with the random sign of every example where a use is shared."""
    found = LOSS.factor(fn(row.params, row.x), ints(N, high=3))
    if not stats.rules.value.plan.shared:
        return found
    u = torch.rand(N, generator=torch.Generator().manual_seed(SEED))
    return found * torch.where(u < 0.5, -1.0, 1.0).unsqueeze(-1)


def jacobians(row: Row, c: Tensor) -> list[list[dict[str, Tensor]]]:
    """For every vector and example (all of them together where they share the use), the gradient of each leaf."""
    J = torch.func.jacrev(lambda p: model(row)(p, row.x))(row.params)
    each = {k: torch.einsum("vnz,nz...->vn...", c, j) for k, j in J.items()}
    each = {k: e.sum(1, keepdim=True) for k, e in each.items()} if row.shared else each
    return [[{k: e[v, n] for k, e in each.items()} for n in range(1 if row.shared else N)] for v in range(len(c))]


def check(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@ids
def test_value_and_gradient_are_those_of_plain_differentiation(row):
    grads, value = torch.func.grad_and_value(lambda p: LOSS.value(model(row)(p, row.x), ints(N, high=3)))(row.params)
    got_value, got, _ = taken(row)
    check(got_value, value)
    assert list(got) == list(grads)
    for name in grads:
        assert grads[name].abs().max() > 1e-3, "the row is not informative"
        check(got[name], grads[name])


@ids
def test_statistics_can_be_stored(row):
    _, _, stats = taken(row, rows=True)
    file = io.BytesIO()
    torch.save(stats, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.rules == stats.rules
    for name, block in stats.blocks().items():
        again = loaded.blocks()[name]
        assert [use.rule for use in again.uses] == [use.rule for use in block.uses]
        assert torch.equal(squares(again), squares(block))


@ids
def test_without_statistics_everything_else_is_the_same(row):
    step = kf.value_grad_and_stats(model(row), LOSS)
    plain = step(row.params, (row.x, ints(N, high=3)), stats=False)
    value, grads, _ = taken(row)
    assert plain[2] is None
    check(plain[0], value)
    _tree.tree_map(check, plain[1], grads)


@ids
def test_every_example_and_the_squares(row):
    stats = taken(row)[2]
    blocks = stats.blocks()
    assert set(blocks) == set(row.forms)
    every = jacobians(row, columns(row, model(row), stats))
    for name, form in row.forms.items():
        wanted = torch.stack([torch.stack([form.of(leaves) for leaves in of_one]) for of_one in every])
        assert wanted.abs().max() > 1e-3, "the row is not informative"
        check(per_example(blocks[name]), wanted)
        check(squares(blocks[name]), wanted.square().sum((0, 1)) / N)


@ids
def test_the_matrix_and_back(row):
    for name, block in taken(row)[2].blocks().items():
        v = pack(block.layout, row.params)
        assert torch.equal(v, row.forms[name].of(row.params))
        back = unpack(block.layout, v, {k: leaf.shape for k, leaf in row.params.items()})
        assert set(back) == set(block.layout.leaves)
        for path, leaf in back.items():
            assert torch.equal(leaf, row.params[path])
            assert leaf.is_contiguous()
        assert len({leaf.untyped_storage().data_ptr() for leaf in back.values()}) == len(back)
        check(v.norm(), torch.stack([row.params[path].norm() for path in block.layout.leaves]).norm())


SINGLE = {name: row for name, row in ROWS.items() if row.rows is not None}


@pytest.mark.parametrize("row", SINGLE.values(), ids=list(SINGLE))
def test_factors_are_means_over_all_rows(row):
    stats = taken(row)[2]
    ((name, form),) = row.forms.items()
    block = stats.blocks()[name]
    y = row.layer(row.params, row.x)
    g = torch.einsum("vnz,nz...->vn...", columns(row, model(row), stats), every_output_gradient(y))
    g = torch.cat([row.out_rows(one.sum(0) if row.shared else one) for one in g])
    a = row.rows(row.x)
    if form.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
    count = len(a) * (N if row.shared else 1)  # N·T
    assert (block.examples, block.positions) == (N, count // N)
    got = kronecker_state(block)
    check(torch.diag_embed(got.a.values) if isinstance(got.a, Diagonal) else got.a, looped(a) / len(a))
    check(got.g, looped(g) / count)
    assert float(got.positions) == block.positions
    padding = (a == 0).flatten(1).all(dim=1).sum() if row.forms[name].bias is None else 0
    check(got.kept, (count - padding) / torch.tensor(N, dtype=a.dtype))


def every_output_gradient(y: Tensor) -> Tensor:
    """∂z_n/∂y_n, [N, 3, *y]."""
    return torch.func.vmap(torch.func.jacrev(lambda one: mixed(one.unsqueeze(0))[0]))(y)


def looped(rows: Tensor) -> Tensor:
    """Σ row rowᵀ, row after row, per group."""
    total = torch.zeros(*rows.shape[1:], rows.shape[-1], dtype=rows.dtype)
    for row in rows:
        total = total + row.unsqueeze(-1) * row.unsqueeze(-2)
    return total


@ids
def test_one_forward_pass_per_batch(row):
    calls = []

    def fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(row)(params, x)

    step = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    seen = []
    for size in (N, N, N - 1):
        step(row.params, (row.x[:size], ints(N, high=3)[:size]), generator=torch.Generator().manual_seed(0))
        seen.append(calls.copy())
        calls.clear()
    assert (seen[0][-1], *seen[1:]) == (N, [N], [N - 1])
    assert max(seen[0][:-1]) == 3  # the plan takes two and three examples, once
