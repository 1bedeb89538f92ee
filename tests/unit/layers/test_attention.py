"""Multi-head attention: its expansion is torch's own function, and capture sees every parameter inside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import kfac_func as kf
from kfac_func import layers
from kfac_func._errors import UncapturedParameterError
from kfac_func.blocks import per_example
from tests import oracles
from tests.zoo import close, outer, randn

N, L, E, H = 3, 4, 6, 2
TORCH: Any = F.multi_head_attention_forward
OURS: Any = layers.expansions[TORCH]
LOSS = kf.losses.mse()
OUT, SELF = randn(E, E, seed=1), {"in": randn(3 * E, E, seed=2), "bias": randn(3 * E, seed=3)}


@pytest.fixture(autouse=True)
def _differentiable() -> Iterator[None]:
    """torch's fused attention has no batching rule on the CPU; the function is the same without it."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def check(got: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


# -------------------------------------------------------------------------------- the function

CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * L, [False, False, True, True], [True, False, False, True]])
MASKS: dict[str, Any] = {
    "none": None,
    "bool": CAUSAL,
    "float": randn(L, L, seed=4),
    "bool, 3-D": (randn(N * H, L, L, seed=5) > 0.5) & ~torch.eye(L, dtype=torch.bool),
    "float, 3-D": randn(N * H, L, L, seed=6),
}
PADDINGS: dict[str, Any] = {"none": None, "bool": PADDING, "float": randn(N, L, seed=7)}


def both(inputs: tuple[Tensor, ...], *args: Any, **options: Any) -> tuple[Any, Any]:
    """What the expansion and torch give; `args` from add_zero_attn on."""
    front = (*inputs, E, H, SELF["in"], SELF["bias"], *args)
    return tuple(f(*front, OUT, randn(E, seed=8), **options) for f in (OURS, TORCH))  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shown", [None, "averaged", "each head"])
def test_masks(mask, padding, shown):
    q, kv = randn(L, N, E, seed=10), randn(L, N, E, seed=11)
    options = {"attn_mask": MASKS[mask], "key_padding_mask": PADDINGS[padding]}
    options |= {"need_weights": shown is not None, "average_attn_weights": shown == "averaged"}
    more = randn(1, 1, E, seed=12), randn(1, 1, E, seed=13)
    for inputs, extra, zero in itertools.product([(q, q, q), (q, kv, kv)], [(None, None), more], [False, True]):
        check(*both(inputs, *extra, zero, 0.0, **options))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("mask", [CAUSAL, torch.zeros(L, L, dtype=torch.float64)])
@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("shown", [False, True])
def test_the_causal_hint(mask, padding, shown):
    x = randn(L, N, E, seed=10)
    for zero in (False, True):
        options = {"attn_mask": mask, "is_causal": True, "need_weights": shown, "key_padding_mask": padding}
        check(*both((x, x, x), None, None, zero, 0.0, **options))


def test_rows_that_may_look_nowhere():
    x, empty = randn(L, N, E, seed=10), torch.ones(N, L, dtype=torch.bool)
    ours, theirs = both((x, x, x), None, None, False, 0.0, key_padding_mask=empty, need_weights=False)
    check(ours, theirs)
    grad = torch.func.grad(
        lambda w: OURS(x, x, x, E, H, w, None, None, None, False, 0.0, OUT, None, True, empty, False)[0].sum()
    )(SELF["in"])
    assert grad.isfinite().all()


@pytest.mark.parametrize("shown", [False, True])
def test_inputs_without_a_batch(shown):
    q, kv = randn(L, E, seed=10), randn(L + 1, E, seed=11)
    check(*both((q, kv, kv), None, None, False, 0.0, need_weights=shown))
    options = {"attn_mask": randn(H, L, L, seed=4), "key_padding_mask": PADDINGS["float"][0]}
    check(*both((q, q, q), None, None, True, 0.0, need_weights=shown, **options))


