"""Linear algebra on factors."""

from kfac_func.linalg.kron import kron as kron
from kfac_func.linalg.psd import Solver as Solver
from kfac_func.linalg.psd import damped_inverse as damped_inverse
from kfac_func.linalg.psd import eigenbasis as eigenbasis
from kfac_func.linalg.psd import times as times
from kfac_func.linalg.rotation import refreshed_basis as refreshed_basis
