"""The waist between layer kinds and curvature structures (see `base`)."""

from kfac_func.blocks.base import Block as Block
from kfac_func.blocks.base import Diagonal as Diagonal
from kfac_func.blocks.base import Factor as Factor
from kfac_func.blocks.base import Kind as Kind
from kfac_func.blocks.base import Layout as Layout
from kfac_func.blocks.base import Moments as Moments
from kfac_func.blocks.base import Use as Use
from kfac_func.blocks.base import UseRule as UseRule
from kfac_func.blocks.base import Where as Where
from kfac_func.blocks.factors import add as add
from kfac_func.blocks.factors import balanced as balanced
from kfac_func.blocks.factors import mean_eigenvalue as mean_eigenvalue
from kfac_func.blocks.factors import scaled as scaled
from kfac_func.blocks.leaves import pack as pack
from kfac_func.blocks.leaves import unpack as unpack
from kfac_func.blocks.measures import gradient as gradient
from kfac_func.blocks.measures import kronecker_moments as kronecker_moments
from kfac_func.blocks.measures import per_example as per_example
from kfac_func.blocks.measures import squares as squares
from kfac_func.blocks.rows import input_rows as input_rows
from kfac_func.blocks.rows import output_rows as output_rows
from kfac_func.blocks.rows import second_moment as second_moment
from kfac_func.blocks.rows import with_constant as with_constant
