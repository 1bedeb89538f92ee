"""Gram matrices from rows, the damped inverse and the window, against dense columns."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, StateError
from kfac_func._tree import leaves
from kfac_func.blocks import Pairs
from kfac_func.linalg import gram as g
from tests.zoo import close, randn

# V, V or 1, B, S, groups (0: none), o, i
SHAPES = {
    "one position": (2, 1, 5, 1, 0, 3, 4),
    "positions": (2, 1, 5, 3, 0, 4, 6),
    "many positions": (1, 1, 3, 40, 0, 2, 3),
    "own inputs": (2, 2, 5, 3, 0, 4, 6),
    "groups": (2, 1, 5, 3, 2, 4, 6),
    "vector": (3, 1, 5, 1, 0, 7, 1),
}
shapes = pytest.mark.parametrize("name", SHAPES)
LAMBDA = torch.tensor(0.3, dtype=torch.float64)


def rows_of(name: str, seed: int = 0, examples: int | None = None) -> Pairs:
    v, shared, b, s, q, o, i = SHAPES[name]
    b = examples or b
    groups = (q,) if q else ()
    return Pairs(randn(v, b, s, *groups, o, seed=seed), randn(shared, b, s, *groups, i, seed=seed + 1))


def dense(rows: Pairs) -> Tensor:
    """M [p, K], by loops over everything but the entries of a matrix."""
    found = []
    for v in range(rows.left.shape[0]):
        for b in range(rows.left.shape[1]):
            left, right = rows.left[v, b], rows.right[min(v, rows.right.shape[0] - 1), b]
            if left.ndim == 2:
                left, right = left.unsqueeze(1), right.unsqueeze(1)
            found.append(torch.stack([left[:, q].T @ right[:, q] for q in range(left.shape[1])]).flatten())
    return torch.stack(found, dim=1)


def flattened(x: Tensor) -> Tensor:
    """[V, B, V, B] as a matrix."""
    return x.flatten(2).flatten(0, 1) if x.ndim == 4 else x


@pytest.mark.parametrize("method", [g.gram, g._by_rows, g._by_matrices])
@shapes
def test_gram(name, method):
    rows = rows_of(name)
    m = dense(rows)
    assert close(flattened(method(rows, rows)), m.T @ m)
    other = rows_of(name, seed=5, examples=2)
    assert close(flattened(method(rows, other)), m.T @ dense(other))
    assert close(g.columns(rows), m.T)


@pytest.mark.parametrize("budget", [1, 15])
@pytest.mark.parametrize("method", ["_by_rows", "_by_matrices"])
@shapes
def test_a_small_budget_makes_small_pieces_of_the_same_gram(name, method, budget, monkeypatch):
    rows = rows_of(name)
    wanted, products, columns, held = getattr(g, method)(rows, rows), g._products, g.columns, list[int]()

    def counted_products(one: Pairs, two: Pairs) -> Tensor:
        held.append(one.left[..., 0].numel() * two.left.shape[:3].numel())
        return products(one, two)

    def counted_columns(part: Pairs) -> Tensor:
        held.append(columns(part).numel())
        return columns(part)

    for module in ("kfac_func.blocks.pairs", "kfac_func.linalg.gram"):
        monkeypatch.setattr(sys.modules[module], "BUDGET", budget)
    monkeypatch.setattr(g, "_products", counted_products)
    monkeypatch.setattr(g, "columns", counted_columns)
    assert close(getattr(g, method)(rows, rows), wanted)
    v, _, b, s, q, _, i = SHAPES[name]
    least = max(q, 1) * ((v * s) ** 2 if method == "_by_rows" else v * b * i)  # two examples; one output of every V_m
    assert len(held) > 1
    assert max(held) <= max(budget, least)


def test_the_cheaper_way_is_chosen(monkeypatch):
    taken: list[str] = []
    for name in ("_by_rows", "_by_matrices"):
        way = getattr(g, name)
        monkeypatch.setattr(g, name, lambda *rows, way=way, name=name: (taken.append(name), way(*rows))[1])
    for shape in ("one position", "many positions"):
        g.gram(rows_of(shape))
    assert taken == ["_by_rows", "_by_matrices"]


@pytest.mark.parametrize("budget", [1, 2**24])
@shapes
def test_norms_and_sums_over_output_vectors_are_parts_of_the_gram(name, budget, monkeypatch):
    for module in ("kfac_func.blocks.pairs", "kfac_func.linalg.gram"):
        monkeypatch.setattr(sys.modules[module], "BUDGET", budget)
    rows, other = rows_of(name), rows_of(name, seed=5, examples=2)
    (v, b), m = rows.left.shape[:2], dense(rows)
    assert close(g.squared_norms(rows), m.square().sum(0).reshape(v, b))
    assert close(g.summed_gram(rows), torch.einsum("pvb,pvc->bc", *[m.reshape(-1, v, b)] * 2))
    crossed = torch.einsum("pvb,pvc->bc", m.reshape(-1, v, b), dense(other).reshape(-1, v, 2))
    assert close(g.summed_gram(rows, other), crossed)


@shapes
def test_rows_of_examples_in_another_order_are_another_gram(name):
    """The trap: `left` position-major and `right` example-major describe other gradients."""
    rows = rows_of(name)
    order = torch.roll(torch.arange(rows.left.shape[1]), 1)
    both = Pairs(rows.left[:, order], rows.right[:, order])
    wrong = Pairs(rows.left[:, order], rows.right)
    m, v = dense(rows), rows.left.shape[0]
    columns = (torch.arange(v).unsqueeze(1) * len(order) + order).flatten()
    assert close(g.gram(both), (m.T @ m)[columns][:, columns])
    assert not close(g.gram(wrong), (m.T @ m)[columns][:, columns], 1e-2)


@shapes
def test_products_with_columns(name):
    rows = rows_of(name)
    m, v, y = dense(rows), randn(*rows.left.shape[3:], rows.right.shape[-1]), randn(*rows.left.shape[:2], seed=5)
    assert close(g.onto(rows, v).flatten(), m.T @ v.flatten())
    assert close(g.combined(rows, y).flatten(), m @ y.flatten())


def test_several_blocks_and_their_own_dampings():
    rows = {"a": rows_of("positions"), "q": rows_of("groups", 3), "o": rows_of("own inputs", 6)}
    damping = {"a": LAMBDA, "q": 2 * LAMBDA, "o": 0.01 * LAMBDA}
    us = {name: randn(*r.left.shape[3:], r.right.shape[-1], seed=9) for name, r in rows.items()}
    factored = g.woodbury(rows, damping)
    m = torch.cat([dense(r) for r in rows.values()])
    shift = torch.cat([damping[name].expand(u.numel()) for name, u in us.items()])
    inverse = torch.linalg.inv(m @ m.T + shift.diag())
    found, whole = g.solve_woodbury(factored, us), torch.cat([u.flatten() for u in us.values()])
    assert close(torch.cat([v.flatten() for v in found.values()]), inverse @ whole)
    some = g.solve_woodbury(factored, {"q": us["q"]})
    start = us["a"].numel()
    own = slice(start, start + us["q"].numel())
    assert list(some) == ["q"]
    assert close(some["q"].flatten(), inverse[own, own] @ us["q"].flatten())
    assert not close(some["q"], found["q"], 1e-3)


def test_no_damping_has_no_factor():
    assert g.woodbury({"a": rows_of("positions")}, {"a": 0 * LAMBDA}).lower.isnan().all()


def test_a_failed_cholesky_gives_nan():
    """The same gradient many times in float32, far above λ."""
    rows = Pairs(*(x.float().expand(-1, 60, *x.shape[2:]) for x in (randn(1, 1, 1, 3), randn(1, 1, 1, 4, seed=1))))
    lower = g.woodbury({"a": rows}, {"a": torch.tensor(1e-12)}).lower
    assert lower.isnan().all()
    assert g.woodbury({"a": rows}, {"a": torch.tensor(1e-3)}).lower.isfinite().all()


def test_extreme_dampings_stay_finite_in_float32():
    rows = Pairs(*(x.float() for x in rows_of("one position")))
    for damping in (1e-6, 1e30):
        factored = g.woodbury({"a": rows}, {"a": torch.tensor(damping)})
        v = g.solve_woodbury(factored, {"a": torch.ones(3, 4)})["a"]
        assert v.isfinite().all()
        assert v.dtype == torch.float32
        assert v.sum() > 0


# ------------------------------------------------------------------ the window


def stream(window: int, fractions: list[float], name: str = "positions") -> tuple[g.Window, list[Pairs]]:
    batches = [rows_of(name, 10 * k) for k in range(len(fractions))]
    state: Any = ()
    for rows, fraction in zip(batches, fractions, strict=True):
        state = g.shifted(state, rows, torch.tensor(fraction, dtype=torch.float64), window)
    return state, batches


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_the_weights_are_those_of_the_average(window):
    """β^j / Σ β^j over the batches that are kept, for the zero-debiased fractions 1/W_k."""
    weights = [sum(0.6**j for j in range(k + 1)) for k in range(5)]
    state, batches = stream(window, [1 / w for w in weights])
    kept = batches[::-1][:window]
    share = torch.tensor([0.6**j for j in range(len(kept))], dtype=torch.float64)
    found = dense(g.joined(*state))
    parts = (w * dense(rows) @ dense(rows).T for w, rows in zip(share / share.sum(), kept, strict=True))
    wanted = sum(parts, start=torch.zeros(()))
    assert close(found @ found.T, wanted)
    assert found.shape[1] == window * 10


@pytest.mark.parametrize("window", [1, 3])
def test_fraction_zero_changes_nothing(window):
    state, _ = stream(window, [1.0, 0.5])
    same, other = (
        g.shifted(state, rows_of("positions", 99), torch.tensor(f, dtype=torch.float64), window) for f in (0.0, 0.5)
    )
    assert all(torch.equal(x, y) for x, y in zip(leaves(state), leaves(same), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(leaves(state.rows), leaves(other.rows), strict=True))


def test_a_rejected_first_batch_weighs_nothing():
    state, _ = stream(2, [0.0, 0.7, 0.2])
    assert state.weights.tolist() == pytest.approx([0.2, 0.56])
    assert stream(2, [0.0, 0.7])[0].weights.tolist() == pytest.approx([0.7, 0.0])
    nothing = g.joined(*stream(2, [0.0])[0])
    assert torch.count_nonzero(nothing.left) == 0
    assert nothing.left.isfinite().all()


def test_batches_of_another_size():
    state, _ = stream(1, [1.0])
    larger, zero, half = rows_of("own inputs"), *(torch.tensor(f, dtype=torch.float64) for f in (0.0, 0.5))
    assert g.shifted(state, larger, zero, 1) is state
    moved = g.shifted(state, larger, half, 1)
    assert torch.equal(moved.rows.right[0], larger.right)
    assert close(g.joined(*moved).left, larger.left)
    with pytest.raises(StateError, match="window=1"):
        g.shifted(stream(2, [1.0])[0], larger, half, 2)
    with pytest.raises(StateError, match="vmap"):
        torch.func.vmap(lambda f: g.shifted(state, larger, f, 1).weights)(torch.stack([zero, half]))


def test_the_state_keeps_its_dtype():
    state = g.Window(Pairs(*(x.float() for x in stream(2, [1.0])[0].rows)), torch.ones(2))
    moved = g.shifted(state, rows_of("positions"), torch.tensor(0.5, dtype=torch.float64), 2)
    assert {x.dtype for x in (*moved.rows, moved.weights)} == {torch.float32}


# ------------------------------------------------------------------ the rule of damping


@pytest.mark.parametrize("window", [1, 3])
@shapes
def test_the_heuristic_is_its_formula(name, window):
    state, batches = stream(window, [1.0, 0.5, 0.4], name)
    groups, (v, b, s) = max(SHAPES[name][4], 1), batches[0].right.shape[:3]
    share = state.weights / state.weights.sum()
    a, top = (
        [
            sum(w * _moment(getattr(rows, side), q) for w, rows in zip(share, batches[::-1], strict=False)) / count
            for q in range(groups)
        ]
        for side, count in (("right", v * b * s), ("left", s))
    )
    largest = [max(float(torch.linalg.eigvalsh(m)[-1]) for m in ms) for ms in (a, top)]
    wanted = 0.3 * largest[0] + 0.3 * largest[1] + 0.09
    assert float(g.ruled(*state, LAMBDA, "heuristic")) == pytest.approx(wanted, rel=1e-9)
    assert float(g.ruled(*state, LAMBDA, "standard")) == 0.3


def _moment(side: Tensor, group: int) -> Tensor:
    rows = side[..., group, :] if side.ndim == 5 else side
    return torch.einsum("vbsi,vbsj->ij", rows, rows)


def test_the_heuristic_of_nothing_is_the_square():
    state = g.Window(Pairs(*(0 * x.unsqueeze(0) for x in rows_of("positions"))), torch.zeros(1))
    assert float(g.ruled(*state, LAMBDA, "heuristic")) == pytest.approx(0.09)


def test_an_unknown_rule():
    with pytest.raises(HyperparameterError, match="'standard' or 'heuristic'"):
        g.known_rule("lm")
