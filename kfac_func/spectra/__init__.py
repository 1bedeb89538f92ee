"""Spectra of symmetric operators on parameter trees, from their products alone."""

from kfac_func.linalg.randomized import Estimate as Estimate
from kfac_func.spectra.krylov import Eigenpairs as Eigenpairs
from kfac_func.spectra.krylov import Lanczos as Lanczos
from kfac_func.spectra.krylov import lanczos as lanczos
from kfac_func.spectra.krylov import top_eigenpairs as top_eigenpairs
from kfac_func.spectra.quadrature import SpectralDensity as SpectralDensity
from kfac_func.spectra.quadrature import log_determinant as log_determinant
from kfac_func.spectra.quadrature import spectral_density as spectral_density
from kfac_func.spectra.quadrature import trace_of as trace_of
from kfac_func.spectra.traces import diagonal as diagonal
from kfac_func.spectra.traces import trace as trace
