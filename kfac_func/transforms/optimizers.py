r"""Optimisers: short chains that end with the learning rate. Each is meant to be read, copied and changed."""

from __future__ import annotations

from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import Scalar, ScalarOrSchedule
from kfac_func.transforms.base import GradientTransformation, check_scalar
from kfac_func.transforms.combine import chain
from kfac_func.transforms.constraints import add_decayed_weights
from kfac_func.transforms.masks import Mask
from kfac_func.transforms.moments import scale_by_adam, trace
from kfac_func.transforms.scaling import scale_by_learning_rate


def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    r"""Gradient descent, with momentum and an L2 penalty if wanted:

        g_t = ∇L(p_{t-1}) + λ p_{t-1},      m_t = g_t + μ m_{t-1},      p_t = p_{t-1} - η m_t,   m_0 = 0

    or with `nesterov`:  p_t = p_{t-1} - η (g_t + μ m_t).

    Symbols: η = `learning_rate` ≥ 0; μ = `momentum` in [0, 1); λ = `weight_decay` ≥ 0. Each a number or a 0-dim tensor;
    η and λ may be schedules. Links for μ = 0 and λ = 0 (as Python numbers) are left out: plain descent needs no params.
    `mask` says which leaves the penalty is for, as in `masked`.
    Raises HyperparameterError for Python numbers outside these, for nesterov without momentum, and for a mask without
    weight decay or one that does not fit.
    Source: the conventions of torch.optim.SGD without dampening.

    >>> import torch
    >>> tx = sgd(0.5, momentum=0.5)
    >>> _, state = tx.update(torch.ones(2), tx.init(torch.ones(2)))
    >>> tx.update(torch.ones(2), state)[0].tolist()
    [-0.75, -0.75]
    """
    check_scalar("momentum", momentum, "[0, 1)")
    if nesterov and _off(momentum):
        raise HyperparameterError(explain("nesterov needs momentum.", got="momentum=0.0", wanted="a number in (0, 1)"))
    if mask is not None and _off(weight_decay):
        raise HyperparameterError(
            explain("mask needs weight_decay.", got="weight_decay=0.0", wanted="a positive number")
        )
    decay = [] if _off(weight_decay) else [add_decayed_weights(weight_decay, mask)]
    heavy = [] if _off(momentum) else [trace(momentum, nesterov)]
    return chain(*decay, *heavy, scale_by_learning_rate(learning_rate))


def _off(value: ScalarOrSchedule) -> bool:
    """Whether an option is the Python number zero: a tensor is never read."""
    return isinstance(value, (int, float)) and value == 0


def adam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
) -> GradientTransformation:
    r"""Adam:  p_t = p_{t-1} - η d_t,  d_t the direction of `scale_by_adam`.

    Symbols: η = `learning_rate` ≥ 0, a number, a 0-dim tensor or a schedule; the others as in `scale_by_adam`.
    Raises HyperparameterError for Python numbers that have no meaning.
    Source: Kingma & Ba 2015, Algorithm 1; the conventions of torch.optim.Adam.

    >>> import torch
    >>> tx = adam(0.5, eps=0.0)
    >>> [round(u, 6) for u in tx.update(torch.tensor([4.0, -2.0]), tx.init(torch.ones(2)))[0].tolist()]
    [-0.5, 0.5]
    """
    return chain(scale_by_adam(b1, b2, eps, eps_root), scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
) -> GradientTransformation:
    r"""Adam with decoupled weight decay:  p_t = p_{t-1} - η (d_t + λ p_{t-1}),  d_t the direction of `scale_by_adam`.

    Symbols: η = `learning_rate` ≥ 0 and λ = `weight_decay` ≥ 0, each a number, a 0-dim tensor or a schedule (the decay
    per step is η λ, as in torch and optax); `mask` the leaves that decay, as in `masked`; the others as in
    `scale_by_adam`. `update` needs the params.
    Raises HyperparameterError for Python numbers that have no meaning, or when `update` gets no params.
    Source: Loshchilov & Hutter 2019, Algorithm 2; the conventions of torch.optim.AdamW.

    >>> import torch
    >>> tx = adamw(0.5, eps=0.0, weight_decay=0.5)
    >>> params = torch.tensor([2.0, 0.0])
    >>> [round(u, 6) for u in tx.update(torch.tensor([4.0, -2.0]), tx.init(params), params)[0].tolist()]
    [-1.0, 0.5]
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
