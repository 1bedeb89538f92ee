"""Curvature becomes one link of a chain."""

from kfac_func.precondition.transform import observe as observe
from kfac_func.precondition.transform import precondition as precondition
from kfac_func.precondition.transform import preconditioner as preconditioner
