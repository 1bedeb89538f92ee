"""Losses with their curvature: values as torch.nn.functional's, and the vectors that estimators need.

A likelihood only says what its unit term is (`base.Family`); reductions, weights, columns and random signs are
common. Adding one is one file here, one line below and one row in the contract tests.
"""

from kfac_func.losses.base import Loss as Loss
from kfac_func.losses.base import example_weight as example_weight
from kfac_func.losses.bernoulli import bce_with_logits as bce_with_logits
from kfac_func.losses.categorical import cross_entropy as cross_entropy
from kfac_func.losses.checked import checked_loss as checked_loss
from kfac_func.losses.gaussian import mse as mse
