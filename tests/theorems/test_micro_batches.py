"""The statistics of micro-batches, absorbed together, are those of the whole batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func._errors import StateError
from kfac_func._tree import leaves, tree_map
from kfac_func.blocks import per_example
from kfac_func.precondition.batch import Observed
from tests.theorems.test_natural_gradient import EVERYWHERE
from tests.unit.test_purity import apart, untouched
from tests.zoo import CASES, Case, close, measured, run, subset

C = kf.curvature
CURVATURES: dict[str, Any] = {
    "identity": C.blockwise(C.identity(), C.identity()),
    "diagonal": C.diagonal(),
    "kronecker": C.kronecker(),
    "kronecker, centred": C.kronecker(centred=True),
    "kronecker, in parts": C.kronecker(sua=True, max_dim=4),
    "eigen": C.eigen(),
    "eigen, intra-batch": C.eigen("intra_batch", basis="iteration"),
    "kpsvd": C.kpsvd(),
    "deflation": C.deflation(),
    "corrected": C.corrected(),
    "lanczos": C.lanczos(),
    "inverse_free": C.inverse_free(),
    "block_diagonal": EVERYWHERE,
    "block_diagonal, window": C.blockwise(C.block_diagonal(rule="heuristic", window=2), C.diagonal()),
    "full": C.full(),
    "full, window": C.full(rule="heuristic", window=2),
    "two_level": C.two_level(C.kronecker()),
    "two_level of EKFAC": C.two_level(C.eigen(), "residual", krylov=True),
    "two_level, spectral": C.two_level(C.kronecker(), "spectral"),
    "two_level, tselepidis": C.two_level(C.kronecker(), "tselepidis", form="additive"),
}
UNSTABLE = ("eigen", "deflation", "corrected", "lanczos", "EKFAC", "spectral")  # equal eigenvalues have no one basis
STABLE = [name for name in CURVATURES if not any(word in name for word in UNSTABLE)]


def parts_of(case: Case, sizes: tuple[int, ...]) -> list[kf.Stats]:
    """The statistics of consecutive micro-batches, of these sizes and the rest."""
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist(), len(case.targets)]
    return [run(subset(case, start, stop))[2] for start, stop in itertools.pairwise(bounds)]


def scaled(case: Case, by: float) -> Case:
    return case._replace(inputs=by * case.inputs) if case.inputs.is_floating_point() else case


@pytest.mark.parametrize("name", ["mlp", "conv", "tokens", "attention", "tied"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_answer_is_that_of_the_whole_batch(curvature, name):
    """To every question that the curvature has: moments are means over all examples, rows are all the rows."""
    case = CASES[name]
    _, _, stats = run(case)
    state, questions = kf.kfac(CURVATURES[curvature]).init(case.params), []
    own = state.rules.value.curvature

    def noting(batch: Any) -> Any:
        return batch._replace(ask=lambda question: questions.append(question) or batch.ask(question))

    noted = own._replace(
        absorb=lambda old, batch, fraction: own.absorb(old, noting(batch), fraction),
        scale=lambda old, batch, fraction: own.scale(old, noting(batch), fraction),
    )
    kf.observe(kf.kfac(noted).init(case.params), stats)
    whole, parts = (Observed(state, some).batch for some in (stats, parts_of(case, (1, 3))))
    for one, two in [(whole.first, parts.first), *((whole.ask(q), parts.ask(q)) for q in questions)]:
        for x, y in zip(leaves(one), leaves(two), strict=True):
            assert x.numel() == 0 or close(y, x, 1e-10)
    one = Observed(state, parts_of(case, (1, 3))[-1]).batch
    assert curvature == "identity" or any(
        x.shape != y.shape or not close(y, x, 1e-3) for x, y in zip(leaves(whole.first), leaves(one.first), strict=True)
    )


@pytest.mark.parametrize("name", ["mlp", "conv", "tokens", "attention", "tied"])
@pytest.mark.parametrize("curvature", STABLE)
def test_micro_batches_are_one_batch(curvature, name):
    """Averages, factors, counts and directions, after two batches in parts of different sizes."""
    case = CASES[name]
    tx = kf.kfac(CURVATURES[curvature], damping=0.1, decay=0.8, refresh_every=1)
    one = two = tx.init(case.params)
    for by, sizes in ((1.0, (1, 3)), (1.4, (4,))):
        _, grads, stats = run(scaled(case, by))
        wanted, one = tx.update(grads, one, stats=stats)
        found, two = tx.update(grads, two, stats=tuple(parts_of(scaled(case, by), sizes)))
        assert (int(two.observed), int(two.rejected), int(two.failed)) == (int(one.observed), 0, 0)
        for x, y in zip(leaves(one.curvature), leaves(two.curvature), strict=True):
            assert x.numel() == 0 or close(y, x, 1e-10)
        for x, y in zip(leaves(wanted), leaves(found), strict=True):
            assert close(y, x, 1e-9)


def test_the_shares_of_examples_count():
    """Halves that are not halves: a plain mean of the parts is another average."""
    case, k = CASES["mlp"], C.kronecker()
    parts, whole = parts_of(case, (1,)), measured(case)["first.w"]
    state = kf.observe(kf.kfac().init(case.params), parts)
    plain = sum((k.measure(part.blocks()["first.w"]).a for part in parts), start=torch.zeros(())) / 2
    assert close(state.curvature.matrix["first.w"].a, k.measure(whole).a)
    assert not close(plain, k.measure(whole).a, 1e-3)


def test_moments_are_pooled_too():
    case, measure = CASES["conv"], C.blockwise(C.kronecker()).measure
    bounds = ((0, 3), (3, 7))
    parts = [run(subset(case, *bound), measure=measure)[2] for bound in bounds]
    one = kf.observe(kf.kfac().init(case.params), parts)
    two = kf.observe(kf.kfac().init(case.params), run(case)[2])
    assert all(close(x, y) for x, y in zip(leaves(one.curvature), leaves(two.curvature), strict=True))
    with pytest.raises(StateError, match="moments already"):
        kf.observe(kf.kfac(C.blockwise(C.eigen())).init(case.params), parts)


def attended(tokens: int) -> Case:
    """The attention case on its first tokens."""
    case = CASES["attention"]
    return case._replace(inputs=case.inputs[:, :tokens], targets=case.targets[:, :tokens])


@pytest.mark.parametrize("curvature", [EVERYWHERE, C.full()], ids=["block_diagonal", "full"])
def test_rows_of_different_lengths_stand_side_by_side(curvature):
    """Micro-batches of shorter and longer sequences: the curvature is the mean over their examples."""
    short, long = subset(attended(2), 0, 5), subset(attended(3), 5, 8)
    state = kf.observe(kf.kfac(curvature, damping=0.1).init(short.params), (run(short)[2], run(long)[2]))
    dense = state.rules.value.curvature.dense(state.curvature)
    for name, found in dense.items():
        wanted = sum((outer_sum(measured(case)[name]) for case in (short, long)), start=torch.zeros(())) / 8
        assert close(found, wanted)


def outer_sum(block: Any) -> Tensor:
    v = per_example(block).flatten(2).flatten(0, 1)
    return v.T @ v


def test_one_bad_part_rejects_the_batch():
    case = CASES["mlp"]
    tx = kf.kfac(damping=0.1)
    _, grads, _ = run(case)
    parts = parts_of(case, (3,))
    _, state = tx.update(grads, tx.init(case.params), stats=parts)
    bad = tree_map(lambda x: x * float("nan"), parts[1])
    _, after = tx.update(grads, state, stats=(parts[0], bad))
    assert (int(after.observed), int(after.rejected)) == (1, 1)
    assert all(torch.equal(x, y) for x, y in zip(leaves(state.curvature), leaves(after.curvature), strict=True))


def test_a_sequence_of_one_is_that_one():
    case = CASES["conv"]
    _, grads, stats = run(case)
    tx = kf.chain(kf.ekfac(damping=0.1), kf.sgd(0.1))
    found, wanted = (tx.update(grads, tx.init(case.params), stats=given) for given in ([stats], stats))
    assert all(torch.equal(x, y) for x, y in zip(leaves(found), leaves(wanted), strict=True))


def test_nothing_that_is_given_is_written_or_shared():
    case = CASES["conv"]
    tx = kf.kfac(C.full(), damping={"head.*": 0.1, "**": 0.2}, burn_in=1, refresh_every=1)
    grads, parts = run(case)[1], parts_of(case, (3,))
    state = tx.init(case.params)
    for _ in range(3):
        with untouched(state, parts, grads):
            updates, after = tx.update(grads, state, case.params, stats=parts)
        apart(updates, state, parts, grads, after)
        state = after
