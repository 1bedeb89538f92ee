"""The same numbers on a GPU as on the CPU and in the stored references, and no waiting for the device in between."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_func as kf
from kfac_func import _tree
from kfac_func.demo.run import SETTINGS, problems
from kfac_func.demo.training import Budget, train

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
DATA = Path(__file__).parents[1] / "data"
MODES = {
    "ggn_exact": kf.estimators.exact(),
    "fisher_exact": kf.estimators.exact(chunk_size=2),
    "fisher_empirical": kf.estimators.empirical(),
}


def moved(tree: Any, device: torch.device | str) -> Any:
    return _tree.tree_map(lambda leaf: leaf.to(device), tree)


def close(got: Any, wanted: Any) -> None:
    for one, other in zip(_tree.leaves(got), _tree.leaves(wanted), strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-9, atol=1e-11)


def golden(name: str) -> dict[str, Tensor]:
    file = DATA / f"golden_{name}.npz"
    if not file.exists():
        pytest.skip(f"{file.name} is missing")
    return {key: torch.tensor(value, device=DEVICE) for key, value in np.load(file).items()}


def mlp(p: Any, x: Tensor) -> Tensor:
    h = torch.tanh(x @ p["l0"]["w"] + p["l0"]["b"])
    h = torch.tanh(h @ p["l1"]["w"] + p["l1"]["b"])
    return h @ p["l2"]["w"] + p["l2"]["b"]


def conv(p: Any, x: Tensor) -> Tensor:
    h = torch.tanh(F.conv2d(x, p["conv"]["weight"], p["conv"]["bias"], padding="same"))
    return F.linear(h.permute(0, 2, 3, 1).flatten(1), p["dense"]["weight"], p["dense"]["bias"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["pi", "exact"])
def test_golden_mlp(mode, split):
    data = golden("mlp")
    params = {f"l{k}": {c: data[f"params/l{k}/{c}"] for c in "wb"} for k in range(3)}
    step = kf.value_grad_and_stats(mlp, kf.losses.cross_entropy(), estimator=MODES[mode])
    value, grads, stats = step(params, (data["x"], data["y"]))
    tx = kf.kfac(damping=float(data["damping"]), split=split)
    updates, state = tx.update(grads, tx.init(params), stats=stats)
    close(value, data["ce/loss"])
    for layer in params:
        moments = state.curvature.matrix[f"{layer}.w"]
        close((moments.a, moments.g), (data[f"ce/{mode}/{layer}/A"], data[f"ce/{mode}/{layer}/G"]))
        for c in "wb":
            close(grads[layer][c], data[f"ce/grad/{layer}/{c}"])
            close(updates[layer][c], data[f"ce/{mode}/inv_{split}/{layer}/{c}"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["pi", "exact"])
def test_golden_convolution(mode, split):
    data = golden("conv")
    params = {k: {c: data[f"params_torch/{k}/{c}"] for c in ("weight", "bias")} for k in ("conv", "dense")}
    step = kf.value_grad_and_stats(conv, kf.losses.cross_entropy(), estimator=MODES[mode])
    value, grads, stats = step(params, (data["x_torch"], data["y"]))
    tx = kf.kfac(damping=float(data["damping"]), split=split)
    updates, _ = tx.update(grads, tx.init(params), stats=stats)
    close(value, data["loss"])
    for tree, key in ((grads, "grad"), (updates, f"{mode}/inv_{split}")):
        close(tree["conv"]["weight"], data[f"{key}/conv/w"].permute(3, 2, 0, 1))
        close(tree["conv"]["bias"], data[f"{key}/conv/b"])
        close(tree["dense"]["weight"], data[f"{key}/dense/w"].T)
        close(tree["dense"]["bias"], data[f"{key}/dense/b"])


class Words(nn.Module):
    """An embedding tied to the head, positions, a norm, and positions that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(5, 4, padding_idx=1), nn.Embedding(3, 4)
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        weights = torch.softmax(self.norm(h) @ h.mT, dim=-1)
        return F.linear((weights @ self.mix(h)).mean(1), self.words.weight)


G = torch.Generator().manual_seed(0)
MODELS = {
    "words": (Words, torch.randint(5, (6, 3), generator=G)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, groups=2, padding="same"), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(20, 3)
        ),
        torch.randn(6, 2, 5, generator=G).double(),
    ),
}
Y, NOISE = torch.randint(3, (6,), generator=G), torch.rand(8, 2, 6, generator=G)


