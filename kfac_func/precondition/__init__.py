"""Curvature becomes one link of a chain."""

from kfac_func.precondition.fit import fit_curvature as fit_curvature
from kfac_func.precondition.norms import natural_gradient_norm as natural_gradient_norm
from kfac_func.precondition.transform import observe as observe
from kfac_func.precondition.transform import precondition as precondition
from kfac_func.precondition.transform import preconditioner as preconditioner
