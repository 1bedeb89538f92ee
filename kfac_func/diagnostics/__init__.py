"""Diagnostics: what to look at while training, and what a state says about the curvature. Metrics are pure functions;
plots return figures.
"""

from kfac_func.diagnostics.figures import cosine_plot as cosine_plot
from kfac_func.diagnostics.figures import density_plot as density_plot
from kfac_func.diagnostics.figures import factor_heatmaps as factor_heatmaps
from kfac_func.diagnostics.figures import spectrum_plot as spectrum_plot
from kfac_func.diagnostics.parts import Parts as Parts
from kfac_func.diagnostics.parts import cosine as cosine
from kfac_func.diagnostics.parts import fisher_norms as fisher_norms
from kfac_func.diagnostics.parts import norm_ratio as norm_ratio
from kfac_func.diagnostics.parts import norms as norms
from kfac_func.diagnostics.parts import trace_ratio as trace_ratio
from kfac_func.diagnostics.plots import History as History
from kfac_func.diagnostics.plots import loss_curves as loss_curves
from kfac_func.diagnostics.states import Condition as Condition
from kfac_func.diagnostics.states import Dead as Dead
from kfac_func.diagnostics.states import Factors as Factors
from kfac_func.diagnostics.states import Spectrum as Spectrum
from kfac_func.diagnostics.states import condition_numbers as condition_numbers
from kfac_func.diagnostics.states import damping as damping
from kfac_func.diagnostics.states import dead_units as dead_units
from kfac_func.diagnostics.states import ekfac_gain as ekfac_gain
from kfac_func.diagnostics.states import factors as factors
from kfac_func.diagnostics.states import pi as pi
from kfac_func.diagnostics.states import spectra as spectra
from kfac_func.diagnostics.states import traces as traces
from kfac_func.diagnostics.steps import Summary as Summary
from kfac_func.diagnostics.steps import flat as flat
from kfac_func.diagnostics.steps import summary as summary
from kfac_func.diagnostics.steps import table as table
