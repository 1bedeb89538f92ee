"""The table of gradient transformations: a new one is one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kfac_func._tree import tree_map
from kfac_func.transforms import (
    adam,
    adamw,
    add_decayed_weights,
    apply_if_finite,
    average_params,
    chain,
    clip_by_global_norm,
    clip_by_kl,
    ema,
    identity,
    inject_hyperparams,
    masked,
    multi_steps,
    named_chain,
    normalize_by_fisher_norm,
    partition,
    reduce_on_plateau,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_schedule,
    schedules,
    sgd,
    trace,
)


def nothing(step: int) -> dict[str, Any]:
    return {}


class Row(NamedTuple):
    """A transformation with its options, and for every option another value that must change the updates.

    `extras` are the keywords that its updates need; `unread` those that they need where counts cannot be read.
    """

    name: str
    make: Callable[..., Any]
    options: dict[str, Any]
    changed: dict[str, Any]
    extras: Callable[[int], dict[str, Any]] = nothing
    unread: Callable[[int], dict[str, Any]] = nothing


def tree(seed: int, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> dict[str, Any]:
    """Unsorted keys, a nested tuple, and a leaf without dimensions."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn((*batch, *shape), generator=g, dtype=torch.float64).to(dtype)

    return {"w": draw(3, 2), "b": draw(3), "deep": (draw(2), draw())}


def falling(count):
    return 0.5 / (1.0 + count)


def cosine(init: float) -> Any:
    return schedules.cosine_decay(init, 10)


def nested(momentum: float, rate: float) -> Any:
    return chain(clip_by_global_norm(1.0), chain(trace(momentum), add_decayed_weights(cosine(0.1))), scale(rate))


def named(momentum: float) -> Any:
    return named_chain(("zebra", trace(momentum)), ("ant", scale_by_adam()))


def foreign(decay: float) -> Any:
    """A foreign pair that returns its own state as the updates, as torchopt's momentum does."""

    def update(updates, state):
        moved = tree_map(lambda m, u: m if u is None else decay * m + u, state, updates)
        return tree_map(lambda u, m: m, updates, moved), moved

    return chain((lambda params: tree_map(torch.zeros_like, params), update))


def injected(rate: Any, momentum: float) -> Any:
    return inject_hyperparams(sgd)(rate, momentum=momentum)


def exploding(count: Any) -> Any:
    """Infinite at the second step, and at every one after it that does not count."""
    return torch.where(count == 1, torch.inf, 1.0)


def loss(step: int) -> dict[str, Any]:
    return {"value": (1.0, torch.tensor(0.95), 0.96)[step % 3]}


def behind(step: int) -> dict[str, Any]:
    """The gradient that a direction was made of: twice the direction of that step."""
    return {"gradient": tree_map(lambda g: 2 * g, tree(1 + step))}


def second(step: int) -> dict[str, Any]:
    return {"emit": step % 2 == 1}


ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}
ADAM_CHANGED = {"b1": 0.5, "b2": 0.9, "eps": 0.1, "eps_root": 0.1}

