"""The table of checks: one function per promise."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz import checks_of_curvature as curvature
from tests.fuzz import checks_of_rows as rows
from tests.fuzz import checks_of_steps as steps
from tests.fuzz.looking import Look

CHECKS: dict[str, tuple[Callable[[Look], None], float]] = {
    "gradient": (steps.gradient, 0.0),  # of every case
    "gradient alone": (steps.gradient_alone, 0.3),
    "gradient of the step": (steps.gradient_of_step, 0.4),
    "updates": (steps.updates, 1.5),
    "diagonal": (curvature.diagonal, 1.0),
    "natural gradient": (curvature.natural, 1.0),
    "natural gradient by block": (curvature.natural_by_block, 0.7),
    "K-FAC of one example": (curvature.kronecker, 0.7),
    "fit_curvature": (curvature.fitted, 1.0),
    "per_example_grads": (rows.example_gradients, 1.0),
    "per_example_norms": (rows.example_norms, 0.6),
    "per_example_gram": (rows.example_gram, 0.6),
    "fisher_diagonal": (rows.fisher_diagonal, 0.6),
    "jacobian": (rows.jacobian, 0.6),
    "empirical_ntk": (rows.tangent_kernel, 0.6),
    "per_example_traces": (rows.traces, 0.4),
    "ggn_vp": (rows.gauss_newton_product, 0.6),
    "hvp": (rows.hessian_product, 0.6),
}
"""Every check with how often it is drawn."""
