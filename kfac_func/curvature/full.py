r"""The exact natural gradient: all blocks together, inverted by one Gram matrix.

F = M Mᵀ,  M = [M_1; …; M_L]      v_l = (1/λ_l) [u_l − M_l (I + Σ_k M_kᵀM_k/λ_k)⁻¹ Σ_k M_kᵀu_k/λ_k]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_func._errors import at_least
from kfac_func.blocks import Block, Pairs, pairs_by_example
from kfac_func.curvature.base import Batch, Curvature
from kfac_func.linalg.gram import (
    Rule,
    Window,
    Woodbury,
    columns,
    joined,
    known_rule,
    ruled,
    shifted,
    sizes,
    solve_woodbury,
    woodbury,
)


def full(*, rule: Rule = "standard", window: int = 1) -> Curvature:
    r"""(F + Λ)⁻¹ with F the curvature of the whole net, matrix and vector blocks and all that lies between them.

        v_l = (1/λ_l) [u_l − M_l (I + Σ_k M_kᵀM_k/λ_k)⁻¹ Σ_k M_kᵀu_k/λ_k]

    rule      "standard": λ_l = λ; "heuristic": λ_l = λ σ₁(A) + λ σ₁(G) + λ² for every block
    window    how many batches F̂ = Σ_k w_k F_k goes back, with the weights of the moving average; 1: the newest alone

    Costs, limits of precision and statistics are those of `block_diagonal`. Leaves of `unclaimed="identity"` take no
    part. All blocks see the same examples: a use that all examples share, and a leaf of `unclaimed="diagonal"`, have
    no rows per example and are refused (unless there is one example). `dense` gives the blocks on the diagonal.

    Raises HyperparameterError for values without meaning; StateError without output vectors, for such blocks, and for
    batches of different sizes in a window of several. Source: Ren & Goldfarb 2019 (1906.02353).

        >>> tx = kf.kfac(kf.curvature.full(), damping=1e-2)
        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> state.factored.lower.shape
        torch.Size([10, 10])
    """
    known_rule(rule)
    at_least(1, window=window)

    def prepare(blocks: dict[str, Block]) -> dict[str, Pairs]:
        return pairs_by_example(blocks, "full()")

    def measure(prepared: dict[str, Any]) -> Any:
        rows = prepare(prepared) if isinstance(next(iter(prepared.values())), Block) else prepared
        return {name: sizes(part) for name, part in rows.items()}

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> Window:
        return shifted(state, batch.ask(lambda rows: rows), fraction, window)

    def factorize(state: Window, damping: dict[str, Tensor], split: str, kept: Any = ()) -> Woodbury:
        del split
        if kept != ():
            return kept
        rows, weights = state
        own = {name: ruled(part, weights, damping[name], rule) for name, part in rows.items()}
        return woodbury({name: joined(part, weights) for name, part in rows.items()}, own)

    def dense(state: Window) -> dict[str, Tensor]:
        ms = {name: columns(joined(part, state.weights)).mT for name, part in state.rows.items()}
        return {name: m @ m.mT for name, m in ms.items()}

    return Curvature(
        f"full[{rule}, window={window}]",
        prepare,
        measure,
        absorb,
        refresh=lambda state, damping, split: state,
        scale=lambda state, batch, fraction: state,
        factorize=factorize,
        solve=solve_woodbury,
        dense=dense,
    )
