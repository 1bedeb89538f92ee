"""The shared parts: applying updates, counters, scalars."""

from __future__ import annotations

import pytest
import torch

from kfac_func._errors import HyperparameterError, TreeMismatchError
from kfac_func.transforms.base import (
    EmptyState,
    add_scaled,
    apply_updates,
    beside,
    check_scalar,
    counted,
    keep_missing,
    map_updates,
    resolve,
    safe_sqrt,
    scale_tree,
    stateless,
    zero_count,
)


def test_apply_updates_moves_out_of_place_and_keeps_what_has_no_update():
    params = {"w": torch.ones(2, dtype=torch.float64), "b": torch.ones(3), "gone": None}
    new = apply_updates(params, {"b": None, "gone": None, "w": torch.full((2,), 0.5, dtype=torch.float64)})
    assert torch.equal(new["w"], torch.full((2,), 1.5, dtype=torch.float64))
    assert torch.equal(params["w"], torch.ones(2, dtype=torch.float64))
    assert new["b"] is params["b"]
    assert new["gone"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_apply_updates_casts_to_the_dtype_of_the_parameter(dtype, shape):
    new = apply_updates(torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=torch.float64))
    assert new.dtype == dtype


MISFITS = {
    "another key": ({"a": torch.ones(2)}, {"b": torch.ones(2)}),
    "a missing leaf": ({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}),
    "a shape that broadcasts": ({"a": torch.ones(2)}, {"a": torch.ones(1)}),
    "a shape that would grow the parameter": ({"a": torch.ones(2)}, {"a": torch.ones(3, 2)}),
    "an update for nothing": ({"a": None}, {"a": torch.ones(2)}),
    "another container": ([torch.ones(2)], (torch.ones(2),)),
}


@pytest.mark.parametrize(("params", "updates"), MISFITS.values(), ids=MISFITS)
def test_apply_updates_refuses_misfits(params, updates):
    with pytest.raises(TreeMismatchError):
        apply_updates(params, updates)


def test_a_misfit_is_named_by_its_path():
    params = {"net": [torch.ones(2), torch.ones(3)]}
    with pytest.raises(TreeMismatchError, match=r"'net\.1'(.|\n)*shape \[1\](.|\n)*shape \[3\]"):
        apply_updates(params, {"net": [torch.ones(2), torch.ones(1)]})


def test_map_updates_skips_none_and_sees_every_tree():
    got = map_updates(
        lambda u, a, b: u + a * b, [None, torch.ones(1)], [torch.ones(1)] * 2, [torch.full((1,), 3.0)] * 2
    )
    assert got[0] is None
    assert got[1].item() == 4


def test_keep_missing_keeps_the_leaf_itself():
    old = [torch.zeros(1), torch.zeros(1)]
    kept = keep_missing(old, [None, torch.ones(1, dtype=torch.float64)])
    assert kept[0] is old[0]
    assert (kept[1].item(), kept[1].dtype) == (1, torch.float32)


def test_counted_starts_at_zero_and_counts():
    seen = []
    tx = counted(lambda updates, params, count: seen.append(count) or updates)
    state = tx.init({})
    for _ in range(3):
        _, state = tx.update({}, state)
    assert [(int(c), c.dtype, c.dim(), c.device.type) for c in seen] == [(t, torch.int64, 0, "cpu") for t in range(3)]


def test_the_counter_stays_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert zero_count().device.type == "cpu"


def test_stateless_hands_over_the_params():
    tx = stateless(lambda updates, params: (updates, params))
    assert tx.init("p") == EmptyState()
    assert tx.update("u", EmptyState(), "p") == (("u", "p"), EmptyState())
    assert tx.update("u", EmptyState(), params="p", stats=1, inplace=True) == (("u", "p"), EmptyState())
    assert tx.update("u", EmptyState())[0] == ("u", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_scalars_of_higher_precision_do_not_promote(dtype, shape):
    leaf, wide = torch.ones(shape, dtype=dtype), torch.tensor(0.5, dtype=torch.float64)
    assert scale_tree(leaf, wide).dtype == dtype
    assert add_scaled(leaf, wide, leaf).dtype == dtype


def test_beside_copies_once_per_device_and_leaves_numbers_alone():
    value, meta = torch.tensor(1.0), torch.ones(2, device="meta")
    at = beside(value)
    assert at(torch.ones(2)) is value
    assert torch.as_tensor(at(meta)).is_meta
    assert at(meta) is at(meta)
    assert beside(2.0)(meta) == 2.0


def test_safe_sqrt_and_its_derivatives():
    x = torch.tensor([0.0, 4.0, 9.0], dtype=torch.float64)
    assert safe_sqrt(x).tolist() == [0, 2, 3]
    grad = torch.func.grad(lambda x: safe_sqrt(x).sum())
    torch.testing.assert_close(grad(x), torch.tensor([0.0, 1 / 4, 1 / 6], dtype=torch.float64))
    assert torch.func.grad(lambda x: grad(x).sum())(x).isfinite().all()
    assert safe_sqrt(torch.tensor(float("nan"))).isnan()


def test_resolve():
    assert resolve(0.1, 3) == 0.1
    assert resolve(lambda count: count * 2, 3) == 6
    rate = torch.tensor(0.1)
    assert resolve(rate, 3) is rate


INTERVALS = {
    "(-inf, inf)": ([-1.0, 0, 1e9], [float("inf"), float("nan")]),
    "[0, inf)": ([0, 0.0, 3], [-1e-9, float("inf"), float("nan")]),
    "(0, inf)": ([1e-9, 3], [0, float("inf"), float("nan")]),
    "(0, inf]": ([1e-9, float("inf")], [0, -1, float("nan")]),
    "[0, 1)": ([0, 0.999], [-0.1, 1.0, float("nan")]),
    "[0, 1]": ([0, 1], [-0.1, 1.1, float("nan")]),
}


@pytest.mark.parametrize("interval", INTERVALS)
def test_check_scalar_keeps_its_interval(interval):
    inside, outside = INTERVALS[interval]
    for value in inside:
        check_scalar("x", value, interval)
    for value in [*outside, "0.5", None, torch.ones(1), abs]:
        with pytest.raises(HyperparameterError, match="x has a value that has no meaning"):
            check_scalar("x", value, interval)
    check_scalar("x", abs, interval, schedule=True)
    check_scalar("x", torch.tensor(-5.0), interval)
