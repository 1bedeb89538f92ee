"""kfac_func: functional K-FAC for PyTorch. Verbs at the top, nouns in namespaces; this list is the whole public
surface.
"""

from kfac_func import _errors as errors
from kfac_func import curvature as curvature
from kfac_func import estimators as estimators
from kfac_func import losses as losses
from kfac_func.capture import Plan as Plan
from kfac_func.capture import make_functional as make_functional
from kfac_func.capture import make_plan as make_plan
from kfac_func.estimators import Stats as Stats
from kfac_func.estimators import value_grad_and_stats as value_grad_and_stats
from kfac_func.precondition import observe as observe
from kfac_func.precondition import precondition as precondition
from kfac_func.recipes import corrected as corrected
from kfac_func.recipes import deflation as deflation
from kfac_func.recipes import ekfac as ekfac
from kfac_func.recipes import exact_natural_gradient as exact_natural_gradient
from kfac_func.recipes import inverse_free as inverse_free
from kfac_func.recipes import kfac as kfac
from kfac_func.recipes import kpsvd as kpsvd
from kfac_func.recipes import lanczos as lanczos
from kfac_func.recipes import two_level_kfac as two_level_kfac
from kfac_func.state import KFacState as KFacState
from kfac_func.state import describe as describe
from kfac_func.transforms import GradientTransformation as GradientTransformation
from kfac_func.transforms import adam as adam
from kfac_func.transforms import adamw as adamw
from kfac_func.transforms import add_decayed_weights as add_decayed_weights
from kfac_func.transforms import apply_updates as apply_updates
from kfac_func.transforms import chain as chain
from kfac_func.transforms import clip_by_global_norm as clip_by_global_norm
from kfac_func.transforms import global_norm as global_norm
from kfac_func.transforms import identity as identity
from kfac_func.transforms import named_chain as named_chain
from kfac_func.transforms import scale as scale
from kfac_func.transforms import scale_by_learning_rate as scale_by_learning_rate
from kfac_func.transforms import scale_by_schedule as scale_by_schedule
from kfac_func.transforms import schedules as schedules
from kfac_func.transforms import sgd as sgd
from kfac_func.transforms import trace as trace
