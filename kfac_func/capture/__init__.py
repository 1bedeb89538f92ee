"""Capture: find the uses of parameters in a pure function and record them in one forward pass."""

from kfac_func.capture.coverage import Policy as Policy
from kfac_func.capture.coverage import Unclaimed as Unclaimed
from kfac_func.capture.examples import batch_size as batch_size
from kfac_func.capture.examples import check_examples as check_examples
from kfac_func.capture.examples import rereadable as rereadable
from kfac_func.capture.functional import make_functional as make_functional
from kfac_func.capture.plan import Plan as Plan
from kfac_func.capture.plan import make_plan as make_plan
from kfac_func.capture.planner import Planner as Planner
from kfac_func.capture.planner import planner as planner
from kfac_func.capture.record import Record as Record
from kfac_func.capture.record import record as record
