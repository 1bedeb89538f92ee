"""Cases of `test_errors` for the routes to per-example quantities, and for batches that are others in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_func as kf
from kfac_func import errors
from kfac_func.capture import Cut, rereadable
from kfac_func.products.runs import mapped, taped
from tests.error_cases import Case, wrong

P = kf.products
FN, PARAMS = kf.make_functional(nn.Linear(3, 2))
X, Y = torch.arange(12.0).reshape(4, 3), torch.zeros(4, 2)
MSE = kf.losses.mse()

POSTERIOR = kf.laplace.fit(FN, kf.losses.mse("batchmean"), PARAMS, [(X, Y)])
HYPER, CAPTURE = errors.HyperparameterError, errors.CaptureError


def centred(p: Any, x: Tensor) -> Tensor:
    return FN(p, x - x.mean(0))


def asked(p: Any, x: Tensor) -> Tensor:
    """A branch that a vmap cannot take."""
    return FN(p, x) if x.sum() > 0 else FN(p, -x)


def squeezed(p: Any, x: Tensor) -> Tensor:
    return F.linear(x.unsqueeze(1), p["weight"], p["bias"]).squeeze()


def by_sign(p: Any, x: Tensor) -> Tensor:
    return FN(p, x) if x.sum() > 0 else FN(p, FN(p, x) @ torch.ones(2, 3))


def normed(p: Any, x: Tensor) -> Tensor:
    return FN(p, x) * p["weight"].norm()


def fixed(p: Any, x: Tensor) -> Tensor:
    """Not for a single example."""
    return FN(p, x.reshape(-1, 1, 3).expand(-1, 2, -1)[:, 0] if len(x) > 1 else x.reshape(2, 3))


def written(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["weight"].mul_(2), p["bias"])


def drifting() -> None:
    read = P.per_example_norms(by_sign, MSE, route="tape")
    read(PARAMS, (X, Y))
    read(PARAMS, (-X, Y))


class Moving:
    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield X + self.passes, Y


def sampled(fn: Any, **options: Any) -> Callable[[], Any]:
    return lambda: kf.laplace.sampled_predictive(POSTERIOR, fn, X, generator=torch.Generator(), samples=2, **options)


def gain(p: Any, x: Tensor) -> Tensor:
    return FN(p, x) * (1 if bool((p["bias"] > 0).all()) else 2)


def by_count(p: Any, x: Tensor) -> Tensor:
    """Another function of batches that no plan is made with."""
    return FN(p, x) if len(x) < 4 else FN(p, x).tanh()


def bagged(p: Any, x: Tensor) -> Tensor:
    return F.embedding_bag(x, p["w"])


WHOLE = kf.quadratic_model(kf.batched(FN, whole=True), MSE, examples=0.5)
SHUFFLED = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)

CASES = {
    "examples that see each other": Case(
        lambda: P.jacobian(centred, route="loop")(PARAMS, X), CAPTURE, "depends on the other examples", "ggn_vp"
    ),
    "examples that meet on the tape": Case(
        lambda: P.per_example_gram(centred, MSE)(PARAMS, (X, Y)), CAPTURE, "see each other", "eval mode"
    ),
    "a vmap that asks for values": Case(
        lambda: P.jacobian(asked, route="vmap")(PARAMS, X), CAPTURE, "data-dependent control flow", "route='loop'"
    ),
    "one example is another thing": Case(
        lambda: P.jacobian(squeezed, route="vmap")(PARAMS, X), CAPTURE, "single example", "route='loop'"
    ),
    "one example of another form": Case(
        lambda: mapped(squeezed, None, Cut((0,))).run(PARAMS, X).rows(torch.ones(1, 4, 2)),
        CAPTURE, "wanted   [1, 2]", "x.squeeze(-1)",
    ),
    "a plan without rows": Case(
        lambda: taped(normed, None, kf.make_plan(normed, PARAMS, X, strict=False)), CAPTURE, "'weight'", "only="
    ),
    "another model than planned": Case(drifting, errors.PlanMismatchError, "follow its plan", "route='loop'"),
    "a chunk that does not run": Case(
        lambda: P.jacobian(fixed, route="tape", chunk_size=3)(PARAMS, X), CAPTURE, "a chunk", "another chunk_size"
    ),
    "no chunks of a whole": Case(
        lambda: P.jacobian(kf.batched(FN, whole=True), route="loop", chunk_size=2)(PARAMS, X),
        HYPER, "cannot be cut", "leave chunk_size out",
    ),
    "a batch that decides": Case(
        lambda: P.jacobian(by_count, route="loop", chunk_size=4)(PARAMS, torch.arange(18.0).reshape(6, 3)),
        CAPTURE, "in a chunk with other examples", "eval mode",
    ),
    "no second derivative": Case(
        lambda: P.ggn_vp(bagged, MSE)({"w": torch.ones(4, 2)}, (torch.zeros(4, 3, dtype=torch.long), Y))(
            {"w": torch.ones(4, 2)}
        ),
        CAPTURE, "embedding_bag", "kf.products.jacobian",
    ),
    "only nothing": Case(lambda: P.jacobian(FN, only=[])(PARAMS, X), HYPER, "no parameter", "None for all"),
    "a route of nets": Case(sampled(FN, route=wrong("tape")), HYPER, "'tape'", "'auto' or 'vmap' or 'loop'"),
    "nets that no vmap runs": Case(sampled(gain, route="vmap"), CAPTURE, "many parameters", "route='loop'"),
    "parameters that are written": Case(lambda: P.hvp(written, MSE)(PARAMS, (X, Y)), CAPTURE, "'weight'", "clone()"),
    "a loader that shuffles": Case(
        lambda: kf.laplace.fit(FN, MSE, PARAMS, SHUFFLED), HYPER, "RandomSampler", "shuffle=False"
    ),
    "another first batch": Case(
        lambda: kf.fit_curvature(FN, MSE, PARAMS, rereadable(Moving(), "it is read twice")),
        HYPER, "first batch", "list(loader)",
    ),
    "a part of a graph": Case(
        lambda: WHOLE.form(PARAMS, (X, Y), [PARAMS], PARAMS), HYPER, "examples=0.5", "1.0"
    ),
}  # fmt: skip
