"""What an undamped step does not depend on: the start of a linear regression, the coordinates of a network's layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_func as kf
from kfac_func.damping import Split
from tests.zoo import close, randn

splits = pytest.mark.parametrize("split", ["pi", "none", "exact"])
EXACT = kf.estimators.exact()


# ------------------------------------------------------------------ linear regression


def affine(p: dict, x: Tensor) -> Tensor:
    return x @ p["w"].T + p["b"]


def design(condition: float, n: int = 40, d: int = 6) -> Tensor:
    """Full rank, with singular values from 1 down to 1/condition, and far from centred."""
    u, _ = torch.linalg.qr(randn(n, d, seed=1))
    v, _ = torch.linalg.qr(randn(d, d, seed=2))
    return n**0.5 * (u * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), d).double()) @ v.T + 1.0


@splits
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize(("condition", "tolerance"), [(1.0, 1e-10), (1e3, 1e-7), (1e5, 1e-4)])
@pytest.mark.parametrize("start", [0.0, 1.0, 30.0])
def test_one_undamped_step_is_the_least_squares_solution(condition, tolerance, reduction, split, start):
    """From any start, with a bias, however bad the design (the normal equations square its condition)."""
    x, y = design(condition), randn(40, 3, seed=3)
    step: Any = kf.value_grad_and_stats(affine, kf.losses.mse(reduction), estimator=EXACT)
    params = {"w": start * randn(3, 6, seed=4), "b": start * randn(3, seed=5)}
    tx = kf.chain(kf.kfac(damping=0.0, split=split), kf.sgd(1.0))
    _, grads, stats = step(params, (x, y))
    updates, state = tx.update(grads, tx.init(params), params, stats=stats)
    found = kf.apply_updates(params, updates)
    wanted = torch.linalg.lstsq(torch.cat([x, x.new_ones(40, 1)], 1), y).solution.T
    assert int(state[0].failed) == 0
    assert close(torch.cat([found["w"], found["b"][:, None]], 1), wanted, tolerance)
    damped = kf.kfac(damping=1.0, split=split)
    other = kf.apply_updates(
        params,
        kf.chain(damped, kf.sgd(1.0)).update(
            grads, (damped.init(params), kf.sgd(1.0).init(params)), params, stats=stats
        )[0],
    )
    assert start == 0.0 or not close(torch.cat([other["w"], other["b"][:, None]], 1), wanted, 1e-3)


# ------------------------------------------------------------------ affine re-parametrisation

WIDTHS = (3, 4, 5, 2)


class Twin:
    """A deep network whose layer l takes Ω a + γ in place of a, and gives Φ⁻¹(s − τ) in place of s.

    a_l = tanh(s_l) becomes a†_l = Ω_l tanh(Φ_l s†_l + τ_l) + γ_l, s_l = W̄_l ā_{l−1} becomes s†_l = W̄†_l ā†_{l−1}; the
    last layer gives Φ s† + τ. The same function, with other parameters. Without coordinates it is the network itself.
    """

    def __init__(self, seed: int | None = None):
        def square(d: int, k: int) -> Tensor:
            eye = torch.eye(d, dtype=torch.float64)
            return eye if seed is None else 2 * eye + 0.7 * randn(d, d, seed=seed + k)

        def shift(d: int, k: int) -> Tensor:
            return torch.zeros(d, dtype=torch.float64) if seed is None else randn(d, seed=seed + k)

        layers = range(len(WIDTHS) - 1)
        self.omega = [square(WIDTHS[k], 10 * k) for k in layers]
        self.gamma = [shift(WIDTHS[k], 10 * k + 1) for k in layers]
        self.phi = [square(WIDTHS[k + 1], 10 * k + 2) for k in layers]
        self.tau = [shift(WIDTHS[k + 1], 10 * k + 3) for k in layers]

    def __call__(self, p: dict, x: Tensor) -> Tensor:
        a = x
        for k, (omega, gamma, phi, tau) in enumerate(zip(self.omega, self.gamma, self.phi, self.tau, strict=True)):
            s = (a @ omega.T + gamma) @ p[f"{k}.w"].T + p[f"{k}.b"]
            s = s @ phi.T + tau
            a = torch.tanh(s) if k < len(self.phi) - 1 else s
        return a

    def params(self, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that give the same function as the plain network has with its own."""
        found = {}
        for k, (omega, gamma, phi, tau) in enumerate(zip(self.omega, self.gamma, self.phi, self.tau, strict=True)):
            w = torch.linalg.solve(phi, plain[f"{k}.w"]) @ torch.linalg.inv(omega)
            found |= {f"{k}.w": w, f"{k}.b": torch.linalg.solve(phi, plain[f"{k}.b"] - tau) - w @ gamma}
        return found


SIZES = [(o, i) for i, o in itertools.pairwise(WIDTHS)]
PLAIN = {f"{k}.w": randn(*size, seed=k) for k, size in enumerate(SIZES)}
PLAIN |= {f"{k}.b": 0.3 * randn(size[0], seed=k + 5) for k, size in enumerate(SIZES)}
X, Y, NEW = randn(60, 3, seed=20), randn(60, 2, seed=21), randn(30, 3, seed=22)


def moved(twin: Twin, loss: kf.losses.Loss, **options: Any) -> Tensor:
    """The function, on new inputs, after a step."""
    params = twin.params(PLAIN)
    step: Any = kf.value_grad_and_stats(twin, loss, estimator=EXACT)
    tx = kf.chain(kf.kfac(**options), kf.sgd(0.3))
    state = tx.init(params)
    _, grads, stats = step(params, (X, Y))
    updates, state = tx.update(grads, state, params, stats=stats)
    assert int(state[0].failed) == 0
    return twin(kf.apply_updates(params, updates), NEW)


@splits
@pytest.mark.parametrize("seed", [1, 2])
def test_an_undamped_step_is_the_same_function_in_any_coordinates(seed: int, split: Split):
    """With damping 0 all splits are (G ⊗ A)⁻¹, and G† = ΦᵀGΦ, Ā† = Ω̄ĀΩ̄ᵀ. Martens & Grosse 2015, §10."""
    plain, twin = Twin(), Twin(seed)
    loss = kf.losses.mse("batchmean")
    assert close(twin(twin.params(PLAIN), NEW), plain(PLAIN, NEW), 1e-12)
    one, two = (moved(net, loss, damping=0.0, split=split) for net in (plain, twin))
    assert close(two, one, 1e-8)
    assert not close(one, plain(PLAIN, NEW), 1e-2)


@pytest.mark.parametrize(
    "options",
    [
        *({"damping": 0.1, "split": split} for split in ("pi", "none", "exact")),
        {"damping": 1e-12, "curvature": kf.curvature.diagonal()},
        {"damping": 1e-12, "curvature": kf.curvature.eigen()},
        {"curvature": kf.curvature.blockwise(kf.curvature.identity(), kf.curvature.identity())},
    ],
    ids=lambda options: "-".join(getattr(x, "name", str(x)) for x in options.values()),
)
def test_damping_and_diagonals_depend_on_the_coordinates(options):
    one, two = (moved(net, kf.losses.mse("batchmean"), **options) for net in (Twin(), Twin(1)))
    assert not close(two, one, 1e-3)
