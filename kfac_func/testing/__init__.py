"""Oracles for those who add layer kinds and structures, or want a dense truth: slow, and obviously right."""

from kfac_func.testing.captured import assert_captured as assert_captured
from kfac_func.testing.dense import dense_empirical_fisher as dense_empirical_fisher
from kfac_func.testing.dense import dense_fisher as dense_fisher
from kfac_func.testing.dense import dense_ggn as dense_ggn
from kfac_func.testing.dense import dense_hessian as dense_hessian
from kfac_func.testing.exactness import assert_exact as assert_exact
from kfac_func.testing.problem import block_indices as block_indices
from kfac_func.testing.problem import slices as slices
from kfac_func.testing.regimes import Regime as Regime
from kfac_func.testing.regimes import regime as regime
from kfac_func.testing.regimes import regimes as regimes
