"""What errors offer exists and leads out; long lists are short; what goes wrong in silence elsewhere is told here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func._errors import CaptureError, HyperparameterError, KFacWarning, TargetError, UncapturedParameterError
from tests.kinds import truth
from tests.zoo import close, randn

N = 5
X, Y, IDS = randn(N, 3, seed=1), torch.tensor([0, 1, 1, 0, 1]), torch.arange(20).mul(3).remainder(7).reshape(N, 4)
CE, P = kf.losses.cross_entropy(), kf.products


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gain, self.head = nn.Linear(3, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh() * self.gain.exp())


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(7, 4), nn.Embedding(4, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.token(ids) + self.place(torch.arange(ids.shape[1]))).tanh().mean(1))


Found = dict[str, Callable[[Any], Any]]


def asked(fn: Any, params: Any, inputs: Tensor) -> Found:
    """Every per-example function, by its options."""
    batch = inputs, Y
    return {
        "grads": lambda o: P.per_example_grads(fn, CE, **o)(params, batch),
        "norms": lambda o: P.per_example_norms(fn, CE, **o)(params, batch),
        "gram": lambda o: P.per_example_gram(fn, CE, **o)(params, batch),
        "jacobian": lambda o: P.jacobian(fn, **o)(params, inputs),
        "kernel": lambda o: P.empirical_ntk(fn, "trace", **o)(params, inputs),
        "diagonal": lambda o: P.fisher_diagonal(fn, CE, kf.estimators.empirical(), **o)(params, batch),
        "traces": lambda o: P.per_example_traces(fn, CE, kf.estimators.empirical(), **o)(params, batch),
    }


def wanted(fn: Any, params: Any, inputs: Tensor, only: list[str]) -> dict[str, Any]:
    """The same from backward passes, for some leaves."""
    j = {path: leaf.flatten(2) for path, leaf in truth.jacobian(fn, params, inputs).items() if path in only}
    score = fn(params, inputs).softmax(1) - F.one_hot(Y, 2)
    g = {path: torch.einsum("nd,ndp->np", score, leaf) for path, leaf in j.items()}
    rows, wide = torch.cat(list(g.values()), 1), torch.cat(list(j.values()), 2)
    return {
        "grads": g,
        "norms": rows.norm(dim=1),
        "gram": rows @ rows.mT,
        "jacobian": j,
        "kernel": torch.einsum("ndp,mdp->nm", wide, wide),
        "diagonal": {path: leaf.square().mean(0) for path, leaf in g.items()},
        "traces": rows.square().sum(1),
    }


@pytest.mark.parametrize("name", list(asked(None, None, X)))
@pytest.mark.parametrize(("made", "inputs", "path"), [(Gained, X, "gain"), (Placed, IDS, "place.weight")])
def test_the_options_that_an_error_of_per_example_functions_offers_exist(name, made, inputs, path):
    torch.manual_seed(0)
    fn, params = kf.make_functional(made().double())
    call = asked(fn, params, inputs)[name]
    with pytest.raises(CaptureError, match=rf"'{path}'") as caught:
        call({"route": "tape"})
    assert {"only=", "route='vmap'", "'loop'"} <= set(re.findall(r"only=|route='vmap'|'loop'", str(caught.value)))
    seen = [other for other in params if other != path]
    ways: list[tuple[Any, list[str]]] = [({"route": route}, list(params)) for route in ("vmap", "loop")]
    for options, kept in [*ways, ({"route": "tape", "only": seen}, seen)]:
        found, truly = call(options), wanted(fn, params, inputs, kept)[name]
        if isinstance(truly, dict):
            lead = {"grads": 1, "jacobian": 2, "diagonal": 0}[name]
            truth.same({k: x.reshape(*x.shape[:lead], -1) for k, x in found.items() if x is not None}, truly)
        else:
            assert close(found, truly)


@pytest.mark.parametrize("count", [1, 3, 4, 40])
def test_an_error_about_many_parameters_is_short(count):
    def fn(p: dict, x: Tensor) -> Tensor:
        for k in range(count):
            x = x + p[f"gain{k}"].exp() * F.linear(x, p[f"w{k}"]).tanh()
        return x - p["w0"].mean(0)

    params = {f"gain{k}": randn(3, seed=k) for k in range(count)} | {
        f"w{k}": randn(3, 3, seed=k) / 3 for k in range(count)
    }
    with pytest.raises(UncapturedParameterError) as caught:
        kf.make_plan(fn, params, X)
    text = str(caught.value)
    assert len(text.splitlines()) <= 16
    assert "'gain0'" in text
    assert "exp" in text
    assert "mean" in text
    if count > 3:
        assert "unclaimed='diagonal'" in text
        plan = kf.make_plan(fn, params, X, unclaimed="diagonal")
        assert {path for path, _ in plan.unclaimed} == {f"gain{k}" for k in range(count)} | {"w0"}


LOSSES = {
    "huber_loss": (F.huber_loss, "kf.losses.Loss"),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), "kf.losses.Loss"),
    "SmoothL1Loss": (nn.SmoothL1Loss(), "kf.losses.Loss"),
    "cross_entropy": (F.cross_entropy, "kf.losses.cross_entropy()"),
    "MSELoss": (nn.MSELoss(reduction="sum"), "kf.losses.mse()"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("given", "way"), LOSSES.values(), ids=LOSSES)
def test_a_loss_of_torch_is_told_which_to_take(given, way):
    fn, params = kf.make_functional(nn.Linear(3, 2).double())
    loss: Any = given
    calls = [
        lambda: kf.value_grad_and_stats(fn, loss, estimator=kf.estimators.empirical())(params, (X, Y)),
        lambda: kf.fit_curvature(fn, loss, params, [(X, Y)]),
        lambda: kf.kfac_auto(fn, loss),
    ]
    for call in calls:
        with pytest.raises(HyperparameterError, match=re.escape(way)):
            call()


def test_logits_for_targets_are_told_before_anything_is_rejected():
    fn, params = kf.make_functional(nn.Linear(3, 2).double())
    step, tx = kf.value_grad_and_stats(fn, CE), kf.chain(kf.kfac(), kf.sgd(0.1))
    with pytest.raises(TargetError, match=r"softmax\(1\) if they are logits"):
        step(params, (X, randn(N, 2, seed=3)), generator=truth.seeded())
    state, broken = tx.init(params), X / 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(8):
            _, grads, stats = step(params, (broken, Y), generator=truth.seeded())
            state = tx.update({path: torch.zeros_like(g) for path, g in grads.items()}, state, params, stats=stats)[1]
    assert [w.category for w in told] == [KFacWarning]
    assert int(kf.tree_get(state, "rejected")) == 8


@pytest.mark.parametrize("noise", [0.09, 2.5])
@pytest.mark.parametrize("wide", [False, True])
def test_the_noise_of_a_regression_is_in_the_squares_of_its_gradients(noise, wide):
    """The empirical Fisher of N(z, σ²) is that of autograd on its log-density, example by example."""
    fn, params = kf.make_functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    y = randn(N, 2, seed=4)
    tau, options = 0.7, {"estimator": kf.estimators.empirical(), "noise": noise}
    if wide:
        params = {path: leaf.float() for path, leaf in params.items()}
    x = X.float() if wide else X
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]  # targets stay in float64
    loss, exact = kf.losses.mse("batchmean", scale=0.5), kf.curvature.diagonal()
    posterior = kf.laplace.fit(fn, loss, params, batches, curvature=exact, prior_precision=tau, **options)
    rows = []
    for n in range(N):
        leaves = {path: leaf.double().requires_grad_() for path, leaf in params.items()}
        density = torch.distributions.Normal(fn(leaves, X[n : n + 1]), noise**0.5).log_prob(y[n : n + 1]).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(density, [leaves[k] for k in sorted(leaves)])]))
    precision = kf.laplace.precision(posterior).to_dense().diagonal()
    assert close(precision.double(), torch.stack(rows).square().sum(0) + tau, 1e-5 if wide else 1e-10)
