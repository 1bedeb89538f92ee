"""Gradient transformations: pure functions that turn gradients into updates, and chains of them.

The names are those of optax. Schedules live in their own namespace: `transforms.schedules.cosine_decay(...)`.
"""

from __future__ import annotations

from kfac_func.transforms import schedules as schedules
from kfac_func.transforms.base import CountState as CountState
from kfac_func.transforms.base import EmptyState as EmptyState
from kfac_func.transforms.base import GradientTransformation as GradientTransformation
from kfac_func.transforms.base import apply_updates as apply_updates
from kfac_func.transforms.base import identity as identity
from kfac_func.transforms.base import stateless as stateless
from kfac_func.transforms.combine import chain as chain
from kfac_func.transforms.combine import named_chain as named_chain
from kfac_func.transforms.constraints import add_decayed_weights as add_decayed_weights
from kfac_func.transforms.constraints import clip_by_global_norm as clip_by_global_norm
from kfac_func.transforms.constraints import global_norm as global_norm
from kfac_func.transforms.moments import ScaleByAdamState as ScaleByAdamState
from kfac_func.transforms.moments import TraceState as TraceState
from kfac_func.transforms.moments import scale_by_adam as scale_by_adam
from kfac_func.transforms.moments import trace as trace
from kfac_func.transforms.optimizers import adam as adam
from kfac_func.transforms.optimizers import adamw as adamw
from kfac_func.transforms.optimizers import sgd as sgd
from kfac_func.transforms.scaling import scale as scale
from kfac_func.transforms.scaling import scale_by_learning_rate as scale_by_learning_rate
from kfac_func.transforms.scaling import scale_by_schedule as scale_by_schedule
