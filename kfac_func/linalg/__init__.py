"""Linear algebra on factors, and on operators that are never formed."""

from kfac_func.linalg.kron import kron as kron
from kfac_func.linalg.krylov import Operator as Operator
from kfac_func.linalg.krylov import Triplet as Triplet
from kfac_func.linalg.krylov import deflated as deflated
from kfac_func.linalg.krylov import golub_kahan as golub_kahan
from kfac_func.linalg.krylov import power as power
from kfac_func.linalg.krylov import start_matrix as start_matrix
from kfac_func.linalg.krylov import two_term as two_term
from kfac_func.linalg.psd import Solver as Solver
from kfac_func.linalg.psd import damped_inverse as damped_inverse
from kfac_func.linalg.psd import eigenbasis as eigenbasis
from kfac_func.linalg.psd import times as times
from kfac_func.linalg.rotation import refreshed_basis as refreshed_basis
from kfac_func.linalg.spectral import Spectral as Spectral
from kfac_func.linalg.spectral import decomposed as decomposed
from kfac_func.linalg.spectral import elementwise as elementwise
