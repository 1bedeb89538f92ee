"""Laplace posteriors: a Gaussian around a trained net, from its curvature.

    p(θ | data) ≈ N(θ*, P⁻¹),        P = N F̂ + τ I        θ* the trained parameters, τ the prior precision

`fit` looks at the data once; the evidence of a prior precision, predictions and draws then come from eigenvalues.
Sources: MacKay 1992 (A practical Bayesian framework for backpropagation networks); Ritter et al. 2018 (A scalable
Laplace approximation); Immer et al. 2021 (2008.08400, 2104.04975); Daxberger et al. 2021 (2106.14806).
"""

from kfac_func.laplace.evidence import log_marginal_likelihood as log_marginal_likelihood
from kfac_func.laplace.evidence import tune_prior_precision as tune_prior_precision
from kfac_func.laplace.fit import fit as fit
from kfac_func.laplace.posterior import Posterior as Posterior
from kfac_func.laplace.posterior import precision as precision
from kfac_func.laplace.posterior import with_prior as with_prior
from kfac_func.laplace.predict import Prediction as Prediction
from kfac_func.laplace.predict import functional_variance as functional_variance
from kfac_func.laplace.predict import observed as observed
from kfac_func.laplace.predict import predict as predict
from kfac_func.laplace.probabilities import probabilities as probabilities
from kfac_func.laplace.sample import sample as sample
from kfac_func.laplace.sample import sampled_predictive as sampled_predictive
