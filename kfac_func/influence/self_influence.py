"""How every training example moves itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_func._tracing import without_autocast
from kfac_func._typing import Model, Progress, PyTree, Scalar, shown
from kfac_func.blocks import Pairs
from kfac_func.influence.gradients import prepared, some
from kfac_func.linalg import Spectral
from kfac_func.linalg.spectral import seen_in, squared
from kfac_func.losses import Loss, checked_loss
from kfac_func.losses.means import same_mean
from kfac_func.products.routes import Route


def self_influence(
    fn: Model,
    loss: Loss,
    params: PyTree,
    state: PyTree,
    batches: Iterable[Any],
    *,
    damping: Scalar | None = None,
    route: Route = "auto",
    chunk_size: int | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""The influence [N] of every training example on its own loss: the diagonal of `scores`.

        score[n] = ∇l_nᵀ (F̂ + λ)⁻¹ ∇l_n = Σ_blocks ⟨Ṽ_n, S⁻¹ ∘ Ṽ_n⟩         Ṽ_n = U_Gᵀ V_n U_A

    score/N is the rise of l_n, to first order, when example n is left out: what the net knows from this example alone.
    Mislabelled examples and outliers are high. No V_n is formed at a single position; a few at a time elsewhere.

    batches                  (inputs, targets), gone through once
    all else and its errors  as in `scores`

    Source: Koh & Liang 2017 (1703.04730), §5.4; in the eigenbasis Grosse et al. 2023 (2308.03296), §3.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.eye(3), torch.zeros(3, 2)), (torch.ones(2, 3), torch.zeros(2, 2))]
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, batches)
        >>> kf.influence.self_influence(fn, kf.losses.mse(), params, state, batches, damping=0.1).shape
        torch.Size([5])
    """
    loss = same_mean(checked_loss(loss))
    spectra, read = prepared(fn, params, state, damping, route, chunk_size, only)
    found = [_total(spectra, rows) for batch in shown(batches, progress) for rows in read(loss.score, batch)]
    return torch.cat(some(found, "training examples"))


@without_autocast
def _total(spectra: dict[str, Spectral], rows: dict[str, Pairs]) -> Tensor:
    """Σ_blocks ⟨V_n, (F̂ + λ)⁻¹ V_n⟩ [N]."""
    forms = [squared(seen_in(spectra[name], one), spectra[name].values.reciprocal())[0] for name, one in rows.items()]
    return torch.stack(forms).sum(0)
