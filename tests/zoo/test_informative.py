"""A case that cannot fail proves nothing: sizes that differ, gradients that live."""

from __future__ import annotations

import pytest
import torch

from tests import oracles
from tests.zoo import CASES, close, position_case, run, unclaimed_case

EVERY = CASES | {"position": position_case(), "unclaimed": unclaimed_case()}
each = pytest.mark.parametrize("name", EVERY)
# square, or as long as T, by their nature
SQUARE = {("recurrent", "hidden"), ("tied", "middle"), ("position", "place")}


@each
def test_no_two_sizes_coincide(name):
    case = EVERY[name]
    leaves = oracles.flat(case.params)
    for block, spec in case.blocks.items():
        if spec.form == "vector" or (name, block) in SQUARE:
            continue
        assert spec.weight is not None
        shape = leaves[spec.weight].shape
        o, i = (shape[1], shape[0]) if spec.form == "in_out" else (shape[0] // spec.groups, shape[1:].numel())
        sizes = [o, i + (spec.bias is not None), len(case.targets), case.positions[block]]
        sizes = [size for size in sizes if size > 1]
        assert o != i
        assert len(set(sizes)) == len(sizes), (block, sizes)


@each
def test_gradients_and_jacobians_live(name):
    case = EVERY[name]
    own = oracles.example_gradients(case.fn, case.params, case.inputs, case.targets, case.value)
    jacobian = oracles.jacobians(case.fn, case.params, case.inputs, len(case.targets))
    for spec in case.blocks.values():
        for path in filter(None, (spec.weight, spec.bias)):
            assert own[path].flatten(1).norm(dim=1).min() > 1e-6, f"{path}: an example without a gradient"
            rows = jacobian[path].flatten(0, 1).norm(dim=0)
            used = rows[1:] if name == "tokens" and path == "embedding.weight" else rows  # row 0 is padding
            assert used.reshape(len(used), -1).norm(dim=1).min() > 1e-6, f"{path}: a row without a gradient"


@each
def test_examples_differ_and_everything_is_float64(name):
    case = EVERY[name]
    z = case.fn(case.params, case.inputs).flatten(1)
    assert torch.pdist(z).min() > 1e-3
    assert {leaf.dtype for leaf in oracles.flat(case.params).values()} == {torch.float64}
    owned = {path for spec in case.blocks.values() for path in (spec.weight, spec.bias) if path is not None}
    assert set(oracles.flat(case.params)) == owned


@each
def test_value_and_gradient_of_the_step(name):
    case = EVERY[name]
    leaves = oracles.flat(case.params)

    def total(p):
        return case.value(case.fn(oracles.nested(case.params, p), case.inputs), case.targets)

    value, grads, _ = run(case, strict=False)
    wanted, expected = torch.func.grad_and_value(total)(leaves)[::-1]
    assert close(value, wanted)
    assert all(close(leaf, expected[path]) for path, leaf in oracles.flat(grads).items())


@pytest.mark.parametrize("name", CASES)
def test_positions_are_those_of_the_table(name):
    case = CASES[name]
    blocks = run(case)[2].blocks()
    assert set(blocks) == set(case.blocks)
    assert {k: b.positions for k, b in blocks.items() if b.layout.matrix} == case.positions