ROWS = [
    Row("identity", identity, {}, {}),
    Row("scale", scale, {"step_size": 1.0}, {"step_size": 2.0}),
    Row("scale_by_schedule", scale_by_schedule, {"step_size_fn": falling}, {"step_size_fn": cosine(1.0)}),
    Row(
        "rate",
        scale_by_learning_rate,
        {"learning_rate": 0.5, "flip_sign": True},
        {"learning_rate": 1.0, "flip_sign": False},
    ),
    Row("rate_schedule", scale_by_learning_rate, {"learning_rate": cosine(0.5)}, {"learning_rate": falling}),
    Row("trace", trace, {"decay": 0.9, "nesterov": False}, {"decay": 0.5, "nesterov": True}),
    Row("trace_nesterov", trace, {"decay": 0.9, "nesterov": True}, {"decay": 0.5}),
    Row("scale_by_adam", scale_by_adam, ADAM, ADAM_CHANGED),
    Row("clip", clip_by_global_norm, {"max_norm": 0.5}, {"max_norm": 0.25}),
    Row("clip_inactive", clip_by_global_norm, {"max_norm": 1e6}, {"max_norm": 0.25}),
    Row("kl", clip_by_kl, {"max_kl": 0.1, "learning_rate": 0.5}, {"max_kl": 0.2, "learning_rate": 1.0}, behind),
    Row("kl_schedule", clip_by_kl, {"max_kl": 0.1, "learning_rate": falling}, {"learning_rate": cosine(0.5)}, behind),
    Row("kl_inactive", clip_by_kl, {"max_kl": 1e6, "learning_rate": 0.5}, {"max_kl": 0.1}, behind),
    Row("fisher_norm", normalize_by_fisher_norm, {}, {}, behind),
    Row("decay", add_decayed_weights, {"weight_decay": 0.1}, {"weight_decay": 0.2, "mask": "w"}),
    Row("decay_schedule", add_decayed_weights, {"weight_decay": cosine(0.1)}, {"weight_decay": cosine(0.2)}),
    Row("sgd", sgd, {"learning_rate": 0.1}, {"learning_rate": 0.2, "momentum": 0.9, "weight_decay": 0.1}),
    Row(
        "sgd_all",
        sgd,
        {"learning_rate": cosine(0.1), "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"learning_rate": 0.1, "momentum": 0.5, "nesterov": False, "weight_decay": cosine(0.1), "mask": "deep*"},
    ),
    Row("adam", adam, {"learning_rate": 0.1, **ADAM}, {"learning_rate": 0.2, **ADAM_CHANGED}),
    Row(
        "adamw",
        adamw,
        {"learning_rate": 0.1, **ADAM},
        {"learning_rate": falling, **ADAM_CHANGED, "weight_decay": 0.1, "mask": "w"},
    ),
    Row("nested_chain", nested, {"momentum": 0.9, "rate": 0.5}, {"momentum": 0.5, "rate": 0.25}),
    Row("named_chain", named, {"momentum": 0.9}, {"momentum": 0.5}),
    Row("empty_chain", chain, {}, {}),
    Row("foreign_last", foreign, {"decay": 0.9}, {"decay": 0.5}),
    Row(
        "masked",
        masked,
        {"inner": trace(0.9), "mask": ["w", "deep.1"]},
        {"inner": trace(0.5), "mask": {"w": True, "b": True, "deep": (False, True)}},
    ),
    Row(
        "partition",
        partition,
        {"transforms": {"a": adam(0.1), "b": trace(0.9)}, "labels": {"deep*": "a", "*": "b"}},
        {"transforms": {"a": adam(0.2), "b": trace(0.9)}, "labels": {"deep*": "b", "*": "a"}},
    ),
    Row("injected", injected, {"rate": falling, "momentum": 0.9}, {"rate": 0.5, "momentum": 0.5}),
    Row(
        "finite",
        apply_if_finite,
        {"inner": chain(trace(0.9), scale_by_schedule(exploding)), "max_consecutive_errors": 2},
        {"inner": trace(0.9), "max_consecutive_errors": 0},
    ),
    Row(
        "multi_steps",
        multi_steps,
        {"inner": trace(0.9), "every": 2},
        {"inner": scale(2.0), "every": 3},
        unread=second,
    ),
    Row("ema", ema, {"decay": 0.9, "debias": True}, {"decay": 0.5, "debias": False}),
    Row("average_params", average_params, {"decay": 0.9, "start": 1}, {}),
    Row("polyak", average_params, {"decay": None}, {}),
    Row(
        "plateau",
        reduce_on_plateau,
        {"patience": 1, "rtol": 0.1},
        {"factor": 0.5, "patience": 2, "rtol": 0.0, "cooldown": 5, "accumulation_size": 2, "min_scale": 0.5},
        extras=loss,
    ),
    Row("plateau_absolute", reduce_on_plateau, {"patience": 1, "rtol": 0.0}, {"atol": 0.5}, extras=loss),
]
