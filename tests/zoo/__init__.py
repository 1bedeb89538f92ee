"""Small float64 nets, batches and losses, every one of them asserted informative by `test_informative`."""

from tests.zoo.cases import CASES as CASES
from tests.zoo.cases import Case as Case
from tests.zoo.cases import functional as functional
from tests.zoo.cases import randn as randn
from tests.zoo.cases import subset as subset
from tests.zoo.run import absorbed as absorbed
from tests.zoo.run import batch_of as batch_of
from tests.zoo.run import close as close
from tests.zoo.run import curvature_of as curvature_of
from tests.zoo.run import dense_block as dense_block
from tests.zoo.run import direction as direction
from tests.zoo.run import kronecker_block as kronecker_block
from tests.zoo.run import measured as measured
from tests.zoo.run import outer as outer
from tests.zoo.run import run as run
from tests.zoo.run import vectors as vectors
from tests.zoo.shared import position_case as position_case
from tests.zoo.shared import unclaimed_case as unclaimed_case
