"""Gradient transformations: pure functions that turn gradients into updates, and chains of them.

The names are those of optax. Schedules live in their own namespace: `transforms.schedules.cosine_decay(...)`.
"""

from __future__ import annotations

from kfac_func.transforms import schedules as schedules
from kfac_func.transforms.averaging import AverageParamsState as AverageParamsState
from kfac_func.transforms.averaging import EmaState as EmaState
from kfac_func.transforms.averaging import average_params as average_params
from kfac_func.transforms.averaging import averaged_params as averaged_params
from kfac_func.transforms.averaging import ema as ema
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
from kfac_func.transforms.hyperparameters import InjectHyperparamsState as InjectHyperparamsState
from kfac_func.transforms.hyperparameters import inject_hyperparams as inject_hyperparams
from kfac_func.transforms.masking import MaskedState as MaskedState
from kfac_func.transforms.masking import PartitionState as PartitionState
from kfac_func.transforms.masking import masked as masked
from kfac_func.transforms.masking import partition as partition
from kfac_func.transforms.masks import Mask as Mask
from kfac_func.transforms.masks import selected as selected
from kfac_func.transforms.moments import ScaleByAdamState as ScaleByAdamState
from kfac_func.transforms.moments import TraceState as TraceState
from kfac_func.transforms.moments import scale_by_adam as scale_by_adam
from kfac_func.transforms.moments import trace as trace
from kfac_func.transforms.norms import ClipByKLState as ClipByKLState
from kfac_func.transforms.norms import FisherNormState as FisherNormState
from kfac_func.transforms.norms import clip_by_kl as clip_by_kl
from kfac_func.transforms.norms import normalize_by_fisher_norm as normalize_by_fisher_norm
from kfac_func.transforms.optimizers import adam as adam
from kfac_func.transforms.optimizers import adamw as adamw
from kfac_func.transforms.optimizers import sgd as sgd
from kfac_func.transforms.plateau import ReduceLROnPlateauState as ReduceLROnPlateauState
from kfac_func.transforms.plateau import reduce_on_plateau as reduce_on_plateau
from kfac_func.transforms.reading import tree_get as tree_get
from kfac_func.transforms.reading import tree_set as tree_set
from kfac_func.transforms.scaling import scale as scale
from kfac_func.transforms.scaling import scale_by_learning_rate as scale_by_learning_rate
from kfac_func.transforms.scaling import scale_by_schedule as scale_by_schedule
from kfac_func.transforms.trail import Trail as Trail
from kfac_func.transforms.trail import tree_vdot as tree_vdot
from kfac_func.transforms.wrappers import ApplyIfFiniteState as ApplyIfFiniteState
from kfac_func.transforms.wrappers import MultiStepsState as MultiStepsState
from kfac_func.transforms.wrappers import apply_if_finite as apply_if_finite
from kfac_func.transforms.wrappers import multi_steps as multi_steps
