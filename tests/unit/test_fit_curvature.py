"""The curvature of a data set: means over all examples, whatever the batches."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import kfac_func as kf
from kfac_func import _tree, errors
from kfac_func.estimators import Stats
from tests.zoo import CASES, Case, curvature_of, position_case, run, subset, unclaimed_case

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


SUMMABLE: dict[str, Any] = {
    "kronecker": C.kronecker(),
    "one-sided, in parts": C.kronecker(sides="input", max_dim=3),
    "eigen": C.eigen(),
    "eigen, mean gradient": C.eigen("mean_gradient"),
    "eigen, intra-batch": C.eigen("intra_batch"),
    "diagonal": C.diagonal(),
    "identity": C.identity(),
    "inverse_free": C.inverse_free(),
    "by_path": C.by_path({"*first*": C.eigen(), "**": C.kronecker()}),
    "two_level": C.two_level(C.kronecker()),
    "two_level of EKFAC": C.two_level(C.eigen(), "tselepidis", form="additive"),
}
TOGETHER: dict[str, Any] = {
    "centred": C.kronecker(centred=True),
    "centred EKFAC": C.eigen(centred=True),
    "kpsvd": C.kpsvd(),
    "deflation": C.deflation(),
    "corrected": C.corrected(),
    "lanczos": C.lanczos(),
    "block_diagonal": C.blockwise(C.block_diagonal(), C.block_diagonal()),
    "full": C.full(),
    "coarse space that moves": C.two_level(C.kronecker(), "residual"),
}


def budget(monkeypatch: pytest.MonkeyPatch, size: int, times: int = 0) -> None:
    monkeypatch.setattr(sys.modules["kfac_func.precondition.fit"], "BUDGET", (size, times))


def widest(case: Case, sizes: list[int], monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[kf.KFacState, int]:
    """A state, and how many vectors of a batch were there at once."""
    seen, own = [], Stats.blocks

    def blocks(stats: Stats) -> Any:
        seen.extend(len(g) for g in stats.grads)
        return own(stats)

    with monkeypatch.context() as patched:
        patched.setattr(Stats, "blocks", blocks)
        return fit(case, sizes, **options), max(seen)


@pytest.mark.parametrize("name", SUMMABLE | TOGETHER)
@pytest.mark.parametrize("net", ["mlp", "tokens", "attention"])
def test_one_chunk_of_vectors_is_held_at_a_time(name: str, net: str, monkeypatch: pytest.MonkeyPatch):
    """And the state is that of all of them together; structures that need them together get them together."""
    if (name, net) in {("by_path", "tokens"), ("by_path", "attention")}:
        pytest.skip("one net is enough for rules by path")
    case, curvature = CASES[net], (SUMMABLE | TOGETHER)[name]
    columns, n = case.loss.columns(case.fn(case.params, case.inputs)), len(case.targets)
    sizes = [2, n - 2] if name in SUMMABLE else [n]
    options = {"curvature": curvature, "split": "exact" if name in SUMMABLE and "inverse" not in name else "pi"}
    budget(monkeypatch, 1)
    one, most = widest(case, sizes, monkeypatch, **options)
    assert most == (1 if name in SUMMABLE else columns)
    if name in TOGETHER:
        return
    budget(monkeypatch, 2**40)
    whole, all_of_them = widest(case, sizes, monkeypatch, **options)
    assert all_of_them == columns
    for estimator, count in ((kf.estimators.exact(2), 2), (kf.estimators.exact(columns), columns)):
        _, most = widest(case, sizes, monkeypatch, estimator=estimator, **options)
        assert most == count
    own = whole.rules.value.curvature
    for path, wanted in own.dense(whole.curvature).items():
        torch.testing.assert_close(own.dense(one.curvature)[path], wanted, rtol=1e-9, atol=1e-11)


def test_the_budget_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch):
    """So many of three columns: 8 bytes for each of the 4 + 6 + 6 + 3 numbers of 8 examples."""
    case, sizes = CASES["mlp"], [8]
    assert case.loss.columns(case.fn(case.params, case.inputs)) == 3
    for columns, most in ((1, 1), (2, 2), (3, 3)):
        budget(monkeypatch, columns * 8 * 8 * (4 + 6 + 6 + 3) + 7)
        assert widest(case, sizes, monkeypatch)[1] == most
    budget(monkeypatch, 1, times=10)
    assert widest(case, sizes, monkeypatch)[1] == 3


@pytest.mark.parametrize("make", [position_case, unclaimed_case])
def test_random_signs_are_those_of_all_chunks(make: Any, monkeypatch: pytest.MonkeyPatch):
    case, found = make(), []
    policy = "diagonal" if make is unclaimed_case else None
    for size in (1, 2**40):
        budget(monkeypatch, size)
        found.append(fit(case, [1, 2], generator=torch.Generator().manual_seed(0), unclaimed=policy))
    one, two = (state.rules.value.curvature.dense(state.curvature) for state in found)
    for path, wanted in two.items():
        torch.testing.assert_close(one[path], wanted, rtol=1e-9, atol=1e-11)


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


def test_a_mean_over_what_is_not_ignored_needs_batches_of_one_kind():
    """Two cuts of six sentences: short with long in both batches gives the curvature of all of them; short apart from
    long would weigh every short one more.
    """
    fn, params = kf.make_functional(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5)).double())
    ids, y = torch.arange(24).reshape(6, 4) % 7, torch.arange(24).reshape(6, 4) % 5
    y[::2, 1:] = -100

    def fitted(data: Any) -> Any:
        loss = kf.losses.cross_entropy(class_dim=-1)
        return kf.fit_curvature(fn, loss, params, data, curvature=kf.curvature.kronecker())

    one = fitted([(ids, y)])
    same(fitted([(ids[:2], y[:2]), (ids[2:], y[2:])]).curvature, one.curvature, 1e-12)
    with pytest.raises(errors.HyperparameterError, match="how the data are cut"):
        fitted([(ids[::2], y[::2]), (ids[1::2], y[1::2])])


def test_a_first_batch_that_is_another_one_in_the_second_pass():
    fn, params = kf.make_functional(nn.Linear(3, 2).double())

    class Moving:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield self.passes * torch.eye(3).double(), torch.zeros(3, 2).double()

    with pytest.raises(errors.HyperparameterError, match="another first batch"):
        kf.fit_curvature(fn, kf.losses.mse(), params, Moving())
