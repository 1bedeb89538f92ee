"""Plans: every leaf is claimed, unclaimed under a policy that the user chose, or unused; nothing is skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import kfac_func as kf
from kfac_func._errors import BatchError, CaptureError, HyperparameterError, UncapturedParameterError

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
W, B = torch.eye(3) + 0.1, torch.ones(3)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def plan_of(module: nn.Module, x: object = X, **options: Any) -> kf.Plan:
    return kf.make_plan(*kf.make_functional(module), x, **options)


def leaves_of(plan: kf.Plan) -> dict[str, tuple[str, ...]]:
    return {block.layout.name: block.layout.leaves for block in plan.blocks}


def used(p: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p["w"], p["b"]) * p["scale"].exp()


USED = {"w": W, "b": B, "scale": torch.ones(3), "idle": torch.ones(2)}


def test_claimed_leaves_are_named_by_their_weights():
    plan = plan_of(mlp())
    assert leaves_of(plan) == {"0.weight": ("0.weight", "0.bias"), "2.weight": ("2.weight", "2.bias")}
    assert plan.claimed == {"0.weight", "0.bias", "2.weight", "2.bias"} == set(plan.paths)
    assert (plan.unclaimed, plan.unused, plan.shared) == ((), (), False)


@pytest.mark.parametrize(
    ("options", "unclaimed"),
    [
        ({"strict": False}, {"scale": "identity"}),
        ({"unclaimed": "diagonal"}, {"scale": "diagonal"}),
        ({"unclaimed": "identity"}, {"scale": "identity"}),
        ({"unclaimed": {"s*": "diagonal"}}, {"scale": "diagonal"}),
        ({"unclaimed": {"scale": "diagonal"}, "strict": False}, {"scale": "diagonal"}),
        (
            {"unclaimed": {"scale": "diagonal", "w": "identity"}},
            {"scale": "diagonal", "w": "identity", "b": "identity"},
        ),
        (
            {"unclaimed": {"w": "diagonal", "b": "identity", "*": "diagonal"}},
            {"w": "diagonal", "b": "identity", "scale": "diagonal"},
        ),
        ({"unclaimed": {"[ws]*": "identity", "w": "diagonal"}}, dict.fromkeys(["w", "b", "scale"], "identity")),
        ({"unclaimed": {"b": "diagonal", "*": "identity"}}, {"b": "diagonal", "scale": "identity"}),
    ],
)
def test_policies_for_what_no_kind_sees_and_what_the_user_takes_back(options, unclaimed):
    plan = kf.make_plan(used, USED, X, **options)
    assert dict(plan.unclaimed) == unclaimed
    assert plan.unused == ("idle",)
    assert plan.claimed == {"w", "b"} - set(unclaimed)
    assert plan.shared == ("diagonal" in unclaimed.values())


@pytest.mark.parametrize(
    "unclaimed", [{"w": "diagonal"}, {"b": "diagonal"}, {"w": "identity", "b": "diagonal"}, "identity"]
)
def test_gradients_do_not_depend_on_policies(unclaimed):
    loss, y = kf.losses.mse(), torch.zeros(4, 3)
    rules: Any = unclaimed if isinstance(unclaimed, str) else {"*": "identity", **unclaimed}
    step: Any = kf.value_grad_and_stats(used, loss, estimator=kf.estimators.exact(), unclaimed=rules)
    value, grads, stats = step(USED, (X, y), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((value, grads), step(USED, (X, y), stats=False)[:2])
    assert grads["idle"].tolist() == [0.0, 0.0]
    policies = dict(stats.rules.value.plan.unclaimed)
    joint = policies.get("w") is None and policies.get("b") is None
    blocks = {"w", "scale"} if joint else {"w", "b", "scale"}
    assert set(stats.blocks()) == {path for path in blocks if policies.get(path) != "identity"}


def test_a_plan_is_a_value_and_does_not_depend_on_the_batch():
    fn, params = kf.make_functional(mlp())
    one, other = kf.make_plan(fn, params, X), kf.make_plan(fn, params, X[:1])
    assert one == other
    assert hash(one) == hash(other)


def test_an_explicit_plan_replaces_planning():
    fn, params = kf.make_functional(mlp())
    calls = []

    def counted(p: dict, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return fn(p, x)

    plan = kf.make_plan(fn, params, X)
    step: Any = kf.value_grad_and_stats(counted, kf.losses.mse(), estimator=kf.estimators.empirical())
    _, _, stats = step(params, (X, torch.zeros(4, 2)), plan=plan)
    assert calls == [4]
    assert stats.rules.value.plan is plan


class Masked(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight * (self.weight > 0), self.bias)


class Penalised(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.weight.square().sum()


def twice(p: dict, x: torch.Tensor) -> torch.Tensor:
    y = x @ p["w"]
    return (y + p["b"]) * y


RAW = {"w": W, "b": B}
NORMED = kf.make_functional(weight_norm(nn.Linear(3, 2)))
UNSEEN = {
    "mask": (*kf.make_functional(Masked(3, 2)), X, "weight", "mul"),
    "weight norm": (*NORMED, X, "parametrizations.weight.original1", "weight_norm"),
    "regulariser": (*kf.make_functional(Penalised(3, 2)), X, "weight", "square"),
    "result used beside the bias": (twice, RAW, X, "b", "add, beside mul"),
    "bias in place": (lambda p, x: (x @ p["w"]).add_(p["b"]), RAW, X, "b", "add"),
    "rows of it": (lambda p, x: F.linear(x, p["w"][::2]), {"w": W}, X, "w", "getitem"),
    "input of a layer": (lambda p, x: x * F.linear(p["v"], p["w"]).sum(), {"w": W, "v": W + 0}, X, "v", "linear"),
    "product of parameters": (lambda p, x: x @ (p["w"] @ p["v"]), {"w": W, "v": W + 0}, X, "v", "matmul"),
}


@pytest.mark.parametrize(("fn", "params", "x", "path", "op"), UNSEEN.values(), ids=UNSEEN)
def test_strict_errors_name_the_path_the_use_and_the_ways_out(fn, params, x, path, op):
    with pytest.raises(UncapturedParameterError) as caught:
        kf.make_plan(fn, params, x)
    lines = str(caught.value).splitlines()
    start = lines.index(f"parameter {path!r} is used where K-FAC cannot see it.")
    assert lines[start + 1].split(maxsplit=2)[:2] == ["used", "by"]
    assert op in lines[start + 1]
    assert f"unclaimed={{{path!r}: 'diagonal'}}" in lines[start + 3]
    assert "strict=False" in lines[start + 3]


@pytest.mark.parametrize(("fn", "params", "x", "path", "op"), UNSEEN.values(), ids=UNSEEN)
def test_unseen_parameters_still_get_their_gradient(fn, params, x, path, op):
    del path, op
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.empirical(), strict=False)
    batch = x, torch.zeros_like(fn(params, x))
    value, grads, _ = step(params, batch, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((value, grads), step(params, batch, stats=False)[:2])


def test_one_tensor_under_two_paths_gives_each_its_own_gradient_or_an_error():
    def fn(p: dict, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, p["a"]).sin(), p["b"])

    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    params, batch = {"a": W, "b": W}, (X, torch.zeros(4, 3))
    try:
        _, grads, _ = step(params, batch)
    except (CaptureError, kf.errors.TreeMismatchError) as error:
        assert "'a'" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(grads, step(params, batch, stats=False)[1])


def nowhere(p: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(torch.cat([x, torch.ones(1, 3)]), p["w"])[:-1]


def interleaved(p: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(torch.stack([x, 2 * x]).flatten(0, 1), p["w"]).unflatten(0, (2, -1)).sum(0)


def copies(p: dict, x: torch.Tensor) -> torch.Tensor:
    rows = torch.stack([x.abs(), -x.abs()], 1).flatten(0, 1)
    return F.linear(torch.cat([rows, rows]), p["w"]).unflatten(0, (2, -1, 2)).sum((0, 2))


def by_size(p: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p["w"] if len(x) == 2 else p["v"])


def two_forms(p: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p["w"]) + torch.einsum("nd,dk->ndk", x, p["w"]).sum(-1)


def convolutions(p: dict, x: torch.Tensor) -> torch.Tensor:
    return (F.conv1d(x[..., None], p["w"], p["b"]) + F.conv1d(x[..., None], p["v"], p["b"])).squeeze(-1)


FILTERS = {"w": torch.ones(3, 3, 1), "v": torch.ones(3, 3, 1), "b": B}
REFUSED = {
    "unknown policy": (used, USED, {"unclaimed": "skip"}, HyperparameterError, "'skip'"),
    "no such path": (used, USED, {"unclaimed": {"head.*": "diagonal"}}, CaptureError, r"'head\.\*' matches no"),
    "other parameters for two examples": (by_size, {"w": W, "v": W + 0}, {}, CaptureError, "for two examples than"),
    "examples are nowhere": (nowhere, {"w": W}, {}, CaptureError, "cannot be found"),
    "a weight in two forms": (two_forms, {"w": W}, {}, CaptureError, "do not form one block"),
    "a bias of two convolutions": (convolutions, FILTERS, {}, CaptureError, "with several weights"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("fn", "params", "options", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused(fn, params, options, error, match):
    with pytest.raises(error, match=match):
        kf.make_plan(fn, params, X, **options)


@pytest.mark.parametrize("inputs", [torch.ones(0, 3), torch.tensor(1.0), (), {"a": 3}], ids=str)
def test_a_batch_has_examples(inputs):
    with pytest.raises(BatchError, match="no examples"):
        kf.make_plan(*kf.make_functional(mlp()), inputs)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_planning_does_not_write_into_the_inputs(size):
    x = X[:size].clone()
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):  # torch.func.grad says the same
        kf.make_plan(lambda p, x: F.linear(x.mul_(2), p["w"]), {"w": W}, x)
    assert torch.equal(x, X[:size])


@pytest.mark.parametrize("training", [True, False])
def test_planning_leaves_the_global_generator_alone(training):
    fn, params = kf.make_functional(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2)).train(training))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    kf.make_plan(fn, params, X)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_once_per_step_and_the_gradient_is_that_of_the_same_mask():
    fn, params = kf.make_functional(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2)))
    step: Any = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
    found = []
    for stats in (True, False):
        torch.manual_seed(7)
        found.append((*step(params, (X, torch.zeros(4, 2)), stats=stats)[:2], torch.get_rng_state()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("weight", [W, 0 * W], ids=["", "zero weight"])
@pytest.mark.parametrize("fn", [interleaved, copies])
def test_rows_that_interleave_examples_are_seen(fn, weight):
    plan = kf.make_plan(fn, {"w": weight}, X)
    assert "'w'" in plan.mixing
    assert plan.crossed
    assert plan.shared


@pytest.mark.parametrize("cut", [Tensor.detach, lambda w: w.data, torch.detach], ids=["detach", "data", "torch.detach"])
def test_what_has_no_gradient_is_no_use(cut):
    plan = kf.make_plan(lambda p, x: F.linear(x, p["w"]) + F.linear(x, cut(p["w"])), {"w": W}, X)
    assert len(plan.taps) == 1
    assert kf.make_plan(lambda p, x: F.linear(x, cut(p["w"])), {"w": W}, X).unused == ("w",)
