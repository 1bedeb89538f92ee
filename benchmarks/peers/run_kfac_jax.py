"""kfac-jax, compiled, one sampled target per example: the dense nets W1 and W2 rewritten in jax with the same weights.

XLA runs on as many threads as the process may use (its own pool), whatever torch was told.
"""

from __future__ import annotations

from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import kfac_jax  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn

from benchmarks.harness import Step
from benchmarks.peers.common import DAMPING, DECAY
from benchmarks.steps import RATE, Task
from benchmarks.workloads import SEED

NEVER = 10**9
PERIODS = {"full": (1, 1), "stats": (1, NEVER), "pre": (NEVER, NEVER)}
"""By kind: the periods of the statistics and of the inverses."""

ACTIVATIONS = {nn.Tanh: jnp.tanh, nn.ReLU: jax.nn.relu}


def steps(task: Task) -> dict[str, Step]:
    """All three kinds, each with an optimiser of its own."""
    return {kind: _step(task, *PERIODS[kind]) for kind in PERIODS}


def _step(task: Task, curvature_period: int, inverse_period: int) -> Step:
    params, forward = _net(task.module())
    batch = jnp.asarray(task.inputs.numpy()), jnp.asarray(task.targets.numpy())
    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(_loss(forward, task)),
        l2_reg=0.0,
        learning_rate_schedule=lambda _: RATE,
        momentum_schedule=lambda _: 0.0,
        damping_schedule=lambda _: DAMPING,
        num_burnin_steps=0,
        curvature_ema=DECAY,
        curvature_update_period=curvature_period,
        inverse_update_period=inverse_period,
        estimation_mode="fisher_gradients",
    )
    key = jax.random.PRNGKey(SEED)
    state = optimizer.init(params, key, batch)
    count = 0

    def run() -> Tensor:
        nonlocal params, state, key, count
        key, mine = jax.random.split(key)
        params, state, stats = optimizer.step(params, state, mine, batch=batch, global_step_int=count)
        count += 1
        jax.block_until_ready((params, state))
        return torch.tensor(float(stats["loss"]))

    return Step(run, trains=True)


def _net(module: nn.Module) -> tuple[list[Any], Any]:
    """The weights of a chain of linear layers, and the function."""
    chain = list(module.children()) if isinstance(module, nn.Sequential) else [module]
    if any(type(layer) not in (nn.Linear, *ACTIVATIONS) for layer in chain):
        raise NotImplementedError("only dense nets were rewritten in jax")
    params = [
        (jnp.asarray(layer.weight.detach().numpy().T), jnp.asarray(layer.bias.detach().numpy()))
        for layer in chain
        if isinstance(layer, nn.Linear)
    ]

    def forward(params: list[Any], x: Any) -> Any:
        weights = iter(params)
        for layer in chain:
            if isinstance(layer, nn.Linear):
                w, b = next(weights)
                x = x @ w + b
            else:
                x = ACTIVATIONS[type(layer)](x)
        return x

    return params, forward


def _loss(forward: Any, task: Task) -> Any:
    def bernoulli(params: Any, batch: Any) -> Any:
        x, y = batch
        z = forward(params, x)
        kfac_jax.register_multi_bernoulli_predictive_distribution(z, y)
        return jnp.mean(jnp.sum(jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z))), axis=1))

    def categorical(params: Any, batch: Any) -> Any:
        x, y = batch
        z = forward(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(z, y)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1))

    return bernoulli if task.targets.is_floating_point() else categorical
