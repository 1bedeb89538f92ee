"""Diagnostics: what to look at while training."""

from kfac_func.diagnostics.plots import History as History
from kfac_func.diagnostics.plots import loss_curves as loss_curves
