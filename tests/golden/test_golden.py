"""Against numbers of an independent implementation: gradients, factors, damped inverses, averages, replayed draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from kfac_func.blocks import squares
from kfac_func.damping import pi_split
from tests import oracles
from tests.oracles import Spec
from tests.zoo import Case, close, outer, run
from tests.zoo.models import mlp

pytestmark = pytest.mark.golden
DATA = Path(__file__).parents[1] / "data"
ORIGIN = Path(__file__).parents[2].parent / "shared" / "golden"
FILES = ("golden_mlp.npz", "golden_conv.npz")
MLP, CONV = ({k: torch.tensor(v) for k, v in np.load(DATA / name).items()} for name in FILES)
DAMPING = float(MLP["damping"])
MODES = {
    "fisher_exact": kf.estimators.exact(),
    "ggn_exact": kf.estimators.exact(),
    "fisher_empirical": kf.estimators.empirical(),
}
HALF = kf.losses.mse(reduction="batchmean", scale=0.5)
LAYERS = ("l0", "l1", "l2")


def _half(z: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (z - t).square().sum() / len(z)


def _bernoulli(z: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)


def _mlp(loss, value, targets: str) -> Case:
    params = {layer: {c: MLP[f"params/{layer}/{c}"] for c in "wb"} for layer in LAYERS}
    blocks = {f"{layer}.w": Spec(f"{layer}.w", f"{layer}.b", "in_out") for layer in LAYERS}
    return Case(mlp, params, MLP["x"], MLP[targets], loss, value, blocks, dict.fromkeys(blocks, 1))


CASES = {
    "ce": _mlp(kf.losses.cross_entropy(), F.cross_entropy, "y"),
    "half_sq": _mlp(HALF, _half, "t_squared"),
    "bernoulli": _mlp(kf.losses.bce_with_logits(reduction="batchmean"), _bernoulli, "t_bernoulli"),
}
losses = pytest.mark.parametrize("name", CASES)
modes = pytest.mark.parametrize("mode", MODES)
splits = pytest.mark.parametrize("split", ["pi", "exact"])


def _block(v: Tensor, o: int) -> Tensor:
    """A block in the order of [w row-major; b] ((in + 1) × out) from one in the order of [W | b]."""
    i = len(v) // o
    return v.reshape(o, i, o, i).permute(1, 0, 3, 2).reshape(len(v), len(v))


@losses
def test_value_and_gradient(name):
    value, grads, _ = run(CASES[name])
    assert close(value, MLP[f"{name}/loss"])
    assert close(CASES[name].fn(CASES[name].params, MLP["x"]), MLP[f"{name}/logits"])
    for layer in LAYERS:
        assert all(close(grads[layer][c], MLP[f"{name}/grad/{layer}/{c}"]) for c in "wb")


@losses
@modes
@splits
def test_factors_and_damped_inverses(name, mode, split):
    case = CASES[name]
    _, grads, stats = run(case, MODES[mode])
    tx = kf.kfac(damping=DAMPING, split=split)
    updates, state = tx.update(grads, tx.init(case.params), stats=stats)
    for layer in LAYERS:
        m = state.curvature.matrix[f"{layer}.w"]
        assert close(m.a, MLP[f"{name}/{mode}/{layer}/A"])
        assert close(m.g, MLP[f"{name}/{mode}/{layer}/G"])
        assert all(close(updates[layer][c], MLP[f"{name}/{mode}/inv_{split}/{layer}/{c}"]) for c in "wb")


@losses
def test_pi(name):
    for layer in LAYERS:
        a, g = (MLP[f"{name}/ggn_exact/{layer}/{c}"] for c in "AG")
        a_shift, g_shift = pi_split(a, g, torch.tensor(DAMPING, dtype=torch.float64))
        assert close((a_shift / g_shift).sqrt(), MLP[f"{name}/pi/{layer}"])
        assert close(a_shift * g_shift, MLP["damping"])


@losses
def test_full_and_diagonal_blocks(name):
    case = CASES[name]
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    blocks = run(case)[2].blocks()
    for layer in LAYERS:
        wanted, o = MLP[f"{name}/full_block/{layer}"], len(MLP[f"params/{layer}/b"])
        assert close(_block(dense.block(case.blocks[f"{layer}.w"]), o), wanted)
        assert close(_block(outer(blocks[f"{layer}.w"]), o), wanted)
        diagonal = squares(blocks[f"{layer}.w"])
        assert close(diagonal[:, :-1].T, MLP[f"{name}/diag_block/{layer}/w"])
        assert close(diagonal[:, -1], MLP[f"{name}/diag_block/{layer}/b"])


@losses
def test_whole_matrix_of_the_oracle(name):
    case = CASES[name]
    order = [f"{layer}.{c}" for layer in LAYERS for c in "bw"]
    dense = oracles.ggn(case.fn, case.params, case.inputs, case.targets, case.value)
    assert close(dense.whole(order), MLP[f"{name}/ggn_dense"])


def test_moving_averages():
    case, tx = CASES["ce"], kf.kfac(decay=0.95)
    state = tx.init(case.params)
    for k in range(3):
        batch = case._replace(inputs=MLP[f"ema/x{k}"], targets=MLP[f"ema/y{k}"])
        state = kf.observe(state, run(batch)[2])
        assert close(state.weight, MLP[f"ema/step{k}/weight"])
        for layer in LAYERS:
            m = state.curvature.matrix[f"{layer}.w"]
            assert close(m.a, MLP[f"ema/step{k}/{layer}/A"])
            assert close(m.g, MLP[f"ema/step{k}/{layer}/G"])


def _drawn(draws: Tensor) -> kf.estimators.Estimator:
    """Scores at given draws."""

    def vectors(loss, z, targets, noise):
        yield loss.sampled_score(z, targets, draws).unsqueeze(0)

    return kf.estimators.exact()._replace(vectors=vectors)


REPLAYS = [
    (name, key) for name in CASES for key in ("fisher_gradients", "ggn_curvature_prop") if f"{name}/{key}/l0/G" in MLP
]


@pytest.mark.parametrize(("name", "key"), REPLAYS)
def test_sampled_modes_replayed(name, key):
    case = CASES[name]
    if key == "fisher_gradients":
        draws = MLP[f"{name}/{key}/sampled_targets"]
        if name == "half_sq":  # drawn with variance 1/2 and scores weighted by √2 there, with variance 1 here
            draws = MLP["half_sq/logits"] + 2**0.5 * (draws - MLP["half_sq/logits"])
        _, _, stats = run(case, _drawn(draws.long() if name == "ce" else draws.double()))
    else:
        signs = MLP[f"{name}/{key}/signs"]
        assert set(signs.flatten().tolist()) == {-1.0, 1.0}
        noise = 0.25 + 0.5 * (signs + 1) / 2  # -1 where the noise is below a half
        _, _, stats = run(case, kf.estimators.curvature_prop(), noise=noise.unsqueeze(0))
    for layer in LAYERS:
        m = kf.curvature.kronecker().measure(stats.blocks()[f"{layer}.w"])
        assert close(m.g, MLP[f"{name}/{key}/{layer}/G"])


def test_replays_cover_both_sampled_modes():
    assert {key for _, key in REPLAYS} == {"fisher_gradients", "ggn_curvature_prop"}
    assert len(REPLAYS) >= 4


# ------------------------------------------------------------------ the convolution


def _conv_net(p, x):
    h = torch.tanh(F.conv2d(x, p["conv"]["weight"], p["conv"]["bias"], padding="same"))
    return F.linear(h.permute(0, 2, 3, 1).flatten(1), p["dense"]["weight"], p["dense"]["bias"])


def _conv() -> Case:
    params = {k: {c: CONV[f"params_torch/{k}/{c}"] for c in ("weight", "bias")} for k in ("conv", "dense")}
    blocks = {f"{k}.weight": Spec(f"{k}.weight", f"{k}.bias") for k in params}
    data, loss = (CONV["x_torch"], CONV["y"]), kf.losses.cross_entropy()
    return Case(_conv_net, params, *data, loss, F.cross_entropy, blocks, {"conv.weight": 20, "dense.weight": 1})


def _weights(key: str) -> tuple[Tensor, ...]:
    """The four leaves of a tree in torch's layout: conv weight OIHW and bias, dense weight and bias."""
    w, b = CONV[f"{key}/conv/w"].permute(3, 2, 0, 1), CONV[f"{key}/conv/b"]
    return w, b, CONV[f"{key}/dense/w"].T, CONV[f"{key}/dense/b"]


