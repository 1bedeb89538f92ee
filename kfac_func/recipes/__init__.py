"""Recipes: the settings of the house put together, for reading and copying."""

from kfac_func.recipes.auto import Auto as Auto
from kfac_func.recipes.auto import AutoInfo as AutoInfo
from kfac_func.recipes.auto import kfac_auto as kfac_auto
from kfac_func.recipes.reference import koroko as koroko
from kfac_func.recipes.reference import n_gao as n_gao
from kfac_func.recipes.reference import thrandis as thrandis
from kfac_func.recipes.reference import tselepidis as tselepidis
from kfac_func.recipes.structures import corrected as corrected
from kfac_func.recipes.structures import deflation as deflation
from kfac_func.recipes.structures import ekfac as ekfac
from kfac_func.recipes.structures import exact_natural_gradient as exact_natural_gradient
from kfac_func.recipes.structures import inverse_free as inverse_free
from kfac_func.recipes.structures import kfac as kfac
from kfac_func.recipes.structures import kpsvd as kpsvd
from kfac_func.recipes.structures import lanczos as lanczos
from kfac_func.recipes.structures import two_level_kfac as two_level_kfac
