"""One product over many batches."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap
from torch.utils.data import DataLoader, TensorDataset

import kfac_func as kf
from tests.unit.products.test_curvature import flat, total, unflat
from tests.zoo import CASES, Case, close, randn

SPLIT = (5, 2, 1)  # examples per batch
LOSSES = {name: kf.losses.cross_entropy(reduction=name) for name in ("mean", "sum", "batchmean")}
MADE = {"hvp": kf.products.hvp, "ggn_vp": kf.products.ggn_vp}
caches = pytest.mark.parametrize("cache", [False, True], ids=["read every time", "cached"])


def batches(case: Case) -> list:
    return list(zip(case.inputs.split(SPLIT), case.targets.split(SPLIT), strict=True))


def vector(case: Case):
    return unflat(case, randn(total(case), seed=2))


@caches
@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("reduction", LOSSES)
def test_batches_of_unlike_sizes_add_up_to_all_examples(reduction, make, cache):
    case, loss = CASES["mlp"], LOSSES[reduction]
    made = MADE[make](case.fn, loss)
    product = kf.products.accumulate(made, case.params, batches(case), loss=loss, cache=cache)
    v = vector(case)
    wanted = flat(made(case.params, case.batch)(v))
    assert close(flat(product(v)), wanted)
    many = vmap(lambda c: flat(product(unflat(case, c * flat(v)))))(torch.tensor([1.0, 3.0]))
    assert close(many, torch.stack([wanted, 3 * wanted]))


def test_a_data_loader_is_read_again_for_every_product():
    case = CASES["mlp"]
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=3)
    made = kf.products.ggn_vp(case.fn, case.loss)
    product = kf.products.accumulate(made, case.params, loader, loss=case.loss)
    wanted = flat(made(case.params, case.batch)(vector(case)))
    for _ in range(2):
        assert close(flat(product(vector(case))), wanted)


@caches
def test_draws_stay_the_same(cache, generator):
    case = CASES["mlp"]
    made = kf.products.fisher_vp(case.fn, case.loss, kf.estimators.monte_carlo())

    def product(g: torch.Generator):
        return kf.products.accumulate(made, case.params, batches(case), loss=case.loss, generator=g, cache=cache)

    one, other = product(generator), product(generator)
    first = flat(one(vector(case)))
    assert torch.equal(first, flat(one(vector(case))))
    assert not close(first, flat(other(vector(case))), 1e-2)
    again = product(torch.Generator().manual_seed(0))
    assert torch.equal(first, flat(again(vector(case))))


def test_every_batch_draws_its_own_numbers(generator):
    case, seen = CASES["mlp"], []

    def made(params, batch, *, generator):
        seen.append(float(torch.rand((), generator=generator)))
        return lambda v: v

    product = kf.products.accumulate(made, case.params, batches(case), loss=case.loss, generator=generator)
    product(case.params)
    product(case.params)
    assert seen[:3] == seen[3:]
    assert len(set(seen)) == 3


@caches
def test_progress_sees_every_pass_and_a_cache_runs_the_model_once(cache):
    case, passes, runs = CASES["mlp"], [], []

    def progress(items):
        passes.append(len(items))
        yield from items

    def counted(params, x):
        runs.append(len(x))
        return case.fn(params, x)

    made = kf.products.ggn_vp(counted, case.loss)
    product = kf.products.accumulate(made, case.params, batches(case), loss=case.loss, cache=cache, progress=progress)
    assert (passes, runs) == (([3], [5, 2, 1]) if cache else ([], []))
    for _ in range(2):
        product(case.params)
    assert passes == ([3, 3, 3] if cache else [3, 3])
    assert runs == ([5, 2, 1] if cache else [5, 2, 1, 5, 2, 1])
