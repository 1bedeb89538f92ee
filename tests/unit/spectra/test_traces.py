"""Trace and diagonal estimators: exact where they must be, unbiased, ordered, with errors that can be believed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from tests.unit.spectra.operators import LIKE, P, flat, on_tree, seeded, symmetric

METHODS = ("hutchinson", "hutch++", "xtrace")
DECAYING = 0.7 ** torch.arange(P, dtype=torch.float64)


def runs(matrix: Tensor, method: Any, products: int, seeds: int) -> tuple[Tensor, Tensor]:
    """Values and errors over seeds."""
    found = [
        kf.spectra.trace(
            on_tree(matrix), LIKE, generator=seeded(s), method=method, products=products, chunk_size=None
        )
        for s in range(seeds)
    ]  # fmt: skip
    return torch.stack([x.value for x in found]), torch.stack([x.error for x in found])


@pytest.mark.parametrize(("method", "products"), [("hutch++", 15), ("xtrace", 12)])
def test_exact_below_the_sketch(method: Any, products: int):
    values = torch.zeros(P, dtype=torch.float64)
    values[:5] = torch.tensor([3.0, -1.0, 7.0, 0.5, 100.0])
    found = kf.spectra.trace(on_tree(symmetric(values)), LIKE, generator=seeded(), method=method, products=products)
    assert abs(float(found.value) - 109.5) < 1e-8
    assert float(found.error) < 1e-8


@pytest.mark.parametrize(("method", "products"), [("hutch++", 12), ("xtrace", 10)])
def test_inexact_with_one_probe_less(method: Any, products: int):
    values = torch.zeros(P, dtype=torch.float64)
    values[:5] = torch.tensor([3.0, -1.0, 7.0, 0.5, 100.0])
    found = kf.spectra.trace(on_tree(symmetric(values)), LIKE, generator=seeded(), method=method, products=products)
    assert abs(float(found.value) - 109.5) > 1e-6
    assert float(found.error) > 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [4, 5, 3 * P, 200])
def test_zero_identity_and_any_number_of_products(method: Any, size: int):
    """All are exact, but hutch++ on the identity: its probes lose their length when the sketch is taken out."""
    eye = torch.eye(P, dtype=torch.float64)
    for scale in (0.0,) if method == "hutch++" and size < 3 * P else (0.0, 2.0):
        found = kf.spectra.trace(on_tree(scale * eye), LIKE, generator=seeded(), method=method, products=size)
        assert abs(float(found.value) - scale * P) < 1e-8
        assert float(found.error) < 1e-8


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_as_many_probes_as_parameters_are_exact(method: Any):
    values = torch.linspace(-1, 3, P, dtype=torch.float64)
    found = kf.spectra.trace(on_tree(symmetric(values)), LIKE, generator=seeded(), method=method, products=3 * P)
    assert abs(float(found.value - values.sum())) < 1e-8


def test_xtrace_leaves_one_out():
    """Against the definition: a basis without probe i, for every i."""
    matrix, k = symmetric(DECAYING), 6
    source = seeded()
    omega = torch.stack([torch.randn(P, generator=source, dtype=torch.float64) for _ in range(k)]).mT
    samples = []
    for i in range(k):
        others = torch.cat([omega[:, :i], omega[:, i + 1 :]], 1)
        q = torch.linalg.qr(matrix @ others).Q
        rest = omega[:, i] - q @ (q.mT @ omega[:, i])
        rest = (P - k + 1) ** 0.5 * rest / rest.norm()
        samples.append((q.mT @ matrix @ q).trace() + rest @ matrix @ rest)
    wanted = torch.stack(samples)
    found = kf.spectra.trace(on_tree(matrix), LIKE, generator=seeded(), method="xtrace", products=2 * k)
    torch.testing.assert_close(found.value, wanted.mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.error, wanted.std() / k**0.5, rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", ["decaying", "flat"])
def test_unbiased(method: Any, spectrum: str):
    values = DECAYING if spectrum == "decaying" else torch.linspace(-1, 3, P, dtype=torch.float64)
    got, _ = runs(symmetric(values), method, 12, 120)
    assert abs(float(got.mean() - values.sum())) < 3 * float(got.std()) / 120**0.5


def test_a_decaying_spectrum_orders_the_variances():
    matrix = symmetric(0.5 ** torch.arange(P, dtype=torch.float64))
    spread = {method: float(runs(matrix, method, 18, 60)[0].std()) for method in METHODS}
    assert spread["xtrace"] < 0.5 * spread["hutch++"] < 0.05 * spread["hutchinson"], spread


@pytest.mark.parametrize("method", METHODS)
def test_errors_are_honest(method: Any):
    got, errors = runs(symmetric(DECAYING), method, 24, 120)
    gaps = (got - DECAYING.sum()) / errors
    assert (gaps.abs() < 3).double().mean() > 0.9
    assert 0.5 < float(errors.square().mean().sqrt() / got.std()) < 2


@pytest.mark.parametrize("method", METHODS)
def test_chunks_change_nothing_and_loops_need_no_vmap(method: Any):
    matrix = symmetric(DECAYING)

    def reads(v: Any) -> Any:
        assert float(flat(v).sum()) == float(flat(v).sum())  # a vmap could not read it
        return on_tree(matrix)(v)

    one = kf.spectra.trace(reads, LIKE, generator=seeded(), method=method, products=13)
    for size in (3, None):
        other = kf.spectra.trace(
            on_tree(matrix), LIKE, generator=seeded(), method=method, products=13, chunk_size=size
        )  # fmt: skip
        torch.testing.assert_close(other.value, one.value, rtol=1e-9, atol=0)
        torch.testing.assert_close(other.error, one.error, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("method", "bars"), [("hutchinson", 1), ("hutch++", 3), ("xtrace", 2)])
def test_products_and_bars(method: Any, bars: int):
    calls: list[int] = []
    seen: list[int] = []

    def counted(v: Any) -> Any:
        calls.append(1)
        return on_tree(symmetric(DECAYING))(v)

    kf.spectra.trace(
        counted, LIKE, generator=seeded(), method=method, products=14,
        progress=lambda chunks: seen.append(len(list(chunks))) or chunks,
    )  # fmt: skip
    assert len(calls) == 14
    assert len(seen) == bars
    assert sum(seen) == 14


@pytest.mark.parametrize("method", METHODS)
def test_gradients_and_ensembles(method: Any):
    """The estimate is linear in the scale of the operator; several operators fit under one vmap."""
    matrix = symmetric(DECAYING)

    def value(scale: Tensor) -> Tensor:
        return kf.spectra.trace(
            lambda v: on_tree(scale * matrix)(v), LIKE, generator=seeded(), method=method, products=9
        ).value  # fmt: skip

    scales = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(value)(scales[1]), value(scales[0]), rtol=1e-8, atol=0)
    both = torch.func.vmap(value, randomness="same")(scales)
    torch.testing.assert_close(both, torch.stack([value(s) for s in scales]), rtol=1e-9, atol=0)


def test_an_operator_that_is_not_symmetric_has_a_trace_too():
    noise = torch.randn(P, 3, generator=seeded(5), dtype=torch.float64)
    matrix = noise @ torch.randn(3, P, generator=seeded(6), dtype=torch.float64)
    for method in ("hutch++", "xtrace"):
        found = kf.spectra.trace(on_tree(matrix), LIKE, generator=seeded(), method=method, products=12)
        torch.testing.assert_close(found.value, matrix.trace(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1, 4, None])
def test_the_diagonal_is_the_mean_of_its_samples(size: int | None):
    matrix, source = symmetric(DECAYING), seeded()
    v = torch.stack([2.0 * torch.randint(0, 2, (P,), generator=source) - 1 for _ in range(10)]).double()
    samples = v * (v @ matrix)
    found = kf.spectra.diagonal(on_tree(matrix), LIKE, generator=seeded(), products=10, chunk_size=size)
    torch.testing.assert_close(flat(found.value), samples.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(found.error), samples.std(0) / 10**0.5, rtol=1e-10, atol=1e-12)
    assert found.value["layer"][1] is None


def test_the_diagonal_within_its_errors():
    matrix = symmetric(torch.linspace(-1, 3, P, dtype=torch.float64))
    found = kf.spectra.diagonal(on_tree(matrix), LIKE, generator=seeded(), products=200, chunk_size=50)
    gaps = (flat(found.value) - matrix.diagonal()) / flat(found.error)
    assert gaps.abs().max() < 4
    assert gaps.abs().median() > 0.2


def test_leaves_are_matched_by_name():
    """An ordered dictionary that comes back in another order."""
    like = OrderedDict(a=torch.zeros(2, dtype=torch.float64), b=torch.zeros(2, dtype=torch.float64))
    found = kf.spectra.diagonal(lambda v: OrderedDict(b=5 * v["b"], a=2 * v["a"]), like, generator=seeded(), products=2)
    assert found.value["a"].tolist() == [2.0, 2.0]
    assert found.value["b"].tolist() == [5.0, 5.0]
