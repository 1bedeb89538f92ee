r"""KPSVD: the Kronecker product that is nearest to the exact block.

    min ‖F − S ⊗ R‖        R = √σ Û,  S = √σ V̂,  (σ, Û, V̂) the leading singular triplet of the rearranged F

It is never further from F than K-FAC, and positive semi-definite as F is. Source: Koroko et al. 2022 (2201.10285),
§3.1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_func._errors import HyperparameterError, at_least, explain
from kfac_func.blocks import Block
from kfac_func.blocks.rearranged import output_moment, rearranged
from kfac_func.curvature.base import Batch, Structure
from kfac_func.damping import damped_product, product_spectrum, solve_product
from kfac_func.linalg import Solver, Spectral
from kfac_func.linalg.krylov import power
from kfac_func.linalg.sums import Terms, averaged, changed, densified, positive, terms_of, warm


def kpsvd(
    solver: Solver = "cholesky", *, iterations: int = 10, tolerance: float = 1e-3, radius: int | None = None
) -> Structure:
    r"""The best Kronecker product of the averaged block, damped as `split` says, like K-FAC with T = 1.

        Z V̂ = Σ_m V_mᵀ V̂ V_m,    Zᵀ Û = Σ_m V_m Û V_mᵀ,    V̂ ← ZᵀZ V̂ / ‖·‖        S ⊗ R = σ V̂ ⊗ Û

    solver       how factors of "pi" and "none" are inverted: "cholesky" (fast) or "eigh" (negative eigenvalues are cut
                 at 0)
    iterations   power steps of a batch at most; each sees the batch twice. The first batch starts at the second moment
                 of the output gradients, later ones at the S of before
    tolerance    the change of the unit V̂ in a step that ends them
    radius       for convolutions: pairs of positions further apart than this on the map (in any of its dimensions), or
                 on different images, are left out; 0 keeps each position with itself only, None keeps all pairs. With
                 0 < radius the rest of F may be indefinite: negative eigenvalues of R and S are cut at 0 before solving

    The state is the best product of (1 − fraction) · S ⊗ R + fraction · F with the batch's F, so that the first batch
    gives its own and a constant stream keeps it. R [(q), i, i] and S [(q), o, o] are the whole block, no factor T, and
    dense: choose another structure for an embedding of very many tokens. Needs output vectors. Raises
    HyperparameterError for values without meaning. Source: Koroko et al. 2022 (2201.10285), §3.1; radius: §4.

        >>> tx = kf.kfac(kf.curvature.kpsvd(), damping=1e-2)
        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> step = kf.value_grad_and_stats(fn, kf.losses.mse(), estimator=kf.estimators.exact())
        >>> _, grads, stats = step(params, (torch.ones(5, 3), torch.zeros(5, 2)))
        >>> _, state = tx.update(grads, tx.init(params), params, stats=stats)
        >>> state.curvature.matrix["weight"].r.shape
        torch.Size([1, 4, 4])
    """
    if solver not in ("cholesky", "eigh"):
        raise HyperparameterError(explain("unknown solver.", got=repr(solver), wanted="'cholesky' or 'eigh'"))
    at_least(1, iterations=iterations)
    at_least(0, radius=radius)

    def prepare(block: Block) -> Any:
        return rearranged(block, radius)

    def absorb(state: Any, batch: Batch, fraction: Tensor) -> Terms:
        start = warm(None if state == () else state.s[0], batch.first)
        found = power(*averaged(state, batch.ask, fraction), start, iterations, tolerance)
        return changed(state, terms_of([found]), fraction)

    def factorize(state: Terms, damping: Tensor, split: str) -> Any:
        r, s = (x[0] if radius is None else positive(x[0]) for x in state)
        return damped_product(r, s, r.new_ones(()), damping, split, solver)

    def spectrum(state: Terms, damping: Tensor, split: str) -> Spectral:
        r, s = (x[0] for x in state)
        return product_spectrum(r, s, r.new_ones(()), damping, split)

    name = f"kpsvd[{solver}]" if radius is None else f"kpsvd[{solver}, radius={radius}]"
    every = output_moment, factorize, solve_product, densified, True, prepare, absorb
    return Structure(name, *every, thin=True, spectrum=spectrum)