def test_separate_weights_and_given_keys():
    q, k, v = randn(L, N, E, seed=10), randn(5, N, 2, seed=11), randn(5, N, 3, seed=12)
    names = {f"{k}_proj_weight": randn(E, n, seed=n) for k, n in (("q", E), ("k", 2), ("v", 3))}
    args = q, k, v, E, H, None, SELF["bias"], None, None, False, 0.0, OUT, None
    check(*(f(*args, use_separate_proj_weight=True, **names) for f in (OURS, TORCH)))
    given = {"static_k": randn(N * H, 7, E // H, seed=13), "static_v": randn(N * H, 7, E // H, seed=14)}
    check(*both((q, q, q), None, None, True, 0.0, **given))


def test_dropout_is_for_training_only():
    x = torch.ones(L, 200, E, dtype=torch.float64)
    for training in (False, True):
        for f in (OURS, TORCH):
            torch.manual_seed(0)
            shown = f(x, x, x, E, H, SELF["in"], None, None, None, False, 0.25, OUT, None, training)[1]
            dropped = f(
                x,
                x,
                x,
                E,
                H,
                SELF["in"],
                None,
                None,
                None,
                False,
                0.25,
                OUT,
                None,
                training,
                average_attn_weights=False,
            )[1]
            assert (dropped == 0).double().mean() == pytest.approx(0.25 if training else 0, abs=0.02)
            assert shown.mean() == pytest.approx(1 / L, abs=0.01)


# ------------------------------------------------------------------------------------ modules


class Wrapped(nn.Module):
    """A module of attention on inputs [N, L, E], whatever its own order of dimensions."""

    def __init__(self, inner: nn.Module, call: Callable[[Any, Tensor], Tensor], batch_first: bool = True):
        super().__init__()
        self.inner, self.call, self.batch_first = inner, call, batch_first

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.call(self.inner, x)
        return self.call(self.inner, x.transpose(0, 1)).transpose(0, 1)


def mha(batch_first: bool = True, **options: Any) -> nn.Module:
    return nn.MultiheadAttention(E, H, batch_first=batch_first, **options)


def cross(m: Any, x: Tensor) -> Tensor:
    other = x.sin()
    return m(x, other, other)[0]


FLOATS = torch.zeros(L, L, dtype=torch.float64).masked_fill(CAUSAL, float("-inf"))
ENCODER: Any = {"dropout": 0.0, "batch_first": True, "dim_feedforward": 5}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "self": lambda: Wrapped(mha(), lambda m, x: m(x, x, x)[0]),
    "self, positions first": lambda: Wrapped(mha(False), lambda m, x: m(x, x, x)[0], batch_first=False),
    "self, no weights, no bias": lambda: Wrapped(mha(bias=False), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "cross": lambda: Wrapped(mha(), cross),
    "cross, positions first": lambda: Wrapped(mha(False), cross, batch_first=False),
    "three inputs": lambda: Wrapped(mha(), lambda m, x: m(x, x.sin(), x.cos())[0]),
    "query is key": lambda: Wrapped(mha(), lambda m, x: m(x, x, x.cos())[0]),
    "separate, no bias": lambda: Wrapped(
        mha(kdim=2, vdim=3, bias=False), lambda m, x: m(x, x[..., :2], x[..., 1:4].sin())[0]
    ),
    "causal": lambda: Wrapped(mha(), lambda m, x: m(x, x, x, attn_mask=FLOATS, is_causal=True, need_weights=False)[0]),
    "zeros": lambda: Wrapped(mha(add_zero_attn=True), lambda m, x: m(x, x, x, attn_mask=CAUSAL)[0]),
    "padding": lambda: Wrapped(mha(), lambda m, x: m(x, x, x, key_padding_mask=x[..., 0] > 0.9)[0]),
    "encoder layer": lambda: nn.TransformerEncoderLayer(E, H, **ENCODER),
    "encoder layer, norm first, causal": lambda: Wrapped(
        nn.TransformerEncoderLayer(E, H, norm_first=True, activation="gelu", **ENCODER),
        lambda m, x: m(x, src_mask=FLOATS, is_causal=True),
    ),
    "encoder layer, positions first": lambda: Wrapped(
        nn.TransformerEncoderLayer(E, H, 5, dropout=0.0), lambda m, x: m(x), batch_first=False
    ),
    "encoder": lambda: Wrapped(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **ENCODER), 2, nn.LayerNorm(E)),
        lambda m, x: m(x, src_key_padding_mask=x[..., 0] > 0.9),
    ),
    "decoder layer": lambda: Wrapped(nn.TransformerDecoderLayer(E, H, **ENCODER), lambda m, x: m(x, x.sin()[:, 1:])),
}
each = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def case(make: Callable[[], nn.Module], training: bool) -> tuple[Callable, dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    fn, params = kf.make_functional(make().double().train(training))
    params = {k: v + 0.2 * randn(*v.shape, seed=n) for n, (k, v) in enumerate(params.items())}
    head = randn(2, L * E, seed=20) / 5
    return (lambda p, x: fn(p, x).flatten(1).tanh() @ head.T), params, randn(N, L, E, seed=21), randn(N, 2, seed=22)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@each
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_every_parameter_is_captured_exactly(make, training):
    fn, params, x, y = case(make, training)
    plan = kf.make_plan(fn, params, x)
    assert (plan.unclaimed, plan.unused) == ((), ())
    assert plan.claimed == set(params)
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    value, grads, stats = step(params, (x, y), plan=plan)
    wanted, expected = torch.func.grad_and_value(lambda p: LOSS.value(fn(p, x), y))(params)
    check((value, grads), (expected, wanted))
    jacobian = oracles.ggn(fn, params, x, y, F.mse_loss)
    for block in stats.blocks().values():
        layout = block.layout
        form = "out_in" if layout.matrix else "vector"
        dense = jacobian.block(oracles.Spec(layout.weight, layout.bias, form))
        assert dense.diagonal().max() > 0
        assert close(outer(block), dense)


@pytest.mark.parametrize("name", ["self", "cross", "three inputs", "cross, positions first"])
def test_the_gradients_of_every_example(name):
    fn, params, x, y = case(MODULES[name], True)
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.empirical())
    blocks = step(params, (x, y))[2].blocks()
    assert set(blocks) == {"inner.in_proj_weight", "inner.out_proj.weight"}
    uses = {"self": 1, "three inputs": 3}.get(name, 2)
    assert [len(block.uses) for block in blocks.values()] == [uses, 1]
    wanted = torch.func.jacrev(
        lambda p: torch.stack([F.mse_loss(fn(p, x[n : n + 1]), y[n : n + 1]) for n in range(N)])
    )(params)
    for path, block in blocks.items():
        bias = wanted[path.replace("_weight", "_bias") if "in_" in path else path.replace("weight", "bias")]
        check(per_example(block)[0], torch.cat([wanted[path], bias.unsqueeze(-1)], dim=-1))


