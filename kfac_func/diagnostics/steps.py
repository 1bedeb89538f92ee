"""The usual numbers of a K-FAC run at one step, for a log, a table or a plot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_func import _tree
from kfac_func._tree import storable
from kfac_func._typing import PyTree
from kfac_func.diagnostics.parts import Parts, cosine, lengths, norm_ratio, norms
from kfac_func.diagnostics.states import condition, coupled, damping, eigenvalues, pi
from kfac_func.operators import linear_operator
from kfac_func.state import observed_one


class Summary(NamedTuple):
    """One step in numbers, all tensors: 0-dim, and with a leading dimension over stacked states.

    step, observed, rejected, failed    as in `KFacState`: updates; batches seen, left out; factorisations left out
    damping     λ_l by block               pi      π by block (of a grouped layer the mean over its groups)
    condition   λ_max/λ_min by block, damped        trace   tr F̂ by block, undamped
    params, grads, updates    ‖·‖ in all and by block           ratio   ‖updates‖/‖params‖
    cosine      of updates and gradients   fisher  √(uᵀF̂u) of the updates

    A part that was not asked for, or that the curvature has not, is () or an empty dictionary.
    """

    step: Tensor
    observed: Tensor
    rejected: Tensor
    failed: Tensor
    damping: dict[str, Tensor]
    pi: dict[str, Tensor]
    condition: dict[str, Tensor]
    trace: dict[str, Tensor]
    params: Parts
    grads: Any = ()
    updates: Any = ()
    ratio: Any = ()
    cosine: Any = ()
    fisher: Any = ()


storable(Summary)


def summary(state: PyTree, params: PyTree, grads: PyTree | None = None, updates: PyTree | None = None) -> Summary:
    r"""The usual numbers of a step. All factors are decomposed twice (those of `eigen` are not), so take one every so
    many steps.

        ‖θ‖, ‖g‖, ‖u‖, ‖u‖/‖θ‖, cos(u, g), √(uᵀF̂u);  λ_l, π, λ_max/λ_min, tr F̂ by block;  steps, rejected batches

    state             a K-FAC state that has seen statistics, or any state with exactly one inside
    params            the parameters
    grads, updates    trees like them: the gradient of the step, and what was added to the parameters; None: left out

    Curvature between blocks (`full`, `two_level`) has no spectra: π, conditions, traces and the Fisher norm are left
    out there. Raises StateError before the first statistics, TreeMismatchError for trees that do not fit.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> batch = torch.eye(3), torch.zeros(3, 2)
        >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [batch], damping=0.5)
        >>> seen = kf.diagnostics.summary(state, params, grads=params)
        >>> seen.damping["weight"], sorted(seen.grads.parts)
        (tensor(0.5000, dtype=torch.float64), ['weight'])
    """
    one = observed_one(state)
    operator = None if coupled(one) else linear_operator(one, params, damping=0.0)
    both = grads is not None and updates is not None
    return Summary(
        step=one.step,
        observed=one.observed,
        rejected=one.rejected,
        failed=one.failed,
        damping=damping(one),
        pi={} if operator is None else {name: value.mean() for name, value in pi(one).items()},
        condition={} if operator is None else {n: condition(s) for n, s in eigenvalues(one, damped=True).items()},
        trace={} if operator is None else {name: operator.spectra[name].values.double().sum() for name in damping(one)},
        params=norms(params, one),
        grads=() if grads is None else norms(grads, one),
        updates=() if updates is None else norms(updates, one),
        ratio=() if updates is None else norm_ratio(updates, params, one),
        cosine=cosine(updates, grads, one) if both else (),
        fisher=() if updates is None or operator is None else lengths(operator, updates, one),
    )


def flat(summary: Summary) -> dict[str, Tensor]:
    """The numbers by dotted name, as loggers want them: "step", "damping.<block>", "grads.total" and so on.

    >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
    >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.eye(3), torch.zeros(3, 2))])
    >>> list(kf.diagnostics.flat(kf.diagnostics.summary(state, params)))[4:]
    ['damping.weight', 'pi.weight', 'condition.weight', 'trace.weight', 'params.total', 'params.parts.weight']
    """
    return {leaf.path: leaf.value for leaf in _tree.leaves_with_paths(summary)}


def table(summary: Summary) -> str:
    """A table with one row per block (and per leaf without one), and one of all; "-" where there is no such number.

    >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
    >>> state = kf.fit_curvature(fn, kf.losses.mse(), params, [(torch.eye(3), torch.zeros(3, 2))], damping=0.5)
    >>> print(kf.diagnostics.table(kf.diagnostics.summary(state, {k: torch.ones_like(v) for k, v in params.items()})))
    step 0, 1 batches observed, 0 rejected, 0 factorisations failed
    block   damping  pi    condition  trace  params
    weight  0.5      0.707 3.67       4      2.83
    all     -        -     -          4      2.83
    """
    columns = {name: value for name, value in summary._asdict().items() if isinstance(value, (Parts, dict)) and value}
    rows = [("block", *columns)]
    for part in summary.params.parts:
        rows.append((part, *(_number(_parts(column).get(part)) for column in columns.values())))
    totals = {name: value.total if isinstance(value, Parts) else None for name, value in columns.items()}
    if summary.trace:
        totals["trace"] = torch.stack(list(summary.trace.values())).sum()
    rows.append(("all", *(_number(total) for total in totals.values())))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    head = (
        f"step {int(summary.step)}, {int(summary.observed)} batches observed, {int(summary.rejected)} rejected, "
        f"{int(summary.failed)} factorisations failed"
    )
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *lines])


def _parts(column: Any) -> dict[str, Tensor]:
    return column.parts if isinstance(column, Parts) else column


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.3g}"
