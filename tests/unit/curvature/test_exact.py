"""Details of `block_diagonal` and `full`: windows, rejected batches, the heuristic damping, blocks without examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._errors import HyperparameterError, StateError
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import densify, kronecker_state, per_example
from kfac_func.curvature.block_diagonal import block_diagonal
from kfac_func.curvature.full import full
from tests import oracles
from tests.zoo import CASES, Case, absorbed, close, measured, outer, position_case, randn, run, subset, unclaimed_case

LAMBDA = torch.tensor(0.03, dtype=torch.float64)
BLOCKS = [
    ("mlp", "first.w"), ("conv", "second.weight"), ("grouped", "conv.weight"), ("tokens", "embedding.weight"),
    ("tokens", "norm.weight"), ("tied", "embedding"), ("recurrent", "hidden"), ("position", "place"),
    ("unclaimed", "gain"),
]  # fmt: skip
EVERY = CASES | {"position": position_case(), "unclaimed": unclaimed_case()}
blocks = pytest.mark.parametrize(("name", "block"), BLOCKS)
MAKERS = {
    "full": full,
    "block_diagonal": lambda **options: kf.curvature.blockwise(block_diagonal(**options), block_diagonal(**options)),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
windows = pytest.mark.parametrize("window", [1, 2])


def of(name: str, block: str) -> Any:
    options = {"unclaimed": "diagonal", "strict": False} if name == "unclaimed" else {}
    return measured(EVERY[name], **options)[block]


def shaped(block: Any) -> torch.Size:
    return per_example(block).shape[2:]


def inverse(f: Tensor, damping: float) -> Tensor:
    return torch.linalg.inv(f + damping * torch.eye(len(f), dtype=f.dtype))


@blocks
def test_a_block_is_the_dense_solve(name, block):
    """Blocks that all examples share and leaves that no kind sees too: their one column per vector."""
    b, structure = of(name, block), block_diagonal()
    state, u = absorbed(structure, b), randn(*shaped(b))
    v = structure.solve(structure.factorize(state, LAMBDA, "pi"), u)
    rows = per_example(b).flatten(2).flatten(0, 1)
    f = rows.T @ rows / b.examples
    assert close(v.flatten(), inverse(f, 0.03) @ u.flatten(), 1e-9)
    assert close(structure.dense(state), f)
    if name in CASES:
        assert close(f, outer(b))


@pytest.mark.parametrize(("name", "block"), [one for one in BLOCKS if one != ("tied", "embedding")])
def test_the_heuristic_damping(name, block):
    """λ σ₁(A) + λ σ₁(G) + λ² with the factors of `kronecker` (a tied weight has two pairs); A = 1 for vector blocks."""
    b, structure = of(name, block), block_diagonal(rule="heuristic")
    state, u = absorbed(structure, b), randn(*shaped(b))
    if b.layout.matrix:
        moments = kronecker_state(b)
        a, g = (float(torch.linalg.eigvalsh(densify(x)).max()) for x in (moments.a, moments.g))
    else:
        rows = per_example(b).flatten(0, 1)
        a, g = 1.0, float(torch.linalg.eigvalsh(rows.T @ rows / b.examples).max())
    own = 0.03 * a + 0.03 * g + 0.03**2
    v = structure.solve(structure.factorize(state, LAMBDA, "pi"), u)
    assert close(v.flatten(), inverse(structure.dense(state), own) @ u.flatten(), 1e-9)
    assert not close(v.flatten(), inverse(structure.dense(state), 0.03) @ u.flatten(), 1e-2)


@pytest.mark.parametrize("name", ["mlp", "conv", "tokens"])
def test_the_heuristic_damping_of_all_blocks(name):
    case, found = CASES[name], {}
    _, grads, stats = run(case)
    state = kf.observe(kf.kfac(full(rule="heuristic"), damping=0.03).init(case.params), stats)
    order = list(case.blocks)
    for block, b in stats.blocks().items():
        own = absorbed(block_diagonal(rule="heuristic"), b)
        found[block] = block_diagonal(rule="heuristic").factorize(own, LAMBDA, "pi").damping["block"]
    from_rows = [outer_rows(stats.blocks()[block]) for block in order]
    f = torch.cat(from_rows, dim=1)
    shift = torch.cat([found[block].expand(rows.shape[1]) for block, rows in zip(order, from_rows, strict=True)])
    arrays = [oracles.laid_out(case.blocks[block], oracles.flat(grads), 0) for block in order]
    wanted = torch.linalg.solve(f.T @ f + shift.diag(), torch.cat(arrays))
    v = oracles.flat(kf.precondition(state, grads))
    assert close(torch.cat([oracles.laid_out(case.blocks[block], v, 0) for block in order]), wanted, 1e-9)


def outer_rows(b: Any) -> Tensor:
    return per_example(b).flatten(2).flatten(0, 1) / b.examples**0.5


def stream(case: Case, count: int) -> list[tuple]:
    """Gradients and statistics of batches of one size."""
    n = len(case.targets) - 1
    orders = [torch.roll(torch.arange(n + 1), k)[:n] for k in range(count)]
    return [run(case._replace(inputs=case.inputs[o] * (1 + k), targets=case.targets[o])) for k, o in enumerate(orders)]


@makers
def test_a_window_of_two_is_the_weighted_sum(make):
    """β/(1 + β) of the batch before the last, 1/(1 + β) of the last; older ones are gone."""
    case, beta = CASES["mlp"], 0.7
    batches = stream(case, 3)
    state = kf.kfac(make(window=2), damping=0.03, decay=beta).init(case.params)
    for _, _, stats in batches:
        state = kf.observe(state, stats)
    first, second = (
        {name: outer_rows(b) for name, b in stats.blocks().items()} for _, _, stats in (batches[2], batches[1])
    )
    grads, order = batches[-1][1], list(case.blocks)
    found = oracles.flat(kf.precondition(state, grads))
    v, u = (torch.cat([oracles.laid_out(case.blocks[b], oracles.flat(t), 0) for b in order]) for t in (found, grads))
    joint = make is full
    pieces = [order] if joint else [[b] for b in order]
    matrices = []
    for piece in pieces:
        one, two = (torch.cat([rows[b] for b in piece], dim=1) for rows in (first, second))
        matrices.append((one.T @ one + beta * two.T @ two) / (1 + beta))
    assert close(v, inverse(torch.block_diag(*matrices), 0.03) @ u, 1e-9)
    for name, f in state.rules.value.curvature.dense(state.curvature).items():
        assert close(f, (first[name].T @ first[name] + beta * second[name].T @ second[name]) / (1 + beta))


@windows
@makers
def test_a_rejected_batch_changes_nothing(make, window):
    case = CASES["tokens"]
    tx = kf.kfac(make(window=window), damping=0.03, refresh_every=1)
    _, grads, stats = run(case)
    sick = [tree_map(lambda x: torch.where(x > 0, x, torch.nan) if x.is_floating_point() else x, stats)]
    if window == 1:
        other = run(subset(case, 0, 5))[2]
        sick.append(other._replace(grads=tuple(torch.full_like(g, torch.inf) for g in other.grads)))
    _, state = tx.update(grads, tx.init(case.params), stats=stats)
    for bad in sick:
        v, after = tx.update(grads, state, stats=bad)
        assert (int(after.rejected), int(after.observed), int(after.failed)) == (1, 1, 0)
        for kept, found in zip(leaves(state.curvature), leaves(after.curvature), strict=True):
            assert torch.equal(kept, found)
        for wanted, found in zip(leaves(kf.precondition(state, grads)), leaves(v), strict=True):
            assert torch.equal(wanted, found)
    nothing = kf.observe(tx.init(case.params), sick[0])
    assert (nothing.curvature, int(nothing.rejected)) == ((), 1)


@makers
def test_batches_of_other_sizes(make):
    """A window of one batch takes the new size; a failed factorisation keeps the factors of the old one."""
    case = CASES["mlp"]
    (_, grads, large), (_, _, small) = run(case), run(subset(case, 0, 5))
    tx = kf.kfac(make(), damping=0.03, refresh_every=1)
    state = kf.observe(kf.observe(tx.init(case.params), large), small)
    alone = kf.observe(tx.init(case.params), small)
    for one, two in zip(leaves(kf.precondition(state, grads)), leaves(kf.precondition(alone, grads)), strict=True):
        assert close(one, two, 1e-12)
    failed = kf.observe(alone._replace(damping=torch.zeros_like(alone.damping)), large)
    assert int(failed.failed) == 1
    for one, two in zip(leaves(failed.factored), leaves(alone.factored), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(StateError, match="batches of different sizes"):
        kf.observe(kf.observe(kf.kfac(make(window=2)).init(case.params), large), small)


@makers
def test_no_damping_is_a_failed_factorisation(make):
    case = CASES["mlp"]
    _, grads, stats = run(case)
    state = kf.observe(kf.kfac(make(), damping=0.0).init(case.params), stats)
    assert int(state.failed) == 1
    for one, two in zip(leaves(kf.precondition(state, grads)), leaves(grads), strict=True):
        assert torch.equal(one, two)


@makers
def test_blocks_that_are_not_given_have_gradient_zero(make):
    case = CASES["conv"]
    _, grads, stats = run(case)
    state = kf.observe(kf.kfac(make(), damping=0.03).init(case.params), stats)
    some = {path: leaf if "second" in path else torch.zeros_like(leaf) for path, leaf in grads.items()}
    wanted = kf.precondition(state, some)
    found = kf.precondition(state, {path: leaf for path, leaf in grads.items() if "second" in path})
    assert sorted(found) == ["second.bias", "second.weight"]
    assert all(close(leaf, wanted[path], 1e-12) for path, leaf in found.items())
    assert bool(wanted["head.weight"].abs().max() > 1e-3) is (make is full)


@makers
def test_the_first_look_is_a_mean_over_examples(make):
    """Sizes alone, which average over micro-batches; the rows come when the state asks for them."""
    case, curvature = CASES["recurrent"], make()
    n = len(case.targets)
    whole, *parts = (
        leaves(curvature.measure(measured(c))) for c in (case, *(subset(case, k, k + 1) for k in range(n)))
    )
    for size, *own in zip(whole, *parts, strict=True):
        assert close(size, torch.stack(own).mean())


@makers
def test_measuring_at_once_is_refused(make):
    """Rows are no means: chunks of vectors, averaged, would be other rows."""
    case, curvature = CASES["mlp"], make()
    estimator = kf.estimators.exact(2)
    step: Any = kf.value_grad_and_stats(case.fn, case.loss, estimator=estimator, measure=curvature.measure)
    _, _, stats = step(case.params, case.batch)
    with pytest.raises(StateError, match="leave `measure=` out"):
        kf.observe(kf.kfac(curvature).init(case.params), stats)


@pytest.mark.parametrize(("name", "block"), [("position", "place"), ("unclaimed", "gain")])
def test_full_needs_rows_of_every_example(name, block):
    case = EVERY[name]
    options = {"unclaimed": "diagonal", "strict": False} if name == "unclaimed" else {}
    stats = run(case, **options)[2]
    with pytest.raises(StateError, match="block_diagonal") as caught:
        kf.observe(kf.kfac(full()).init(case.params), stats)
    assert repr(block) in str(caught.value)
    assert "3 examples" in str(caught.value)
    one = run(subset(case, 0, 1), **options)
    v = kf.precondition(kf.observe(kf.kfac(full(), damping=0.03).init(case.params), one[2]), one[1])
    assert all(leaf.isfinite().all() for leaf in leaves(v))


@pytest.mark.usefixtures("unchecked")
@makers
def test_options_without_meaning(make):
    with pytest.raises(HyperparameterError, match="'standard' or 'heuristic'"):
        make(rule="lm")
    with pytest.raises(HyperparameterError, match="window must be at least 1"):
        make(window=0)
