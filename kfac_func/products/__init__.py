"""Products with curvature matrices, and what every example says by itself."""

from kfac_func.products.curvature import Factor as Factor
from kfac_func.products.curvature import fisher_vp as fisher_vp
from kfac_func.products.curvature import ggn_factor as ggn_factor
from kfac_func.products.curvature import ggn_vp as ggn_vp
from kfac_func.products.curvature import hvp as hvp
from kfac_func.products.forms import fisher_forms as fisher_forms
from kfac_func.products.forms import fisher_rao_norm as fisher_rao_norm
from kfac_func.products.forms import kl_quadratic as kl_quadratic
from kfac_func.products.forms import quadratic_form as quadratic_form
from kfac_func.products.forms import quadratic_forms as quadratic_forms
from kfac_func.products.kernels import empirical_ntk as empirical_ntk
from kfac_func.products.kernels import per_example_gram as per_example_gram
from kfac_func.products.linear import jvp as jvp
from kfac_func.products.linear import vjp as vjp
from kfac_func.products.loader import accumulate as accumulate
from kfac_func.products.per_example import fisher_diagonal as fisher_diagonal
from kfac_func.products.per_example import jacobian as jacobian
from kfac_func.products.per_example import per_example_grads as per_example_grads
from kfac_func.products.per_example import per_example_norms as per_example_norms
from kfac_func.products.per_example import per_example_traces as per_example_traces
from kfac_func.products.scipy_view import as_scipy as as_scipy