@pytest.fixture
def waits() -> Iterator[Any]:
    """A switch that makes every wait for the device an error."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def setting(model: str, device: Any) -> tuple[Any, dict, Tensor]:
    torch.manual_seed(0)
    module, x = MODELS[model]
    fn, params = kf.make_functional(module().double().to(device))
    step = kf.value_grad_and_stats(fn, kf.losses.cross_entropy(), estimator=kf.estimators.monte_carlo(2))
    return step, params, x.to(device)


def transformation(split: Any = "pi", curvature: Any = None) -> kf.GradientTransformation:
    return kf.chain(kf.kfac(curvature, damping=lambda step: 0.1 / (1 + step), split=split), kf.sgd(0.1, momentum=0.9))


CURVATURES = {"kronecker": None, "eigen": kf.curvature.eigen(), "kpsvd": kf.curvature.kpsvd()}


@pytest.mark.parametrize("split", ["pi", "none", "exact"])
@pytest.mark.parametrize("model", MODELS)
def test_a_run_is_that_of_the_cpu(model, split):
    found = []
    for device in ("cpu", DEVICE):
        step, params, x = setting(model, device)
        tx = transformation(split)
        state = tx.init(params)
        for noise in NOISE:
            _, grads, stats = step(params, (x, Y.to(device)), noise=noise.to(device))
            updates, state = tx.update(grads, state, params, stats=stats)
            params = kf.apply_updates(params, updates)
        found.append((params, state))
        assert {leaf.device.type for leaf in _tree.leaves(params)} == {torch.device(device).type}
        assert _tree.nodes(state, kf.KFacState)[0].step.device.type == "cpu"
    close(*found)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_between_refreshes_waits_for_nothing(model, curvature, waits):
    step, params, x = setting(model, DEVICE)
    tx, draws, y = transformation(curvature=CURVATURES[curvature]), torch.Generator(DEVICE).manual_seed(0), Y.to(DEVICE)
    state = tx.init(params)
    for k in range(4):
        waits("default" if k < 2 else "error")
        _, grads, stats = step(params, (x, y), generator=draws)
        updates, state = tx.update(grads, state, params, stats=stats, refresh=k < 2)
        params = kf.apply_updates(params, updates)
    waits("default")
    assert all(leaf.isfinite().all() for leaf in params.values())


def test_rows_and_a_compiled_step_are_those_of_the_cpu():
    found = []
    for device in ("cpu", DEVICE):
        _, params, x = setting("conv", device)
        fn, _ = kf.make_functional(MODELS["conv"][0]().double().to(device))
        tx = transformation()
        step = kf.value_grad_and_stats(fn, kf.losses.cross_entropy(), estimator=kf.estimators.empirical(), rows=True)
        train = kf.compile_step(fn, kf.losses.cross_entropy(), tx, estimator=kf.estimators.empirical())
        y, state = Y.to(device), tx.init(params)
        _, grads, stats = step(params, (x, y))
        updates, _ = tx.update(grads, state, params, stats=stats)
        for stats in (True, True, False):
            _, params, state = train(params, state, (x, y), stats=stats, refresh=False)
        found.append((updates, params, state))
    close(*found)


def test_a_state_moves_between_devices_in_a_file():
    step, params, x = setting("conv", DEVICE)
    tx = transformation()
    _, grads, stats = step(params, (x, Y.to(DEVICE)), noise=NOISE[0].to(DEVICE))
    _, state = tx.update(grads, tx.init(params), params, stats=stats)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True, map_location="cpu")
    updates, _ = tx.update(moved(grads, "cpu"), loaded, moved(params, "cpu"))
    close(updates, tx.update(grads, state, params)[0])


def test_a_quick_demo():
    (problem,) = problems("curves", quick=True)
    method, budget = SETTINGS["curves"][0], Budget(problem.steps)
    history, cpu = (train(problem, method, budget, device=device, every=1) for device in (str(DEVICE), "cpu"))
    assert history.steps == list(range(problem.steps + 1))
    assert history.losses[-1] < history.losses[0]
    assert history.losses[0] == pytest.approx(cpu.losses[0], rel=1e-4)
