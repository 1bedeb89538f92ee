"""Matrix-free products against numbers of an independent implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

import kfac_func as kf
from tests.zoo import close
from tests.zoo.models import mlp

pytestmark = pytest.mark.golden
DATA = Path(__file__).parents[1] / "data"
MLP, CONV = ({k: torch.tensor(v) for k, v in np.load(DATA / f"golden_{name}.npz").items()} for name in ("mlp", "conv"))
LAYERS = ("l0", "l1", "l2")
PARAMS = {layer: {c: MLP[f"params/{layer}/{c}"] for c in "wb"} for layer in LAYERS}
LOSSES = {
    "ce": (kf.losses.cross_entropy(), "y"),
    "half_sq": (kf.losses.mse(reduction="batchmean", scale=0.5), "t_squared"),
    "bernoulli": (kf.losses.bce_with_logits(reduction="batchmean"), "t_bernoulli"),
}
MADE = {
    "ggn": kf.products.ggn_vp,
    "fisher": kf.products.fisher_vp,
    "hessian": kf.products.hvp,
    "empirical_fisher": lambda fn, loss: kf.products.fisher_vp(fn, loss, kf.estimators.empirical()),
}
losses = pytest.mark.parametrize("name", LOSSES)
matrices = pytest.mark.parametrize("matrix", MADE)


def product(name: str, matrix: str):
    loss, targets = LOSSES[name]
    return MADE[matrix](mlp, loss)(PARAMS, (MLP["x"], MLP[targets]))


def flat(tree) -> Tensor:
    """Biases before weights, layer after layer: the order of the dense matrices."""
    return torch.cat([tree[layer][c].flatten() for layer in LAYERS for c in "bw"])


def unflat(vector: Tensor):
    parts = iter(vector.split([PARAMS[layer][c].numel() for layer in LAYERS for c in "bw"]))
    return {layer: {c: next(parts).reshape(PARAMS[layer][c].shape) for c in "bw"} for layer in LAYERS}


def dense(name: str, matrix: str) -> Tensor:
    moved = product(name, matrix)
    size = len(flat(PARAMS))
    return vmap(lambda e: flat(moved(unflat(e))), out_dims=1)(torch.eye(size, dtype=torch.float64))


@losses
@matrices
def test_products(name, matrix):
    vector = {layer: {c: MLP[f"vector/{layer}/{c}"] for c in "wb"} for layer in LAYERS}
    got = product(name, matrix)(vector)
    for layer in LAYERS:
        assert all(close(got[layer][c], MLP[f"{name}/mvp_{matrix}/{layer}/{c}"]) for c in "wb")


@losses
@matrices
def test_whole_matrices(name, matrix):
    assert close(dense(name, matrix), MLP[f"{name}/{'ggn' if matrix == 'fisher' else matrix}_dense"])


@losses
def test_diagonals(name):
    diagonal = unflat(dense(name, "ggn").diagonal())
    for layer in LAYERS:
        assert all(close(diagonal[layer][c], MLP[f"{name}/diag_block/{layer}/{c}"]) for c in "wb")


@losses
def test_forms_and_factors_are_those_of_the_matrix(name):
    loss, targets = LOSSES[name]
    vectors, batch = [unflat(column) for column in MLP[f"{name}/ggn_dense"][:3]], (MLP["x"], MLP[targets])
    rows = torch.stack([flat(v) for v in vectors])
    wanted = rows @ MLP[f"{name}/ggn_dense"] @ rows.T
    assert close(kf.products.fisher_forms(mlp, loss)(PARAMS, batch)(vectors), wanted)
    b = kf.products.ggn_factor(mlp, loss)(PARAMS, batch)
    seen = torch.stack([b.transposed(v).flatten() for v in vectors])
    assert close(seen @ seen.T, wanted)


def conv_net(p, x):
    h = torch.tanh(F.conv2d(x, p["conv"]["weight"], p["conv"]["bias"], padding="same"))
    return F.linear(h.permute(0, 2, 3, 1).flatten(1), p["dense"]["weight"], p["dense"]["bias"])


def conv_tree(key: str):
    """From HWIO and [in, out] to torch's layouts."""
    conv, linear = CONV[f"{key}/conv/w"].permute(3, 2, 0, 1), CONV[f"{key}/dense/w"].T
    return {
        "conv": {"weight": conv, "bias": CONV[f"{key}/conv/b"]},
        "dense": {"weight": linear, "bias": CONV[f"{key}/dense/b"]},
    }


@matrices
def test_products_of_a_convolution(matrix):
    batch = CONV["x_torch"], CONV["y"]
    params = {k: {c: CONV[f"params_torch/{k}/{c}"] for c in ("weight", "bias")} for k in ("conv", "dense")}
    got = MADE[matrix](conv_net, kf.losses.cross_entropy())(params, batch)(conv_tree("vector"))
    wanted = conv_tree(f"mvp_{matrix}")
    assert all(close(got[k][c], wanted[k][c]) for k in wanted for c in wanted[k])
