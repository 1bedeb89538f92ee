"""Scale and shift by hand: exact for every example, wherever the parameter is repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import errors
from tests.zoo import close, randn

LOSS, Y = kf.losses.cross_entropy(), torch.tensor([0, 2, 1, 0])
X = randn(4, 5, 3)  # [N, T, d]
MAPS = randn(4, 2, 3, 3, seed=1)

Use = Callable[[Tensor, Tensor], Tensor]
USES: dict[str, tuple[Use, Tensor, tuple[int, ...]]] = {
    "scale": (lambda x, w: x * w, X, (3,)),
    "scale, w first": (lambda x, w: w * x, X, (1, 3)),
    "scale of positions": (lambda x, w: torch.mul(x, w), X, (5, 1)),
    "of all entries": (lambda x, w: x.mul(w), X, (5, 3)),
    "a temperature": (lambda x, w: x * w, X, ()),
    "a temperature of one": (lambda x, w: x.multiply(w), X, (1,)),
    "channels": (lambda x, w: x * w, MAPS, (2, 1, 1)),
    "channels, all dimensions": (lambda x, w: x * w, MAPS, (1, 2, 1, 1)),
    "rows and columns": (lambda x, w: x * w, MAPS, (1, 2, 1, 3)),
    "x is repeated too": (lambda x, w: x[:, :1] * w, X, (5, 3)),
    "reshaped": (lambda x, w: x * w.view(1, 1, -1), X, (3,)),
    "shift": (lambda x, w: torch.tanh(x) + w, X, (3,)),
    "shift, w first": (lambda x, w: w + torch.tanh(x), X, (5, 3)),
    "twice a shift": (lambda x, w: torch.add(x, w, alpha=2), X, (3,)),
    "subtracted": (lambda x, w: x - w, X, (3,)),
    "subtracted from": (lambda x, w: w - x, X, (5, 1)),
    "subtracted twice": (lambda x, w: torch.sub(x, w, alpha=2), X, (1, 3)),
    "both": (lambda x, w: x * w + w, X, (3,)),
    "prelu": (lambda x, w: F.prelu(x, w), X[:, :1].expand(-1, 3, -1), (3,)),
    "prelu of one": (lambda x, w: torch.prelu(x, w), X, (1,)),
    "prelu of rows": (lambda x, w: F.prelu(x[:, 0], w).unsqueeze(1).expand(-1, 5, -1), X, (3,)),
    "addcmul, scale": (lambda x, w: torch.addcmul(x, x.sin(), w, value=2), X, (3,)),
    "addcmul, shift": (lambda x, w: torch.addcmul(w, x.sin(), x), X, (5, 3)),
    "a class token": (lambda x, w: torch.cat([w.expand(len(x), -1, -1), x[:, 1:]], 1), X, (1, 1, 3)),
    "a class token as it is": (lambda x, w: torch.cat([w.expand(len(x), 1, 3), x[:, 1:]], 1), X, (3,)),
    "a class token, repeated": (lambda x, w: torch.cat([w.repeat(len(x), 1, 1), x[:, 1:]], 1), X, (1, 1, 3)),
    "rows by number": (lambda x, w: torch.cat([w[x[:, 1:, 0].argsort(1)], x[:, 4:]], 1), X, (4, 3)),
    "rows from the end": (lambda x, w: torch.cat([w[x[:, 1:, 0].argsort(1) - 4], x[:, 4:]], 1), X, (4, 3)),
    "a row for every example": (lambda x, w: x + w[x[:, :4, 0].argmax(1)].unsqueeze(1), X, (4, 3)),
    "rows selected": (lambda x, w: x + w.index_select(0, x[:, :4, 0].argmax(1)).unsqueeze(1), X, (4, 3)),
}


def model(use: Use) -> Callable[[Any, Tensor], Tensor]:
    return lambda p, x: F.linear(torch.tanh(use(x, p["w"])).flatten(1), p["head"])


def params_of(x: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"w": 1 + randn(*shape, seed=2), "head": randn(3, x[0].numel(), seed=3)}


@pytest.mark.parametrize("name", USES)
def test_every_example_has_its_own_gradient(name: str):
    use, x, shape = USES[name]
    fn, params = model(use), params_of(x, shape)
    plan = kf.make_plan(fn, params, x)
    assert (plan.unclaimed, plan.unused, plan.mixing) == ((), (), "")
    step: Any = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())
    _, grads, _ = step(params, (x, Y))
    wanted = torch.func.grad(lambda p: LOSS.value(fn(p, x), Y))(params)
    assert all(close(grads[path], wanted[path]) for path in params)
    found = kf.products.per_example_grads(fn, LOSS, route="tape")(params, (x, Y))
    for n in range(4):
        own = torch.func.grad(lambda p, n=n: LOSS.value(fn(p, x[n : n + 1]), Y[n : n + 1]))(params)
        assert all(close(found[path][n], own[path]) for path in params)


@pytest.mark.parametrize("name", ["scale", "channels", "shift", "both"])
def test_the_diagonal_is_that_of_the_fisher(name: str):
    use, x, shape = USES[name]
    fn, params = model(use), params_of(x, shape)
    j = torch.func.jacrev(lambda w: fn({**params, "w": w}, x))(params["w"]).flatten(2)
    p = fn(params, x).softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    wanted = torch.einsum("ncp,ncd,ndp->p", j, hessian, j) / 4
    tx = kf.kfac(kf.curvature.diagonal(), damping=0.1)
    _, grads, stats = kf.value_grad_and_stats(fn, LOSS, estimator=kf.estimators.exact())(params, (x, Y))
    assert stats is not None
    solved = kf.precondition(kf.observe(tx.init(params), stats), grads)
    assert close(solved["w"].flatten(), grads["w"].flatten() / (wanted + 0.1))


def test_class_tokens_and_positions_of_a_transformer():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.gain = nn.Parameter(torch.randn(1, 5, 3)), nn.Parameter(torch.full((3,), 0.1))
            self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.places
            x = x + self.gain * torch.tanh(self.mix(x))
            return self.head(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).mean(1)

    fn, params = kf.make_functional(Vision().double())
    assert not kf.make_plan(fn, params, X).unclaimed
    tx = kf.chain(kf.ekfac(damping=0.1), kf.sgd(0.1))
    step: Any = kf.value_grad_and_stats(fn, LOSS)
    _, grads, stats = step(params, (X, Y), generator=torch.Generator().manual_seed(0))
    updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
    assert all(leaf.isfinite().all() and leaf.any() for leaf in updates.values())


REFUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a weight that is scaled": lambda p, x: F.linear(x, p["w"] * torch.ones(3)),
    "a weight that is shifted": lambda p, x: F.linear(x, p["w"] + 1.0 * torch.eye(3)),
    "a product with itself": lambda p, x: x * (p["w"] * p["w"]).sum(0),
    "repeated as a whole": lambda p, x: F.linear(x.repeat(1, 2), p["w"].repeat(1, 2)),
    "columns by number": lambda p, x: F.linear(x, p["w"][:, torch.tensor([0, 2, 1])]),
    "in place": lambda p, x: torch.tanh(x).mul_(p["w"][0]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_layer_is_told(name: str):
    with pytest.raises(errors.UncapturedParameterError, match="'w'"):
        kf.make_plan(REFUSED[name], {"w": torch.eye(3).double()}, X[:, 0])


def test_examples_behind_a_repeated_dimension_are_told():
    """[T, d, N] with a scale of [1, d, 1] would not tell which of the two is N; with one of [T, d, 1] it is clear."""
    fn = lambda p, x: F.linear(torch.tanh(x.movedim(0, 2) * p["w"]).movedim(2, 0).flatten(1), p["head"])  # noqa: E731
    right = {"w": randn(5, 3, 1), "head": randn(3, 15)}
    found = kf.products.per_example_grads(fn, LOSS, route="tape")(right, (X, Y))["w"]
    own = torch.func.grad(lambda p: LOSS.value(fn(p, X[1:2]), Y[1:2]))(right)["w"]
    assert close(found[1], own)
    with pytest.raises(errors.UncapturedParameterError, match="not in the first dimension"):
        kf.make_plan(fn, {**right, "w": randn(1, 3, 1)}, X)


def test_half_precision_is_summed_in_float32():
    use, x, shape = USES["scale"]
    fn, params = model(use), params_of(x, shape)
    low = {path: leaf.bfloat16() for path, leaf in params.items()}
    found = kf.products.fisher_diagonal(fn, LOSS, route="tape")(low, (x.bfloat16(), Y))
    wanted = kf.products.fisher_diagonal(fn, LOSS, route="tape")(params, (x, Y))
    assert close(found["w"].double(), wanted["w"], 0.05)


def test_a_batch_that_is_one_thing_has_its_examples_in_dimension_0():
    """As many rows as the weight has: still no layer."""
    fn = kf.batched(lambda p, x: x @ (p["w"] - 0.1 * torch.ones(4, 1)), whole=True)
    with pytest.raises(errors.UncapturedParameterError, match="before a layer reads it"):
        kf.make_plan(fn, {"w": randn(4, 1)}, randn(4, 4))
    scaled = kf.batched(lambda p, x: x * p["w"], whole=True)
    assert not kf.make_plan(scaled, {"w": randn(3)}, randn(4, 3)).unclaimed
