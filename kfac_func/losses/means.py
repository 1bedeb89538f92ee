"""Means that say something about the batch: over the targets that are not ignored, or by the weights of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_func._errors import HyperparameterError, explain
from kfac_func._tracing import plain
from kfac_func.losses.base import Loss, widen


def same_mean(loss: Loss) -> Loss:
    r"""The loss, for several batches of one data set: its value and its score know whether l_n depends on the batches.

        L = Σ_n t_n / Σ_n w_n = (1/N) Σ_n l_n,     l_n = t_n / w̄,     w̄ = (1/N) Σ_n w_n the mean weight of an example

    They raise HyperparameterError when w̄ is another one than in the first batch: then the mean over all data is not
    that of the batches. The w̄ of a batch is what the score of an example that joins it is divided by.

        >>> loss = same_mean(kf.losses.cross_entropy(class_dim=-1))
        >>> z = torch.zeros(2, 3, 5)
        >>> short, long = torch.tensor([[0, -100, -100]] * 2), torch.zeros(2, 3, dtype=torch.long)
        >>> _ = loss.value(z, short)
        >>> loss.value(z, long)
        Traceback (most recent call last):
            ...
        kfac_func._errors.HyperparameterError: the mean of the loss depends on how the data are cut into batches.
          got      an example weighs 3 times as much as in the first batch
          why      it is over the targets that are not ignored, or by class weights, batch by batch
          options  reduction='batchmean' or 'sum', whose l_n is a sum over positions; or all data as one batch
    """
    if loss.reduction != "mean":
        return loss
    first: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def check(z: Tensor, targets: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        z, targets = widen(plain(z)), plain(targets)
        if not bool(z.isfinite().all()):  # which has an error of its own
            return
        if not first:
            scores = loss.score(z, targets)
            n = int(scores.reshape(len(scores), -1).abs().sum(1).argmax())
            probe = z[n : n + 1].clone(), targets[n : n + 1].clone()
            alone = loss.score(*probe)
            if alone.any():
                first.append((*probe, alone, _weight(loss, *probe, alone, z, targets)))
            return
        one, target, alone, base = first[0]
        same = z.shape[1:] == one.shape[1:]
        other = _weight(loss, one, target, alone, z, targets) / base if same else float("nan")
        if not abs(other - 1) < 1e-4:
            raise HyperparameterError(_other(other, z))

    def value(z: Tensor, targets: Tensor) -> Tensor:
        check(z, targets)
        return loss.value(z, targets)

    def score(z: Tensor, targets: Tensor) -> Tensor:
        check(z, targets)
        return loss.score(z, targets)

    return loss._replace(value=value, score=score)


def _weight(loss: Loss, one: Tensor, target: Tensor, alone: Tensor, z: Tensor, targets: Tensor) -> float:
    """w̄ of a batch in units of the weight of one example: 1/r = (w + N w̄) / ((N + 1) w) for its score r times as large
    in the batch as alone.
    """
    joined = loss.score(torch.cat([one, z.to(one)]), torch.cat([target, targets.to(target)]))[:1]
    ratio = float((joined * alone).double().sum() / alone.double().square().sum())
    return ((len(z) + 1) / ratio - 1) / len(z)


def _other(other: float, z: Tensor) -> str:
    return explain(
        "the mean of the loss depends on how the data are cut into batches.",
        got=f"an example weighs {other:.3g} times as much as in the first batch"
        if other == other
        else f"outputs {list(z.shape)} after a batch of others",
        why="it is over the targets that are not ignored, or by class weights, batch by batch",
        options="reduction='batchmean' or 'sum', whose l_n is a sum over positions; or all data as one batch",
    )
