r"""The exact curvature of every block, inverted by its Gram matrix.

    F_l = M_l M_lᵀ       v = (1/λ) [u − M_l (I + M_lᵀM_l/λ)⁻¹ M_lᵀu/λ]       M_l = [vec V_1 … vec V_K]

`full` is the same over all blocks together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_func._errors import at_least
from kfac_func.blocks import Block, Pairs, apart, pairs
from kfac_func.curvature.base import Batch, Structure
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


def block_diagonal(*, rule: Rule = "standard", window: int = 1) -> Structure:
    r"""The exact block (F_l + λ_l)⁻¹ of a matrix or vector block, with no approximation beyond the estimator's.

        v = (1/λ_l) [u − M_l (I + M_lᵀM_l/λ_l)⁻¹ M_lᵀu/λ_l]

    rule      "standard": λ_l = λ; "heuristic": λ_l = λ σ₁(A) + λ σ₁(G) + λ², with the largest eigenvalues of the
              block's Kronecker factors (A = 1 for vector blocks; of a tied weight, those of its rows)
    window    how many batches F̂ = Σ_k w_k F_k goes back, with the weights of the moving average; 1: the newest alone

    M_l has a column for every output vector and example: K = window · V · N of them. A factorisation costs K³/3 and a
    Gram matrix; the state is the rows themselves, so a few vectors (`monte_carlo`) on some hundred examples are its
    place. Moments of halves of a batch are not averaged: their rows stand side by side, so that `measure=` of
    `value_grad_and_stats` is refused. `split` has no meaning; λ = 0 has no factorisation and counts as a failed one;
    float32 wants λ well above 1e-7 of the largest eigenvalue.

    Raises HyperparameterError for values without meaning; StateError without output vectors, and for batches of
    different sizes in a window of several. Source: Ren & Goldfarb 2019 (1906.02353); the heuristic: the code of
    Koroko et al. 2022 (2201.10285).

        >>> tx = kf.kfac(kf.curvature.blockwise(kf.curvature.block_diagonal(), kf.curvature.block_diagonal()))
        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> state.curvature.matrix["weight"].rows.left.shape
        torch.Size([1, 2, 5, 1, 2])
    """
    known_rule(rule)
    at_least(1, window=window)

    def prepare(block: Block) -> Pairs:
        return pairs(apart(block, "block_diagonal()"))

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> Window:
        return shifted(state, batch.ask(lambda rows: rows), fraction, window)

    def factorize(state: Window, damping: Tensor, split: str) -> Woodbury:
        del split
        return woodbury({"block": joined(*state)}, {"block": ruled(*state, damping, rule)})

    def solve(factored: Woodbury, v: Tensor) -> Tensor:
        return solve_woodbury(factored, {"block": v})["block"]

    def dense(state: Window) -> Tensor:
        m = columns(joined(*state)).mT
        return m @ m.mT

    name = f"block_diagonal[{rule}, window={window}]"
    return Structure(name, sizes, factorize, solve, dense, prepare=prepare, absorb=absorb)
