"""Parameters drawn from a posterior, and what the net predicts with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._errors import CaptureError, HyperparameterError, KFacError, at_least, explain, warn
from kfac_func._typing import Model, PyTree
from kfac_func.capture import tensor_of
from kfac_func.laplace.posterior import Posterior, Prior, precision, with_prior
from kfac_func.laplace.probabilities import Link, linked, normal

Nets: TypeAlias = Literal["auto", "vmap", "loop"]
"""All nets at once, one after the other, or the first of these that can."""


def sample(
    posterior: Posterior, generator: torch.Generator, count: int, *, prior_precision: Prior | None = None
) -> PyTree:
    r"""Draws of the parameters, θ* + P^-½ ε with ε standard normal: a tree like θ*, every leaf [count, *shape].

    Leaves without a posterior are θ*, `count` times. `torch.func.vmap(fn, in_dims=(0, None))` runs the net with all of
    them. Raises HyperparameterError for a count below 1 and what `with_prior` refuses. Source: Ritter et al. 2018, §3.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> posterior = kf.laplace.fit(fn, kf.losses.cross_entropy(), params, batches)
        >>> drawn = kf.laplace.sample(posterior, torch.Generator().manual_seed(0), 7)
        >>> drawn["weight"].shape
        torch.Size([7, 2, 3])
    """
    at_least(1, count=count)
    operator = precision(with_prior(posterior, prior_precision))
    noise = {path: normal((count, *leaf.shape), leaf, generator) for path, leaf in operator.like.items()}
    steps = torch.func.vmap(lambda one: operator.sample(noise=one))(noise)
    leaves = _tree.leaves_with_paths(posterior.params)
    moved = [leaf + steps[path] if path in steps else leaf.expand(count, *leaf.shape).clone() for path, leaf in leaves]
    return _tree.with_leaves(posterior.params, moved)


def sampled_predictive(
    posterior: Posterior,
    fn: Model,
    inputs: Any,
    *,
    generator: torch.Generator,
    samples: int = 100,
    link: Link = "softmax",
    class_dim: int = 1,
    prior_precision: Prior | None = None,
    route: Nets = "auto",
    chunk_size: int | None = None,
) -> Tensor:
    r"""The average prediction of nets drawn from the posterior, [N, *out].

        (1/K) Σ_k softmax(f(x; θ_k)),        θ_k ~ N(θ*, P⁻¹)

    samples      K
    link         what is averaged: "softmax" over `class_dim`, "sigmoid", or "identity", the outputs (regression)
    route        "vmap": all nets at once; "loop": one after the other, for models that torch.func.vmap cannot take
                 (nn.LSTM, branches that depend on values, dropout, which a loop draws for every net anew); "auto": the
                 loop where the vmap fails, with a warning
    chunk_size   nets at a time (None: all), for the vmap

    The net itself, not its linearisation: where the posterior is wide this is usually worse than `predict`, as the
    curvature holds near θ* only (Immer et al. 2021, 2008.08400, §3). Raises HyperparameterError for samples below 1, an
    unknown link and what `with_prior` refuses.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> posterior = kf.laplace.fit(fn, kf.losses.cross_entropy(), params, batches)
        >>> generator = torch.Generator().manual_seed(0)
        >>> p = kf.laplace.sampled_predictive(posterior, fn, torch.eye(3), generator=generator)
        >>> p.shape, torch.allclose(p.sum(1), torch.ones(3))
        (torch.Size([3, 2]), True)
    """
    at_least(1, samples=samples, chunk_size=chunk_size)
    if route not in get_args(Nets):
        raise HyperparameterError(
            explain("unknown route.", got=repr(route), wanted=" or ".join(map(repr, get_args(Nets))))
        )
    drawn = sample(posterior, generator, samples, prior_precision=prior_precision)

    def one(params: PyTree) -> Tensor:
        return linked(tensor_of(fn(params, inputs)), link, class_dim)

    if route == "loop":
        return _one_by_one(one, drawn, samples)
    try:
        return torch.func.vmap(one, chunk_size=chunk_size)(drawn).mean(0)
    except KFacError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        if route == "vmap":
            raise CaptureError(_no_vmap(why)) from error
    found = _one_by_one(one, drawn, samples)
    warn(explain("the nets go one after the other.", why=why, options="route='loop', which says nothing"))
    return found


def _one_by_one(one: Callable[[PyTree], Tensor], drawn: PyTree, samples: int) -> Tensor:
    return reduce(torch.add, (one(_tree.tree_map(lambda x, k=k: x[k], drawn)) for k in range(samples))) / samples


def _no_vmap(why: str) -> str:
    return explain(
        "torch.func.vmap cannot run the model with many parameters.",
        got=why,
        options="route='loop', one net after the other",
    )
