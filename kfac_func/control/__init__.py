"""Step-size control: the quadratic model of the objective, the rate and momentum it likes, and damping by how well it
foretold the loss.
"""

from kfac_func.control.adapt import AdaptDampingState as AdaptDampingState
from kfac_func.control.adapt import Adaptive as Adaptive
from kfac_func.control.adapt import Proposal as Proposal
from kfac_func.control.adapt import adapt_damping as adapt_damping
from kfac_func.control.adapt import calibration as calibration
from kfac_func.control.levenberg import LevenbergMarquardt as LevenbergMarquardt
from kfac_func.control.levenberg import levenberg_marquardt as levenberg_marquardt
from kfac_func.control.quadratic_model import Form as Form
from kfac_func.control.quadratic_model import QuadraticModel as QuadraticModel
from kfac_func.control.quadratic_model import quadratic_model as quadratic_model
from kfac_func.control.quadratic_steps import QuadraticModelState as QuadraticModelState
from kfac_func.control.quadratic_steps import scale_by_quadratic_model as scale_by_quadratic_model
