"""Convolutions over a grid of options: per-example gradients, diagonal and factors against loops and Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kfac_func as kf
from kfac_func.blocks import squares
from tests import oracles
from tests.oracles import Spec
from tests.zoo import Case, close, direction, functional, measured, outer, randn

N, CHANNELS, SIZE = 5, 4, (6, 7, 3)


def _case(dims: int, kernel: tuple[int, ...], bias: bool, **options: Any) -> Case:
    """A convolution of rectangular images with one asymmetric kernel, tanh, and two fixed outputs."""
    make: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = make(CHANNELS, 6, kernel, bias=bias, **options)
    size = torch.Size(SIZE[:dims])
    inputs = randn(N, CHANNELS, *size, seed=1)
    entries = conv(inputs.float())[0].numel()
    fixed = randn(2, entries, seed=2) / entries**0.5
    fn, params = functional(conv)

    def model(p, x):
        return F.linear(torch.tanh(fn(p, x)).flatten(1), fixed)

    groups = options.get("groups", 1)
    blocks = {"weight": Spec("weight", "bias" if bias else None, groups=groups)}
    targets = randn(N, 2, seed=3)
    positions = {"weight": entries // 6}
    return Case(model, params, inputs, targets, kf.losses.mse(), F.mse_loss, blocks, positions)


GRID: dict[str, tuple] = {
    "plain": (2, (3, 2), True, {}),
    "no bias": (2, (3, 2), False, {}),
    "stride": (2, (3, 2), True, {"stride": (2, 1)}),
    "stride beyond the kernel": (2, (2, 1), True, {"stride": (1, 3)}),
    "dilation": (2, (3, 2), True, {"dilation": (1, 3)}),
    "padding": (2, (3, 2), True, {"padding": (2, 0)}),
    "all": (2, (3, 2), True, {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)}),
    "same": (2, (3, 5), True, {"padding": "same"}),
    "same, odd total": (2, (2, 4), True, {"padding": "same", "dilation": (1, 1)}),
    "same, dilated": (2, (3, 2), True, {"padding": "same", "dilation": (1, 3)}),
    "valid": (2, (3, 2), True, {"padding": "valid"}),
    "reflect": (2, (3, 2), True, {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": (2, (3, 2), True, {"padding": (1, 2), "padding_mode": "replicate"}),
    "circular": (2, (3, 2), True, {"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)}),
    "groups": (2, (3, 2), True, {"groups": 2, "stride": (2, 1)}),
    "groups, no bias": (2, (3, 2), False, {"groups": 2, "padding": (0, 1)}),
    "1d": (1, (3,), True, {"stride": 2, "padding": 1}),
    "1d groups": (1, (2,), True, {"groups": 2, "dilation": 2}),
    "3d": (3, (2, 3, 1), True, {"stride": (2, 1, 1), "padding": (0, 1, 1)}),
}
each = pytest.mark.parametrize(("dims", "kernel", "bias", "options"), GRID.values(), ids=GRID)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@each
def test_per_example_gradients_and_diagonal(dims, kernel, bias, options):
    case = _case(dims, kernel, bias, **options)
    block = measured(case)["weight"]
    jacobian = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    wanted = jacobian.block(case.blocks["weight"])
    assert wanted.diagonal().min() > 0
    assert block.positions == case.positions["weight"]
    assert close(outer(block), wanted)
    assert close(squares(block).flatten(), wanted.diagonal())


@pytest.mark.parametrize(
    "name", ["plain", "no bias", "stride", "dilation", "padding", "all", "groups", "groups, no bias"]
)
def test_factors(name):
    """A from patches by loops; G from the Jacobian in something added to the convolution's output."""
    dims, kernel, bias, options = GRID[name]
    case, groups = _case(dims, kernel, bias, **options), options.get("groups", 1)
    moments = kf.curvature.kronecker().measure(measured(case)["weight"])
    settings = [
        options.get(key, default) for key, default in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))
    ]
    t = case.positions["weight"]
    for q, images in enumerate(case.inputs.chunk(groups, dim=1)):
        a = oracles.conv_patches(images, kernel, *settings).flatten(0, 1)
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1) if bias else a
        assert close(moments.a[q] if groups > 1 else moments.a, a.T @ a / (N * t))
    assert close(moments.g, _output_factor(case, groups))
    assert float(moments.positions) == t


def _output_factor(case: Case, groups: int) -> torch.Tensor:
    shape = torch.Size([6, case.positions["weight"]])

    def added(p, x):
        with _Added(p["added"]):
            return case.fn(case.params, x)

    params = {"added": torch.zeros(shape, dtype=torch.float64)}
    found = oracles.ggn(added, params, case.inputs, case.targets, case.value).block(Spec("added", form="vector"))
    one = found.reshape(*shape, *shape).diagonal(dim1=1, dim2=3).sum(-1) / case.positions["weight"]
    size = 6 // groups
    blocks = [one[k * size : (k + 1) * size, k * size : (k + 1) * size] for k in range(groups)]
    return torch.stack(blocks) if groups > 1 else blocks[0]


class _Added(torch.overrides.TorchFunctionMode):
    """Adds [o, S] to the output of every convolution."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out + self.value.reshape(out.shape[1:]) if func is F.conv2d else out


def test_grouped_convolution_is_a_kronecker_product_per_group():
    dims, kernel, bias, options = GRID["groups"]
    case = _case(dims, kernel, bias, **options)
    k = kf.curvature.kronecker()
    state = k.measure(measured(case)["weight"])
    dense = k.dense(state)
    half = len(dense) // 2
    t = case.positions["weight"]
    for q in (0, 1):
        part = slice(q * half, (q + 1) * half)
        assert close(dense[part, part], t * torch.kron(state.g[q], state.a[q]))
    assert torch.count_nonzero(dense[:half, half:]) == 0


def _pair(one: nn.Module, two: nn.Module, x_one: torch.Tensor, x_two: torch.Tensor) -> tuple[Case, Case]:
    """Two modules with the same numbers in their leaves, tanh and a sum over positions."""
    cases = []
    for module, x, dim in ((one, x_one, 1), (two, x_two, -1)):
        fn, params = functional(module)
        params = {p: cases[0].params[p].reshape(leaf.shape) for p, leaf in params.items()} if cases else params

        def model(p, x, fn=fn, dim=dim):
            h = torch.tanh(fn(p, x))
            return h if h.ndim == 2 else h.flatten(2).sum(2) if dim == -1 else h.sum(dim)

        cases.append(Case(model, params, x, randn(7, 3, seed=5), kf.losses.mse(), F.mse_loss, {}, {}))
    return cases[0], cases[1]


X, SEQUENCE = randn(7, 4, seed=4), randn(7, 5, 4, seed=4)
EQUALS = {
    "1x1 conv on 1x1 maps": (nn.Linear(4, 3), nn.Conv2d(4, 3, 1), X, X[:, :, None, None]),
    "linear on [N, T, d]": (nn.Linear(4, 3), nn.Conv1d(4, 3, 1), SEQUENCE, SEQUENCE.mT.contiguous()),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize("pair", EQUALS.values(), ids=EQUALS)
def test_convolutions_that_are_linear_layers(pair, split, sharing):
    one, two = _pair(*pair)
    a, b = (direction(c, options={"sharing": sharing}, damping=0.01, split=split) for c in (one, two))
    assert all(close(a[path], b[path].reshape(a[path].shape), 1e-9) for path in a)
    left, right = (measured(c, sharing=sharing)["weight"] for c in (one, two))
    assert left.positions == right.positions
    assert close(outer(left), outer(right))
    assert close(squares(left).flatten(), squares(right).flatten())
