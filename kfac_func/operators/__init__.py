"""Curvature as a linear operator on the parameter tree."""

from kfac_func.operators.base import LinearOperator as LinearOperator
from kfac_func.operators.base import linear_operator as linear_operator