UNSEEN = {
    "bias_k and bias_v": (mha(add_bias_kv=True), lambda m, x: m(x, x, x)[0], {"inner.bias_k", "inner.bias_v"}),
}


@pytest.mark.parametrize(("module", "call", "paths"), UNSEEN.values(), ids=UNSEEN)
def test_what_no_kind_sees_is_named_and_may_have_a_policy(module, call, paths):
    fn, params, x, y = case(lambda: Wrapped(module, call), True)
    with pytest.raises(UncapturedParameterError) as caught:
        kf.make_plan(fn, params, x)
    for path in paths:
        assert f"parameter {path!r} is used where" in str(caught.value)
        assert f"unclaimed={{{path!r}: 'diagonal'}}" in str(caught.value)
    assert "used by  multi_head_attention_forward (" in str(caught.value)
    unclaimed: Any = dict.fromkeys(paths, "diagonal")
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact(), unclaimed=unclaimed)
    value, grads, stats = step(params, (x, y), generator=torch.Generator().manual_seed(0))
    check((value, grads), step(params, (x, y), stats=False)[:2])
    plan = stats.rules.value.plan
    assert (plan.claimed, {path for path, _ in plan.unclaimed}) == (set(params) - paths, paths)


def test_separate_weights_share_one_bias():
    """The packed bias is a block of its own, of which every projection sees its part."""
    fn, params, x, y = case(lambda: Wrapped(mha(kdim=2), lambda m, x: m(x, x[..., :2], x)[0]), True)
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.empirical())
    value, grads, stats = step(params, (x, y))
    check((value, grads), step(params, (x, y), stats=False)[:2])
    wanted = torch.func.jacrev(
        lambda p: torch.stack([F.mse_loss(fn(p, x[n : n + 1]), y[n : n + 1]) for n in range(N)])
    )(params)
    check(per_example(stats.blocks()["inner.in_proj_bias"])[0].squeeze(-1), wanted["inner.in_proj_bias"])
    assert set(stats.rules.value.plan.claimed) == set(params)


def test_attention_without_parameters_is_left_alone():
    """Weights that are no parameters: the call is torch's own."""

    def fn(p: dict, x: Tensor) -> Tensor:
        y = F.linear(x, p["w"]).transpose(0, 1)
        return TORCH(y, y, y, E, H, SELF["in"], None, None, None, False, 0.0, OUT, None)[0].transpose(0, 1)

    plan = kf.make_plan(fn, {"w": randn(E, E)}, randn(N, L, E))
    assert [block.layout.name for block in plan.blocks] == ["w"]
