"""Whether the tape sees all that a model does, on any batch."""

from __future__ import annotations

from typing import Any

from kfac_func import _tree
from kfac_func._errors import explain
from kfac_func._typing import Model, PyTree
from kfac_func.capture import Plan, Unclaimed, make_plan, proven, same_draws


def assert_captured(
    fn: Model, params: PyTree, inputs: Any, *, unclaimed: Unclaimed | None = None, mixing: bool = False
) -> Plan:
    """Raise AssertionError unless the tape gives the gradient of every parameter on this batch, and the output of an
    example has no gradient in the rows of another. Returns the plan.

    `make_plan` proves the same on two and three examples of one batch. What a model does can depend on its values (rows
    that it selects, an order, an expert that takes no one), so try batches of all kinds that there are.

    unclaimed   policies of leaves without a kind, as in `make_plan`
    mixing      let examples see each other (batch statistics)

    Costs a forward pass and three backward passes on the batch, and the plan. Raises further what `make_plan` raises.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> plan = kf.testing.assert_captured(fn, params, torch.randn(5, 3))
        >>> sorted(plan.claimed)
        ['bias', 'weight']
    """
    plan = make_plan(fn, params, inputs, unclaimed=unclaimed)
    with same_draws(_tree.leaves(params)) as again:
        found = proven(fn, plan, params, (inputs,), again)
    for path, why in found.hidden.items():
        raise AssertionError(
            explain(
                f"the gradient of parameter {path!r} on the tape is not that of torch.func.vjp on this batch.",
                why=", ".join(why),
                options=f"unclaimed={{{path!r}: 'diagonal'}}",
            )
        )
    seen = found.crossed or plan.mixing
    if seen and not mixing:
        raise AssertionError(
            explain(
                "the examples of the batch see each other.",
                why=seen,
                options="assert_captured(..., mixing=True), where K-FAC is all that is wanted",
            )
        )
    return plan
