"""Batches that are gone through several times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, SubsetRandomSampler, TensorDataset
from torch.utils.data import WeightedRandomSampler as Weighted

import kfac_func as kf
from kfac_func import errors
from kfac_func.capture import repeatable, rereadable

DATA = TensorDataset(torch.arange(24.0).reshape(12, 2), torch.zeros(12, 1))
FN, PARAMS = kf.make_functional(torch.nn.Linear(2, 1))
LOSS = kf.losses.mse("batchmean", scale=0.5)


class Moving:
    """Batches that are others in every pass, which no sampler says."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield torch.arange(6.0).reshape(3, 2) + (self.passes > 1), torch.zeros(3, 1)


SHUFFLED = {
    "shuffle": DataLoader(DATA, batch_size=4, shuffle=True),
    "subset": DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(range(6))),
    "weighted": DataLoader(DATA, batch_size=4, sampler=Weighted([1.0] * 12, 12)),
    "batches": DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(6)), 3, False)),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_samplers_that_shuffle_are_refused(name):
    with pytest.raises(errors.HyperparameterError, match=r"(?s)others in every pass.*shuffle=False"):
        rereadable(SHUFFLED[name], "why")


@pytest.mark.parametrize(
    "batches",
    [[(torch.ones(2), torch.ones(2))], DataLoader(DATA, 4), DataLoader(DATA, 4, sampler=SequentialSampler(DATA))],
)
def test_steady_batches_pass_as_they_are(batches):
    found = rereadable(batches, "why")
    assert len(found) == len(batches)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        for one, two in zip(found, batches, strict=True):
            assert all(torch.equal(*sides) for sides in zip(one, two, strict=True))


def test_another_first_batch_is_seen():
    found = rereadable(Moving(), "why")
    assert len(list(found)) == 1
    with pytest.raises(errors.HyperparameterError, match=r"(?s)another first batch.*why"):
        list(found)


CALLS = {
    "accumulate": lambda b: kf.products.accumulate(kf.products.ggn_vp(FN, LOSS), PARAMS, b, loss=LOSS)(PARAMS),
    "fit": lambda b: kf.laplace.fit(FN, LOSS, PARAMS, b),
    "curvature": lambda b: kf.fit_curvature(FN, LOSS, PARAMS, b),
}


@pytest.mark.parametrize("name", CALLS)
def test_whoever_reads_twice_refuses_them(name):
    with pytest.raises(errors.HyperparameterError, match="others in every pass"):
        CALLS[name](SHUFFLED["shuffle"])
    CALLS[name](DataLoader(DATA, batch_size=4))


def test_a_product_sees_other_batches_in_its_second_use():
    product = kf.products.accumulate(kf.products.ggn_vp(FN, LOSS), PARAMS, Moving(), loss=LOSS)
    product(PARAMS)
    with pytest.raises(errors.HyperparameterError, match="others in every pass"):
        product(PARAMS)


def test_one_pass_may_shuffle():
    made = kf.products.ggn_vp(FN, LOSS)
    product = kf.products.accumulate(made, PARAMS, SHUFFLED["shuffle"], loss=LOSS, cache=True)
    wanted = made(PARAMS, DATA.tensors)(PARAMS)
    assert all(torch.allclose(product(PARAMS)[path], wanted[path]) for path in PARAMS)


def test_calls_draw_the_same_and_only_the_first_moves_on():
    torch.manual_seed(0)
    again = repeatable([])
    one = again(lambda: torch.rand(3))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(one, torch.rand(3))
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(again(lambda: torch.rand(3)), one)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("made", ["ggn_vp", "hvp", "fisher_vp"])
def test_a_product_with_dropout_is_linear(made, cache):
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3)).double()
    fn, params = kf.make_functional(net.train())
    x, y, loss = torch.randn(6, 4).double(), torch.randint(3, (6,)), kf.losses.cross_entropy()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    torch.manual_seed(5)
    product = kf.products.accumulate(getattr(kf.products, made)(fn, loss), params, batches, loss=loss, cache=cache)
    one, two = product(params), product(params)
    assert all(torch.equal(one[path], two[path]) for path in params)
    torch.manual_seed(5)
    parts = [getattr(kf.products, made)(fn, loss)(params, batch)(params) for batch in batches]
    for path in params:
        assert torch.allclose(one[path], (4 * parts[0][path] + 2 * parts[1][path]) / 6, rtol=1e-10, atol=1e-12)
