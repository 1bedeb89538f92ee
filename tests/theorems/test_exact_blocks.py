"""Per-example gradients of the exact vectors rebuild every block of the GGN: every layer, loss and reduction."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import kfac_func as kf
from kfac_func.blocks import per_example, squares
from tests import oracles
from tests.zoo import CASES, Case, close, curvature_of, dense_block, direction, measured, outer

BLOCKS = [(name, block) for name, case in CASES.items() for block in case.blocks]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_block_of_the_ggn(name, block):
    wanted = curvature_of(name).block(CASES[name].blocks[block])
    mine = measured(CASES[name])[block]
    assert close(outer(mine), wanted)
    assert close(squares(mine).flatten(), wanted.diagonal())


@pytest.mark.parametrize("name", CASES)
def test_blocks_off_the_diagonal(name):
    case = CASES[name]
    found = {block: per_example(b).flatten(2) for block, b in measured(case).items()}
    for one, two in itertools.combinations(found, 2):
        got = torch.einsum("vbp,vbq->pq", found[one], found[two]) / len(case.targets)
        assert close(got, curvature_of(name).block(case.blocks[one], case.blocks[two]), 1e-9)


@pytest.mark.parametrize("block", ["query", "key", "value", "out"])
def test_exciting_all_positions_together_is_biased(block):
    """The mutation that turns the test above red for attention: one column per class, in all positions at once."""
    case = CASES["attention"]

    def together(loss, z, targets, noise):
        columns = loss.factor(z, targets).unflatten(0, z.shape[1:])
        yield columns.sum(0)

    wrong = kf.estimators.exact()._replace(vectors=together)
    right, wanted = measured(case)[block], curvature_of("attention").block(case.blocks[block])
    assert close(outer(right), wanted)
    assert not close(outer(measured(case, wrong)[block]), wanted, 1e-3)


def test_factor_of_the_head():
    """G of the head is the mean of the blocks of the output Hessian that belong to one token."""
    case = CASES["attention"]
    g = kf.curvature.kronecker().measure(measured(case)["head"]).g
    h = oracles.output_hessian(case.value, case.fn(case.params, case.inputs), case.targets)
    tokens = h.diagonal().numel() // 2
    wanted = torch.stack([h[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] for k in range(tokens)]).sum(0) / 3
    assert close(g, wanted)


def _three(name: str) -> list[Case]:
    """A case under the reductions "mean", "sum" and "batchmean", with torch's own values."""
    case = CASES[name]
    make, torch_value = {
        "deep_linear": (kf.losses.mse, F.mse_loss),
        "bernoulli": (kf.losses.bce_with_logits, F.binary_cross_entropy_with_logits),
        "attention": (
            lambda reduction: kf.losses.cross_entropy(class_dim=-1, reduction=reduction),
            lambda z, t, reduction: F.cross_entropy(z.movedim(-1, 1), t, reduction=reduction),
        ),
    }[name]

    def value(z, t, reduction):
        kind = "sum" if reduction == "batchmean" else reduction
        return torch_value(z, t, reduction=kind) / (len(z) if reduction == "batchmean" else 1)

    return [
        case._replace(loss=make(reduction=r), value=lambda z, t, r=r: value(z, t, r))
        for r in ("mean", "sum", "batchmean")
    ]


@pytest.mark.parametrize("name", ["deep_linear", "bernoulli", "attention"])
def test_reductions(name):
    """F of a sum is N times F of a mean over examples; a mean over d outputs has its 1/d inside."""
    cases = _three(name)
    wanted = {}
    for case in cases:
        for block in case.blocks:
            wanted[case.loss.reduction, block] = dense_block(case, block)
            assert close(outer(measured(case)[block]), wanted[case.loss.reduction, block])
    n = len(cases[0].targets)
    for block in cases[0].blocks:
        assert close(wanted["sum", block], n * wanted["batchmean", block])
        assert not close(wanted["mean", block], wanted["batchmean", block], 1e-3)


@pytest.mark.parametrize("name", ["deep_linear", "bernoulli", "attention"])
@pytest.mark.parametrize("split", ["pi", "exact"])
def test_reductions_give_one_direction(name, split):
    """The damping scales with the loss: (c F + c λ)^-1 (c g) is the same for every c (with π = 1 it is not)."""
    mean, total, batch = _three(name)
    terms = CASES[name].targets.numel()  # a mean over all terms divides by them, a sum by 1
    wanted = direction(mean, damping=0.01, split=split)
    for case, factor in ((total, terms), (batch, terms / len(batch.targets))):
        got = direction(case, damping=0.01 * factor, split=split)
        assert all(close(got[path], wanted[path], 1e-9) for path in wanted)


def test_padding_tokens_have_no_curvature():
    case = CASES["tokens"]
    assert int((case.inputs == 0).sum()) > 0
    block = measured(case)["embedding.weight"]
    column = outer(block).reshape(5, 11, 5, 11)[:, 0]
    assert torch.count_nonzero(column) == 0
