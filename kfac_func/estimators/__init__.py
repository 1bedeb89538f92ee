"""Estimators: sources of output vectors, and the step that turns them into statistics."""

from kfac_func.estimators import storing as storing
from kfac_func.estimators.statistics import Stats as Stats
from kfac_func.estimators.statistics import value_grad_and_stats as value_grad_and_stats
from kfac_func.estimators.vectors import Estimator as Estimator
from kfac_func.estimators.vectors import curvature_prop as curvature_prop
from kfac_func.estimators.vectors import empirical as empirical
from kfac_func.estimators.vectors import exact as exact
from kfac_func.estimators.vectors import forward_only as forward_only
from kfac_func.estimators.vectors import monte_carlo as monte_carlo
