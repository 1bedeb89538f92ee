"""Recipes: the settings of the house put together, for reading and copying."""

from __future__ import annotations

from kfac_func._errors import HyperparameterError, explain
from kfac_func._typing import ScalarOrSchedule
from kfac_func.curvature import Curvature, Structure, blockwise, kronecker
from kfac_func.damping import Split
from kfac_func.precondition import preconditioner
from kfac_func.state import Average, Options
from kfac_func.transforms import GradientTransformation


def kfac(
    curvature: Structure | Curvature | None = None,
    *,
    damping: ScalarOrSchedule = 1e-3,
    split: Split = "pi",
    decay: float = 0.95,
    refresh_every: int = 10,
    average: Average = "debiased",
) -> GradientTransformation:
    r"""Precondition gradients by the damped inverse of a curvature approximation: v = (F̂ + λ)⁻¹ g.

    The update returns a direction, not yet scaled by a learning rate: `chain(kfac(), sgd(0.1, momentum=0.9))`.
    Statistics are passed as `stats=` (None on steps that skip them); before the first ones the gradients pass
    unchanged.

    curvature      a structure for matrix blocks (scale-and-shift and unclaimed blocks get `diagonal()`), or a whole
                   Curvature; default `kronecker()`
    damping        λ ≥ 0 in units of the curvature of the loss: a number, a 0-dim tensor (gradients flow through it)
                   or a schedule of the update count
    split          "pi": factored damping with π; "none": factored with π = 1; "exact": Tikhonov in the eigenbasis
    decay          β in [0, 1), the weight of the OLD average
    average        "debiased": W ← βW + 1, X ← X + (x − X)/W; "warmup": the old weight is min(1 − 1/k, β) at the k-th
                   statistics
    refresh_every  k: factorise at the first statistics and then every k updates. Young averages change fast, so the
                   interval grows: 1 during the first k updates, 2 during the next k, … `update(..., refresh=...)`
                   decides otherwise

    State: `KFacState`, a NamedTuple of tensors. Under vmap and torch.compile pass `refresh=` explicitly, or use
    refresh_every=1. Raises HyperparameterError for values without meaning. Source: Martens & Grosse 2015 (1503.05671).

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse())
        >>> tx = kf.chain(kf.kfac(damping=1e-3), kf.sgd(0.1, momentum=0.9))
        >>> batch, generator = (torch.randn(5, 3), torch.randn(5, 2)), torch.Generator().manual_seed(0)
        >>> value, grads, stats = step(params, batch, generator=generator)
        >>> updates, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> params = kf.apply_updates(params, updates)
    """
    if isinstance(damping, (int, float)) and not 0 <= damping < float("inf"):
        raise HyperparameterError(explain("damping must be finite and not negative.", got=damping))
    if split not in ("pi", "none", "exact"):
        raise HyperparameterError(explain("unknown split.", got=repr(split), wanted="'pi', 'none' or 'exact'"))
    if average not in ("debiased", "warmup"):
        raise HyperparameterError(explain("unknown average.", got=repr(average), wanted="'debiased' or 'warmup'"))
    if not 0 <= decay < 1:
        raise HyperparameterError(explain("decay must be in [0, 1): it is the weight of the old average.", got=decay))
    if refresh_every < 1:
        raise HyperparameterError(explain("refresh_every must be at least 1.", got=refresh_every))
    chosen = kronecker() if curvature is None else curvature
    if isinstance(chosen, Structure):
        chosen = blockwise(chosen)
    return preconditioner(chosen, damping, Options(split, decay, average, refresh_every))
