"""Scale and shift written by hand: exact; and what is a function of a parameter first: told, and right by policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func._errors import KFacWarning, UncapturedParameterError
from tests.kinds import truth
from tests.zoo import randn

N = 4
X, Y = randn(N, 3, seed=1), torch.tensor([0, 2, 1, 0])
LOSS = kf.losses.cross_entropy()
LAYERS = {"w": randn(3, 3, seed=2), "v": randn(3, 3, seed=3)}


def root_mean_square(p: dict, x: Tensor) -> Tensor:
    h = F.linear(x, p["w"])
    return F.linear(p["gain"] * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)), p["v"])


def scaled_branch(p: dict, x: Tensor) -> Tensor:
    return F.linear(x + p["gain"] * F.linear(x, p["w"]).tanh(), p["v"])


def class_token(p: dict, x: Tensor) -> Tensor:
    tokens = torch.cat([p["token"].expand(len(x), -1, -1), F.linear(x, p["w"])[:, None]], 1) + p["places"]
    return F.linear(tokens.tanh().mean(1), p["v"])


def temperature(p: dict, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p["w"]).tanh(), p["v"]) * p["scale"].exp()


def centred_by_hand(p: dict, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["w"]) - p["shift"]), p["v"])


Model = tuple[Callable[[dict, Tensor], Tensor], dict[str, Tensor]]
MODELS: dict[str, Model] = {
    "rms norm": (root_mean_square, {"gain": randn(3, seed=4)}),
    "layer scale": (scaled_branch, {"gain": randn(3, seed=4)}),
    "class token and places": (class_token, {"token": randn(1, 1, 3, seed=4), "places": randn(1, 2, 3, seed=5)}),
    "shift": (centred_by_hand, {"shift": randn(3, seed=4)}),
}
each = pytest.mark.parametrize(("fn", "own"), MODELS.values(), ids=MODELS)


@each
def test_their_curvature_is_that_of_autograd(fn, own, monkeypatch):
    truth.check(monkeypatch, fn, LOSS, LAYERS | own, (X, Y))


@each
def test_every_example_has_its_own_gradient(fn, own):
    params = LAYERS | own
    j, score = truth.jacobian(fn, params, X), fn(params, X).softmax(1) - F.one_hot(Y, 3)
    wanted = {path: torch.einsum("nd,nd...->n...", score, leaf) for path, leaf in j.items()}
    for route in ("tape", "vmap", "loop"):
        truth.same(kf.products.per_example_grads(fn, LOSS, route=route)(params, (X, Y)), wanted)


def test_what_is_a_function_of_the_parameter_is_told_by_name(monkeypatch):
    params = LAYERS | {"scale": torch.tensor(0.3).double()}
    with pytest.raises(UncapturedParameterError, match=r"unclaimed=\{'scale': 'diagonal'\}"):
        kf.make_plan(temperature, params, X)
    truth.check(monkeypatch, temperature, LOSS, params, (X, Y), unclaimed="diagonal")
    with pytest.warns(KFacWarning, match="route='vmap'"):
        kf.products.per_example_grads(temperature, LOSS)(params, (X, Y))


@pytest.mark.parametrize(
    "made", [kf.kfac, kf.ekfac, kf.inverse_free, lambda **o: kf.kfac(kf.curvature.diagonal(), **o)]
)
def test_a_parameter_without_a_dimension_is_one_of_length_one(made):
    def step(scale: Tensor) -> Tensor:
        params = LAYERS | {"scale": scale}
        run: Any = kf.value_grad_and_stats(temperature, LOSS, unclaimed="diagonal")
        _, grads, stats = run(params, (X, Y), generator=truth.seeded())
        tx = kf.chain(made(damping=0.1), kf.sgd(0.1))
        updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
        assert updates["scale"].shape == scale.shape
        return updates["scale"].squeeze()

    one = torch.tensor([0.3]).double()
    torch.testing.assert_close(step(one.squeeze()), step(one), rtol=1e-10, atol=0)
