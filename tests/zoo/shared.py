"""Cases whose statistics need vectors of mean zero: a use shared by all examples, and a leaf that no kind can see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_func as kf
from tests.oracles import Spec
from tests.zoo.cases import Case, labels, randn, weights


def _positioned(p: dict, x: Tensor) -> Tensor:
    place = F.embedding(torch.arange(x.shape[1]), p["place"])
    return F.linear(torch.tanh(F.linear(x, p["w"], p["b"]) + place), p["head"]).mean(1)


def position_case() -> Case:
    """Position embeddings of arange(T), the same for all of N = 3 examples."""
    params = weights({"w": (6, 4), "b": (6,), "place": (4, 6), "head": (2, 6)})
    blocks = {"w": Spec("w", "b"), "place": Spec("place", form="in_out"), "head": Spec("head")}
    data, loss = (randn(3, 4, 4, seed=9), labels(2, 3)), kf.losses.cross_entropy()
    return Case(_positioned, params, *data, loss, F.cross_entropy, blocks, {"w": 4, "place": 4, "head": 4})


def _gated(p: dict, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])) * p["gain"].exp(), p["head"])


def unclaimed_case() -> Case:
    """A gain, by its logarithm, that multiplies the hidden layer, N = 3."""
    params = weights({"w": (6, 4), "b": (6,), "gain": (6,), "head": (2, 6)})
    blocks = {"w": Spec("w", "b"), "gain": Spec("gain", form="vector"), "head": Spec("head")}
    data, loss = (randn(3, 4, seed=9), labels(2, 3)), kf.losses.cross_entropy()
    return Case(_gated, params, *data, loss, F.cross_entropy, blocks, {"w": 1, "head": 1})
