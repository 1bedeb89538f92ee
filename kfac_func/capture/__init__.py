"""Capture: find the uses of parameters in a pure function and record them in one forward pass."""

from kfac_func.capture.batched import as_pair as as_pair
from kfac_func.capture.batched import batched as batched
from kfac_func.capture.batched import rules_of as rules_of
from kfac_func.capture.batched import tensor_of as tensor_of
from kfac_func.capture.coverage import Policy as Policy
from kfac_func.capture.coverage import Unclaimed as Unclaimed
from kfac_func.capture.discovery import plainly as plainly
from kfac_func.capture.discovery import spared as spared
from kfac_func.capture.draws import repeatable as repeatable
from kfac_func.capture.draws import same_draws as same_draws
from kfac_func.capture.examples import Cut as Cut
from kfac_func.capture.examples import check_examples as check_examples
from kfac_func.capture.examples import not_empty as not_empty
from kfac_func.capture.functional import make_functional as make_functional
from kfac_func.capture.loaders import rereadable as rereadable
from kfac_func.capture.plan import Plan as Plan
from kfac_func.capture.planner import Planner as Planner
from kfac_func.capture.planner import finder as finder
from kfac_func.capture.planner import planner as planner
from kfac_func.capture.planning import make_plan as make_plan
from kfac_func.capture.record import Record as Record
from kfac_func.capture.record import examples_of as examples_of
from kfac_func.capture.record import record as record
from kfac_func.capture.restricting import chosen_leaves as chosen_leaves
from kfac_func.capture.restricting import restricted as restricted
from kfac_func.capture.steady import steadied as steadied
