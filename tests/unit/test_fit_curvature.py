"""The curvature of a data set: means over all examples, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kfac_func as kf
from kfac_func import _tree
from tests.zoo import CASES, Case, curvature_of, run, subset

C = kf.curvature
CURVATURES: dict[str, Any] = {
    "kronecker": C.kronecker(),
    "eigen": C.eigen(),
    "diagonal": C.diagonal(),
    "by_path": C.by_path({"first.*": C.eigen(), "**": C.kronecker()}),
}


def same(got: Any, wanted: Any, tolerance: float) -> None:
    """Two trees with equal numbers, relative to the largest."""
    one, two = (_tree.ravel(tree)[0] for tree in (got, wanted))
    torch.testing.assert_close(one, two, rtol=0, atol=tolerance * float(two.abs().max()))


def dense(case: Case, state: kf.KFacState) -> torch.Tensor:
    return kf.linear_operator(state, case.params, damping=0).to_dense()


def fit(case: Case, sizes: list[int], **options: Any) -> kf.KFacState:
    """The curvature of a case that comes in batches of these sizes."""
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    batches = [subset(case, end - size, end).batch for end, size in zip(ends, sizes, strict=True)]
    return kf.fit_curvature(case.fn, case.loss, case.params, batches, **options)


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_batches_do_not_matter(name: str, net: str):
    if (name, net) == ("by_path", "conv"):
        pytest.skip("one net is enough for rules by path")
    case, curvature = CASES[net], CURVATURES[name]
    n = len(case.targets)
    whole = dense(case, fit(case, [n], curvature=curvature))
    for sizes in ([1, n - 1], [3, 2, n - 5]):
        torch.testing.assert_close(dense(case, fit(case, sizes, curvature=curvature)), whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["kronecker", "eigen", "diagonal"])
def test_one_batch_is_what_observe_sees(name: str):
    case = CASES["conv"]
    observed = kf.observe(kf.kfac(CURVATURES[name], split="exact").init(case.params), run(case)[2])
    state = fit(case, [len(case.targets)], curvature=CURVATURES[name])
    torch.testing.assert_close(dense(case, state), dense(case, observed), rtol=1e-9, atol=1e-11)
    grads = run(case)[1]
    same(kf.precondition(state, grads), kf.precondition(observed, grads), 1e-8)


def test_it_is_exact_where_k_fac_is():
    case = CASES["deep_linear"]
    state = fit(case, [3, 4], curvature=C.kronecker())
    blocks = state.rules.value.curvature.dense(state.curvature)
    for name, spec in case.blocks.items():
        torch.testing.assert_close(blocks[name], curvature_of("deep_linear").block(spec), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("estimator", ["exact", "empirical", "monte_carlo"])
def test_a_sum_is_n_times_the_mean(estimator: str):
    """F̂ is the mean over examples for every reduction."""
    case, n = CASES["mlp"], len(CASES["mlp"].targets)
    found = []
    for reduction in ("mean", "sum"):
        source = getattr(kf.estimators, estimator)()
        loss: Any = kf.losses.cross_entropy(reduction=reduction)  # pyright: ignore[reportArgumentType]
        options = {"estimator": source, "generator": torch.Generator().manual_seed(0), "curvature": C.kronecker()}
        found.append(dense(case, fit(case._replace(loss=loss), [3, n - 3], **options)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_progress_wraps_every_pass():
    case, seen = CASES["mlp"], []

    def progress(batches: Any) -> Any:
        for batch in batches:
            seen.append(len(batch[1]))
            yield batch

    fit(case, [3, 5], curvature=C.kronecker(), progress=progress)
    assert seen == [3, 5]
    fit(case, [3, 5], progress=progress)
    assert seen == [3, 5] * 3


def test_an_iterator_is_enough_for_one_pass():
    case = CASES["mlp"]
    state = kf.fit_curvature(case.fn, case.loss, case.params, iter([case.batch]), curvature=C.kronecker())
    assert int(state.observed) == 1


def test_observe_goes_on():
    case = CASES["mlp"]
    state = kf.observe(fit(case, [3, 5]), run(case)[2])
    assert int(state.observed) == 3
    assert int(state.failed) == 0


def test_rows_of_all_batches_fit_in_a_window():
    case = CASES["mlp"]
    exact = C.blockwise(C.block_diagonal(window=2), C.block_diagonal(window=2))
    blocks = dense(case, fit(case, [4, 4], curvature=exact))
    torch.testing.assert_close(blocks, dense(case, fit(case, [8], curvature=exact)), rtol=1e-9, atol=1e-11)
