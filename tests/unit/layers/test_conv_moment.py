"""The input moments of convolutions: unfolded in chunks or correlated, always those of the unfolded patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_func.blocks import Kind
from kfac_func.layers import conv as module
from kfac_func.layers.base import moment_of_rows
from tests.zoo import randn

conv: Kind = module.conv
ROUTES = {
    "correlated": {"NUMBERS": 0},
    "correlated in parts": {"NUMBERS": 0, "SUMMED": 1},
    "unfolded": {"NUMBERS": 10**12},
    "unfolded in parts": {"NUMBERS": 10**12, "CHUNK": 100},
}


@pytest.fixture(params=ROUTES, autouse=True)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in ROUTES[request.param].items():
        monkeypatch.setattr(module, name, value)
    return request.param


def unfolded(x: Tensor, options: tuple, bias: bool) -> Tensor:
    """Σ ā āᵀ of all patches at once."""
    return moment_of_rows(conv.rows(x, options).flatten(0, 1), bias)  # pyright: ignore[reportOptionalCall]


def moment(x: Tensor, options: tuple, bias: bool) -> Any:
    return conv.moment(x, options, bias)  # pyright: ignore[reportOptionalCall]


def check(got: Any, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert wanted.abs().max() > 1e-2, "the case is not informative"
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# name: (size, kernel, what differs from stride 1, padding 0, dilation 1, one group)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "valid": ((6, 7), (3, 2), {}),
    "same": ((6, 7), (3, 5), {"padding": (1, 2)}),
    "less than same": ((6, 7), (5, 5), {"padding": (1, 0)}),
    "more than same": ((6, 7), (3, 3), {"padding": (2, 1)}),
    "windows in the padding alone": ((4, 5), (3, 2), {"padding": (4, 3)}),
    "one entry": ((1, 1), (3, 3), {"padding": (1, 1)}),
    "smaller than the kernel": ((2, 3), (5, 4), {"padding": (2, 2)}),
    "lost in the kernel": ((1, 2), (7, 6), {"padding": (3, 4)}),
    "one window": ((4, 3), (4, 3), {}),
    "1x1": ((4, 5), (1, 1), {}),
    "1x1, padded, strided": ((4, 5), (1, 1), {"padding": (1, 2), "stride": (2, 1)}),
    "flat kernel": ((4, 5), (1, 3), {"padding": (0, 1)}),
    "tall kernel, padded too far": ((4, 5), (3, 1), {"padding": (1, 2)}),
    "dilation": ((6, 7), (3, 2), {"dilation": (2, 3), "padding": (1, 2)}),
    "dilation beyond the image": ((2, 3), (2, 2), {"dilation": (3, 4), "padding": (2, 3)}),
    "stride 2": ((6, 7), (3, 3), {"stride": (2, 2), "padding": (1, 1)}),
    "stride 3, 1, dilation": ((7, 6), (3, 2), {"stride": (3, 1), "dilation": (1, 2), "padding": (0, 1)}),
    "groups": ((6, 5), (3, 2), {"groups": 2, "padding": (1, 1)}),
    "groups, stride": ((6, 5), (3, 2), {"groups": 2, "padding": (1, 0), "stride": (2, 1)}),
    "depthwise": ((5, 4), (3, 3), {"groups": 4, "padding": (1, 1)}),
    "depthwise, dilation": ((5, 4), (2, 3), {"groups": 4, "padding": (0, 1), "dilation": (2, 1)}),
    "1d": ((7,), (4,), {"padding": (1,)}),
    "1d, stride, dilation": ((9,), (3,), {"stride": (2,), "dilation": (3,), "padding": (2,)}),
    "1d, groups": ((7,), (3,), {"groups": 2}),
    "3d": ((4, 3, 5), (2, 3, 3), {"padding": (0, 1, 2)}),
    "3d, valid": ((4, 5, 3), (3, 2, 2), {}),
    "3d, dilation, groups": ((4, 5, 3), (2, 2, 3), {"dilation": (1, 2, 1), "padding": (0, 1, 1), "groups": 2}),
    "3d, stride": ((4, 5, 3), (2, 2, 3), {"stride": (2, 1, 3), "padding": (0, 1, 1)}),
}
each = pytest.mark.parametrize(("size", "kernel", "given"), CASES.values(), ids=CASES)


def case(size: tuple[int, ...], kernel: tuple[int, ...], given: dict[str, Any], n: int = 3) -> tuple[Tensor, tuple]:
    """Images of four channels and the options of the kind."""
    dims = len(kernel)
    defaults = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims, "groups": 1}
    return randn(n, 4, *size, seed=1), (*(defaults | given).values(), kernel)


IMAGES, OPTIONS = case((5, 6), (3, 2), {"padding": (1, 0)})


@pytest.mark.parametrize("n", [1, 3], ids="batch {}".format)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@each
def test_moment_is_that_of_the_unfolded_patches(size, kernel, given, bias, n):
    x, options = case(size, kernel, given, n)
    check(moment(x, options, bias), unfolded(x, options, bias))


def test_images_that_all_examples_share():
    check(moment(IMAGES.unsqueeze(0), OPTIONS, True), unfolded(IMAGES.unsqueeze(0), OPTIONS, True))


@pytest.mark.parametrize("options", [OPTIONS, (*OPTIONS[:3], 2, OPTIONS[4])], ids=["one group", "groups"])
def test_a_batch_of_moments(options):
    x = randn(4, 3, 4, 5, 6, seed=2)
    wanted = torch.stack([unfolded(one, options, True) for one in x])
    check(torch.func.vmap(lambda one: moment(one, options, True))(x), wanted)


def test_derivatives_of_a_moment():
    weights, direction = randn(25, 25, seed=3), randn(*IMAGES.shape, seed=4)

    def value(function: Any) -> Any:
        return lambda x: (weights * function(x, OPTIONS, True)).sum()

    check(torch.func.grad(value(moment))(IMAGES), torch.func.grad(value(unfolded))(IMAGES))
    got, wanted = (
        torch.func.jvp(lambda x, f=f: f(x, OPTIONS, True), (IMAGES,), (direction,)) for f in (moment, unfolded)
    )
    check(got[1], wanted[1])
    slopes = (torch.func.grad(value(f)) for f in (moment, unfolded))
    got, wanted = (torch.func.jvp(slope, (IMAGES,), (direction,)) for slope in slopes)
    check(got[1], wanted[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_narrow_numbers_are_summed_in_float32(dtype):
    x = IMAGES.to(dtype)
    got = moment(x, OPTIONS, True)
    assert got.dtype == torch.float32
    check(got.double(), unfolded(x.double(), OPTIONS, True), 1e-5)


def test_float32_keeps_its_digits_on_many_entries():
    """One weight gradient of all 2^17 entries would be off by 2e-5."""
    x = randn(128, 3, 32, 32, seed=5)
    options = ((1, 1), (1, 1), (1, 1), 1, (3, 3))
    wanted = unfolded(x, options, True)
    assert (moment(x.float(), options, True) - wanted).abs().max() < 5e-6 * wanted.abs().max()


def test_correlations_are_exactly_symmetric():
    found = module._correlated(randn(9, 4, 7, 6, seed=6).float(), OPTIONS)
    assert torch.equal(found, found.mT)


def test_inputs_stay_as_they_are():
    x = IMAGES.clone()
    moment(x, OPTIONS, True)
    assert torch.equal(x, IMAGES)


@pytest.mark.compile
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_compiled(bias):
    compiled = torch.compile(lambda x: moment(x, OPTIONS, bias), fullgraph=True, backend="aot_eager")
    check(compiled(IMAGES), unfolded(IMAGES, OPTIONS, bias))


def test_what_is_unfolded_at_a_time_is_bounded(route, monkeypatch):
    """4 · 6 numbers per patch, 5 · 5 patches per example: with a budget of two examples and a bit, two at a time."""
    sizes = []
    second_moment = module.second_moment

    def spy(rows: Tensor) -> Tensor:
        sizes.append(rows.numel())
        return second_moment(rows)

    monkeypatch.setattr(module, "second_moment", spy)
    monkeypatch.setattr(module, "CHUNK", 1300)
    moment(randn(5, 4, 5, 6, seed=6), OPTIONS, True)
    assert sizes == ([] if route.startswith("correlated") else [1200, 1200, 600])


RULE = {
    "many": (128, {}, True),
    "just enough": (114, {}, True),  # 114 · 32 · 32 numbers of 9 channels and offsets
    "too few": (113, {}, False),
    "no overlap": (2000, {"kernel": (1, 1)}, False),
    "stride": (128, {"stride": (1, 2)}, False),
    "output smaller than the input": (114, {"padding": (0, 0)}, False),
    "dilated": (114, {"dilation": (2, 2)}, False),
}


@pytest.mark.parametrize(("examples", "given", "wanted"), RULE.values(), ids=RULE)
def test_correlating_takes_overlap_and_work(examples, given, wanted, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS", 2**20)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "kernel": (3, 3)} | given
    called = []
    for name in ("_correlated", "_unfolded"):
        monkeypatch.setattr(module, name, lambda x, options, name=name: called.append(name) or torch.zeros(1, 1, 1))
    moment(torch.zeros(examples, 1, 32, 32), tuple(options.values()), False)
    assert called == ["_correlated" if wanted else "_unfolded"]