def _leaves(tree: dict) -> tuple[Tensor, ...]:
    return tuple(tree[k][c] for k in ("conv", "dense") for c in ("weight", "bias"))


def test_convolution_value_and_gradient():
    value, grads, _ = run(_conv())
    assert close(value, CONV["loss"])
    assert all(close(a, b) for a, b in zip(_leaves(grads), _weights("grad"), strict=True))


@modes
@splits
def test_convolution_factors_and_damped_inverses(mode, split):
    case = _conv()
    _, grads, stats = run(case, MODES[mode])
    tx = kf.kfac(damping=DAMPING, split=split)
    updates, state = tx.update(grads, tx.init(case.params), stats=stats)
    for layer, a_key in (("conv", "A_torch"), ("dense", "A")):
        m = state.curvature.matrix[f"{layer}.weight"]
        assert close(m.a, CONV[f"{mode}/{layer}/{a_key}"])
        assert close(m.g, CONV[f"{mode}/{layer}/G"])
        assert close(m.positions, CONV[f"{mode}/{layer}/scale"])
    wanted = _weights(f"{mode}/inv_{split}")
    assert all(close(a, b) for a, b in zip(_leaves(updates), wanted, strict=True))


def test_convolution_blocks():
    case = _conv()
    blocks, order = run(case)[2].blocks(), CONV["conv_A_perm_torch_from_jax"]
    wanted = CONV["full_block/conv"].reshape(19, 3, 19, 3)[order][:, :, order].permute(1, 0, 3, 2).reshape(57, 57)
    assert close(outer(blocks["conv.weight"]), wanted)
    assert close(_block(outer(blocks["dense.weight"]), 3), CONV["full_block/dense"])
    assert close(squares(blocks["conv.weight"]).flatten(), wanted.diagonal())


@pytest.mark.parametrize("name", FILES)
def test_data_is_a_faithful_copy(name):
    if not (ORIGIN / name).exists():
        pytest.skip(f"no {ORIGIN.name}/{name} beside the repository")
    mine, original = np.load(DATA / name), np.load(ORIGIN / name)
    assert len(mine.files) > 50
    assert all(np.array_equal(mine[key], original[key], equal_nan=True) for key in mine.files)
