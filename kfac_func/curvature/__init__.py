"""Curvature structures: each a file on the same waist. A new structure is a file and a line here."""

from kfac_func.blocks import KroneckerState as KroneckerState
from kfac_func.curvature.base import Batch as Batch
from kfac_func.curvature.base import Curvature as Curvature
from kfac_func.curvature.base import Structure as Structure
from kfac_func.curvature.block_diagonal import block_diagonal as block_diagonal
from kfac_func.curvature.blockwise import blockwise as blockwise
from kfac_func.curvature.blockwise import by_path as by_path
from kfac_func.curvature.corrected import corrected as corrected
from kfac_func.curvature.deflation import deflation as deflation
from kfac_func.curvature.diagonal import DiagonalState as DiagonalState
from kfac_func.curvature.diagonal import diagonal as diagonal
from kfac_func.curvature.eigen import EigenState as EigenState
from kfac_func.curvature.eigen import eigen as eigen
from kfac_func.curvature.full import full as full
from kfac_func.curvature.identity import identity as identity
from kfac_func.curvature.inverse_free import inverse_free as inverse_free
from kfac_func.curvature.kpsvd import kpsvd as kpsvd
from kfac_func.curvature.kronecker import kronecker as kronecker
from kfac_func.curvature.lanczos import lanczos as lanczos
from kfac_func.curvature.two_level import two_level as two_level
