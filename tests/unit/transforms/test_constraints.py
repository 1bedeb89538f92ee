"""Norms and clipping."""

from __future__ import annotations

import pytest
import torch

from kfac_func.transforms import add_decayed_weights, clip_by_global_norm, global_norm
from kfac_func.transforms.schedules import multistep

UPDATES = {
    "w": torch.tensor([[1.0, 2.0]], dtype=torch.float64),
    "b": torch.tensor(2.0, dtype=torch.float64),
    "no": None,
}


def clip(updates, max_norm):
    return clip_by_global_norm(max_norm).update(updates, ())[0]


def test_global_norm_counts_every_leaf():
    assert global_norm(UPDATES).item() == 3.0
    assert global_norm({}).item() == 0.0
    assert global_norm([None]).item() == 0.0


def test_global_norm_is_wide_enough_for_narrow_leaves():
    narrow = [torch.full((4,), 300.0, dtype=torch.float16), torch.full((4,), 300.0, dtype=torch.bfloat16)]
    assert global_norm(narrow).item() == pytest.approx(300 * 8**0.5)
    assert global_norm(narrow).dtype == torch.float32
    assert global_norm([*narrow, torch.zeros(1, dtype=torch.float64)]).dtype == torch.float64


@pytest.mark.parametrize("max_norm", [1.5, torch.tensor(1.5, dtype=torch.float64)])
def test_long_updates_get_the_wanted_norm_and_keep_their_direction(max_norm):
    got = clip(UPDATES, max_norm)
    torch.testing.assert_close(got["w"], UPDATES["w"] / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(got["b"], UPDATES["b"] / 2, rtol=1e-14, atol=0)
    assert got["no"] is None


@pytest.mark.parametrize("max_norm", [3.0, 1e9, float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_short_updates_keep_every_bit(max_norm, dtype):
    odd = (torch.arange(1.0, 40.0) / 997).to(dtype)
    assert torch.equal(clip(odd, max_norm), odd)


@pytest.mark.parametrize("value", [0.0, 1e-3, 5.0])
def test_derivatives_are_finite_and_right(value):
    x = torch.full((2,), value, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: clip(x, 1.0))(x)
    norm = x.norm()
    outside = (torch.eye(2) - torch.outer(x, x) / norm**2) / norm
    torch.testing.assert_close(jacobian, outside if norm > 1 else torch.eye(2, dtype=torch.float64))
    second = torch.func.jacrev(torch.func.jacrev(lambda x: clip(x, 1.0)))(x)
    assert second.isfinite().all()


def test_gradient_of_the_norm_at_zero_is_zero():
    assert torch.func.grad(global_norm)(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("factor", "wanted"), [(1.0, 2 / 3), (0.1, 0.0), (0.0, 0.0)])
def test_the_limit_is_a_hyper_parameter(factor, wanted):
    updates = {name: UPDATES[name] * factor for name in ("w", "b")}
    grad = torch.func.grad(lambda c: clip(updates, c)["b"])(torch.tensor(1.5, dtype=torch.float64))
    assert grad.item() == pytest.approx(wanted)


def test_nan_is_not_hidden():
    got = clip([torch.tensor([float("nan")]), torch.ones(2)], 1.0)
    assert all(leaf.isnan().all() for leaf in got)


def test_decay_follows_its_schedule():
    tx = add_decayed_weights(multistep(0.5, {1: 0.1}))
    params, grads = torch.full((2,), 2.0, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    state = tx.init(params)
    for wanted in (2.0, 1.1, 1.1):
        updates, state = tx.update(grads, state, params)
        assert updates.tolist() == pytest.approx([wanted] * 2)
