"""Against numbers of an independent implementation: quadratic model, damping rule, norm constraint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kfac_func as kf
from tests.zoo import close
from tests.zoo.models import mlp

pytestmark = pytest.mark.golden
DATA = np.load(Path(__file__).parents[1] / "data" / "golden_mlp.npz")
G = {key: torch.tensor(DATA[key]) for key in DATA.files}
L2, DAMPING = float(G["quad/l2_reg"]), float(G["damping"])
BATCH = G["x"], G["y"]


def tree(name: str) -> dict[str, dict[str, Tensor]]:
    return {f"l{k}": {c: G[f"{name}/l{k}/{c}"] for c in "wb"} for k in range(3)}


PARAMS, V, VELOCITY = tree("params"), tree("quad/precond_grad"), tree("velocity")
OWN = {layer: {c: x - L2 * PARAMS[layer][c] for c, x in leaves.items()} for layer, leaves in tree("quad/grad").items()}
MODEL = kf.quadratic_model(mlp, kf.losses.cross_entropy(), l2=L2)


def moved(momentum: float | None = None) -> Any:
    """One step from the stored velocity."""
    tx = kf.scale_by_quadratic_model(MODEL, momentum=momentum, damping=DAMPING)
    state = tx.init(PARAMS)._replace(velocity=VELOCITY)
    return tx.update(V, state, PARAMS, batch=BATCH, gradient=OWN)


def test_the_matrices_of_the_model():
    form = MODEL.form(PARAMS, BATCH, [V, VELOCITY], OWN, 1.0)
    assert close(form.curvature, G["quad/A"])
    assert close(form.damping, G["quad/D"])
    assert close(form.l2, L2 * G["quad/R"])
    assert close(form.slope, G["quad/b"])
    assert close(form.value, G["quad/loss"])


def test_rate_and_momentum():
    updates, state = moved()
    assert close(torch.stack([-state.learning_rate, state.momentum]), G["quad/coeffs"])
    assert close(state.change, G["quad/change"])
    wanted = -state.learning_rate * V["l1"]["w"] + state.momentum * VELOCITY["l1"]["w"]
    assert close(updates["l1"]["w"], wanted)


def test_fixed_momentum():
    state = moved(0.9)[1]
    assert close(torch.stack([-state.learning_rate, state.momentum]), G["quad/coeffs_fixed_momentum_0.9"])
    assert close(state.change, G["quad/change_fixed_momentum_0.9"])


def test_new_loss_and_reduction_ratio():
    updates, state = moved()
    after = MODEL.value(kf.apply_updates(PARAMS, updates), BATCH)
    assert close(after, G["quad/new_loss"])
    assert close((after - state.value) / state.change, G["quad/rho"])


def test_levenberg_marquardt():
    rule = kf.levenberg_marquardt(interval=5, decay=0.9)
    for ratio, wanted in G["lm/rho_and_new_damping_from_0.1"]:
        assert close(rule(torch.tensor(0.1, dtype=torch.float64), ratio), wanted)


def test_norm_constraint():
    tx = kf.clip_by_kl(float(G["norm_constraint/c"]), float(G["norm_constraint/lr"]))
    updates, state = tx.update(V, tx.init(PARAMS), gradient=tree("quad/grad"))
    assert close(state.scale, G["norm_constraint/coeff"])
    assert close(updates["l0"]["w"], G["norm_constraint/coeff"] * V["l0"]["w"])
