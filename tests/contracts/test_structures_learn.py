"""How structures learn: means over examples, pure states, every transformation of torch.func, regimes and order."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import Block
from kfac_func.curvature import Batch
from tests.contracts.structures import ADVERSARIAL, BLOCKS, DAMPING, ROWS, Row, block_of, fits, shape_of
from tests.zoo import CASES, absorbed, batch_of, close, measured, outer, randn, subset, vectors

LAMBDA = torch.tensor(DAMPING, dtype=torch.float64)
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
PAIRS = [
    pytest.param(row, block, id=f"{name}-{block}")
    for name, row in ROWS.items()
    for block in BLOCKS
    if fits(row, block_of(block))
]
pairs = pytest.mark.parametrize(("row", "block"), PAIRS)


def learned(row: Row, block: Block) -> Callable[[list[Tensor], Tensor], Tensor]:
    """The whole way from output gradients to a solved V, as a function of tensors alone."""

    def run(grads: list[Tensor], v: Tensor) -> Tensor:
        uses = tuple(use._replace(grads=g) for use, g in zip(block.uses, grads, strict=True))
        state = absorbed(row.structure, block._replace(uses=uses), damping=DAMPING, split=row.splits[0])
        return row.structure.solve(row.structure.factorize(state, LAMBDA, row.splits[0]), v)

    return run


@pairs
def test_vmap_is_a_loop(row, block):
    b = block_of(block)
    run, vs = learned(row, b), torch.stack([randn(*shape_of(b), seed=k) for k in range(3)])
    grads = [torch.stack([c * vectors(use) for c in (1.0, 2.5, 0.3)]) for use in b.uses]
    found = torch.func.vmap(run)(grads, vs)
    loop = torch.stack([run([g[k] for g in grads], v) for k, v in enumerate(vs)])
    assert close(found, loop, 1e-9)
    assert not close(loop[0], run([g[0] for g in grads], vs[1]), 1e-3)


@pytest.mark.compile
@rows
def test_compiles_in_one_graph(row):
    b = block_of("conv" if row.structure.matrix else "norm")
    run, v = learned(row._replace(structure=row.short or row.structure), b), randn(*shape_of(b))
    grads = [vectors(use) for use in b.uses]
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(grads, v)
    assert close(found, run(grads, v), 1e-9)


@pytest.mark.parametrize("name", CASES)
@rows
def test_moments_are_means_over_examples(row, name):
    """What crosses ranks and micro-batches: the mean of the moments of equal parts is the moments of the whole, in
    every answer to what the structure asks. Rows that say otherwise do differ.
    """
    case, structure = CASES[name], row.structure
    n, agreed = len(case.targets), []
    parts = [measured(subset(case, k, k + 1)) for k in range(n)]
    for block, whole in measured(case).items():
        if not fits(row, whole):
            continue
        prepared = structure.prepare(whole)
        others = [structure.prepare(part[block]) for part in parts]
        for question in _questions(structure, prepared)[:3]:
            every = [leaves(question(other)) for other in others]
            for wanted, *found in zip(leaves(question(prepared)), *every, strict=True):
                if wanted.numel() == 0:
                    continue
                total = torch.stack(found).sum(0)
                agreed.append(close(total / n, wanted))
                if row.means and wanted.ndim > 0 and wanted.abs().max() > 1e-12:
                    assert not close(total, wanted, 1e-3)
    assert all(agreed) == (row.means or not agreed)


@pytest.mark.parametrize("name", CASES)
def test_exact_blocks_are_means_over_examples(name):
    """Rows stand side by side, scaled so that the matrix of the whole is the mean of those of its parts."""
    case, structure = CASES[name], kf.curvature.block_diagonal()
    n = len(case.targets)
    parts = [measured(subset(case, k, k + 1)) for k in range(n)]
    for block, whole in measured(case).items():
        found = torch.stack([structure.dense(absorbed(structure, part[block])) for part in parts]).sum(0)
        wanted = structure.dense(absorbed(structure, whole))
        assert close(found / n, wanted)
        assert not close(found, wanted, 1e-3)


def _questions(s: Any, prepared: Any) -> list[Any]:
    """What a structure wants to know of its first batch, the moments first."""
    found, one = [s.measure], torch.ones((), dtype=torch.float64)

    def ask(question: Any) -> Any:
        found.append(question)
        return question(prepared)

    batch = Batch(s.measure(prepared), ask)
    state = s.refresh(s.absorb((), batch, one), LAMBDA, "pi")
    if s.scale is not None:
        s.scale(state, batch, one)
    return found


@pairs
def test_fraction_zero_changes_nothing(row, block):
    """A batch that is not finite arrives as zeros with the fraction 0."""
    s, b = row.structure, block_of(block)
    state = absorbed(s, b)
    seen, none = batch_of(s, b), torch.zeros((), dtype=torch.float64)
    zeros = partial(tree_map, torch.zeros_like)
    batch = Batch(zeros(seen.first), lambda question: zeros(seen.ask(question)))
    after = s.absorb(state, batch, none)
    after = after if s.scale is None else s.scale(after, batch, none)
    assert all(torch.equal(x, y) for x, y in zip(leaves(state), leaves(after), strict=True))


@pairs
def test_nothing_is_written_and_the_same_twice(row, block):
    s, b = row.structure, block_of(block)
    state = absorbed(s, b)
    given = [x for use in b.uses for x in (use.inputs, vectors(use))] + leaves(state)
    before, versions = [x.clone() for x in given], [x._version for x in given]
    after, again = (absorbed(s, b, state, 0.3) for _ in range(2))
    v = randn(*shape_of(b))
    factored = s.factorize(after, LAMBDA, row.splits[0])
    held = [x.clone() for x in leaves(factored)]
    assert torch.equal(s.solve(factored, v), s.solve(s.factorize(again, LAMBDA, row.splits[0]), v))
    assert all(torch.equal(x, y) for x, y in zip(leaves(factored), held, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert [x._version for x in given] == versions


@pairs
def test_a_state_survives_a_file(row, block):
    s, b = row.structure, block_of(block)
    state, file = absorbed(s, b), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded, v = torch.load(file, weights_only=True), randn(*shape_of(b))
    assert type(loaded) is type(state)
    found, wanted = (s.solve(s.factorize(x, LAMBDA, row.splits[0]), v) for x in (loaded, state))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("layer", ADVERSARIAL)
@rows
def test_adversarial_layers(row, layer):
    """⟨v, g⟩ > 0 and everything finite: dead layers, dead units, one example, opposed examples, unequal scales."""
    b = ADVERSARIAL[layer]
    for split in row.splits:
        state = absorbed(row.structure, b, split=split)
        state = absorbed(row.structure, b, state, 0.5, split=split)
        factored = row.structure.factorize(state, LAMBDA, split)
        for seed in range(3):
            v = randn(*shape_of(b), seed=seed)
            u = row.structure.solve(factored, v)
            assert u.isfinite().all()
            assert (u * v).sum() > 0


@rows
def test_units_of_activations_and_gradients_cancel(row):
    """g → 1e-4 g and a → 1e4 a leave F, and so F̂, as it is: no absolute tolerance anywhere."""
    b = block_of("no bias")
    uses = tuple(use._replace(inputs=1e4 * use.inputs, grads=1e-4 * vectors(use)) for use in b.uses)
    one, two = (row.structure.dense(absorbed(row.structure, x)) for x in (b, b._replace(uses=uses)))
    assert close(one, two, 1e-8)


# ------------------------------------------------------------------ regimes and order


def _regimes(row: Row) -> dict[str, Block]:
    """Blocks on which the structure is F."""
    linear, one = measured(CASES["deep_linear"]), measured(subset(CASES["mlp"], 0, 1))
    product = {f"deep linear {k}": b for k, b in linear.items()} | {f"one example {k}": b for k, b in one.items()}
    every = {k: block_of(k) for k in BLOCKS}
    return {"": {}, "product": product, "always": product | every}[row.exact]


@rows
def test_exact_where_it_should_be(row):
    for name, b in _regimes(row).items():
        assert close(row.structure.dense(absorbed(row.structure, b)), outer(b), 1e-8), name


@pairs
def test_never_worse_than_another(row, block):
    b = block_of(block)
    if row.below and b.layout.matrix:
        own, other = (outer(b) - x.dense(absorbed(x, b)) for x in (row.structure, ROWS[row.below].structure))
        assert own.norm() <= other.norm() * (1 + 1e-7)


def test_the_table_orders_something():
    assert {row.below for row in ROWS.values()} > {"", "kronecker"}
    assert kf.curvature.kronecker in {getattr(kf.curvature, name.split()[0]) for name in ROWS}
