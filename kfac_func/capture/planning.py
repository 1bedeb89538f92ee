"""From a model to its plan: runs on two and on three examples, and a proof.

The dimension of a use's output that grows is where its examples are. A use that does not grow (a position embedding of
`arange(T)`) is shared by all examples. What the tape cannot see, and what reaches from one example to another, is known
by its numbers (`proof`), not by its name.
"""

from __future__ import annotations

from typing import Any

import torch

from kfac_func import _tree, layers
from kfac_func._errors import CaptureError, explain
from kfac_func._typing import Model, PyTree
from kfac_func.blocks import Where
from kfac_func.capture.coverage import Policy, Unclaimed, check_policies, choose
from kfac_func.capture.discovery import checked_leaves, discovered, eagerly
from kfac_func.capture.draws import same_draws
from kfac_func.capture.examples import CHANGED, repeated, where_examples
from kfac_func.capture.grouping import group, owner, signature
from kfac_func.capture.locating import Located, located
from kfac_func.capture.plan import Plan, TapRule
from kfac_func.capture.proof import proven
from kfac_func.capture.tape import Watch
from kfac_func.layers import Found

APART = "an example's output depends on the other examples of the batch, or on their number"


def make_plan(
    fn: Model, params: PyTree, inputs: Any, *, strict: bool = True, unclaimed: Unclaimed | None = None
) -> Plan:
    """Find the uses of all parameters of `fn(params, inputs)`, and prove that nothing else uses them.

    strict      raise UncapturedParameterError for a parameter used where no layer kind can see it (False: leave it
                unpreconditioned)
    unclaimed   the policy "diagonal" or "identity" of such parameters: one for all, or by path or pattern {"head.*":
                "diagonal"}

    Costs some runs of the model on two and three examples of the batch, and a few backward passes there: the gradient
    from the rows of every use must be that of `torch.func.vjp` of the plain function, leaf by leaf, and what goes back
    from the output of one example must stay in its rows. Where it does not, `plan.mixing` says so, and per-example
    quantities refuse the model. Random number generators are left as they were. `kf.batched` says where the examples
    are when the inputs alone do not.

    Raises UncapturedParameterError, CaptureError for a use that cannot be captured exactly, BatchError for inputs
    without examples.

        >>> fn, params = kf.make_functional(torch.nn.Linear(3, 2))
        >>> [block.layout.kind for block in kf.make_plan(fn, params, torch.ones(5, 3)).blocks]
        ['linear']
    """
    policies = check_policies(unclaimed or {})
    if torch.compiler.is_compiling():
        raise CaptureError(
            explain(
                "a plan cannot be made under torch.compile.",
                why="it is proved by numbers, which a compiler does not have",
                options="take the first step outside of it; or pass plan=kf.make_plan(fn, params, inputs)",
            )
        )
    _tree.know(inputs)
    leaves = checked_leaves(params)
    with eagerly(), same_draws(leaves.values()) as again:
        found = located(fn, params, inputs, again)
        few = found.drawn[:1] if found.cut.whole else found.drawn[:2]
        runs = [again(lambda x=x: discovered(fn, params, leaves, x)) for x in few]
        if not _same_uses(*runs):  # by what was named they may differ: experts that nobody takes
            named = choose(tuple(leaves), {}, policies, strict)
            watched = {path: leaf for path, leaf in leaves.items() if path not in named}
            runs = [again(lambda x=x: discovered(fn, params, watched, x)) for x in few]
        if not _same_uses(*runs):
            raise CaptureError(_others())
        known, where = (
            runs[0].uncaptured(),
            [_where(*each, found) for each in zip(runs[0].found, runs[-1].found, strict=True)],
        )
        for use, at in zip(runs[0].found, where, strict=True):
            if isinstance(at, str):
                known.setdefault(owner(use), []).append(f"{use.kind.name}, {at}")
        while True:
            chosen = choose(tuple(leaves), known, policies, strict)
            plan = _plan(tuple(leaves), runs[0], where, chosen, found)
            hidden, crossed, mapped = proven(fn, plan, params, few, again)
            if not hidden:
                mixing = crossed or ("" if found.apart else APART)
                return plan._replace(mixing=mixing, crossed=bool(crossed), mapped=mapped)
            _again_hidden(hidden, chosen)
            known |= hidden


def _where(two: Found, three: Found, found: Located) -> Where | str | None:
    if not found.cut.whole:
        return where_examples(two, three)
    if not two.output.ndim or two.output.shape[0] != found.examples:
        return CHANGED if two.kind.name in ("scale", "shift") else None
    if two.kind.name in ("scale", "shift") and not repeated(two, 0):
        return CHANGED
    return Where(0, 1)


def _same_uses(one: Watch, *more: Watch) -> bool:
    uses = [[(f.kind, f.weight, f.bias) for f in watch.found] for watch in (one, *more)]
    return uses[0] == uses[-1]


def _others() -> str:
    return explain(
        "the model uses other parameters for two examples than for three.",
        why="what is recorded must not depend on the batch",
        options="make the control flow independent of the batch; or unclaimed={'…': 'diagonal'} for all that values "
        "choose among; or kf.batched(fn, whole=True)",
    )


def _plan(
    paths: tuple[str, ...],
    run: Watch,
    where: list[Where | str | None],
    chosen: dict[str, Policy],
    found: Located,
) -> Plan:
    """The plan of the uses of all leaves for which no policy was chosen. What no gradient of the outputs comes to (a
    branch that is detached at its end) is a constant: it is followed, and no use.
    """
    for use in run.found:  # a bias goes with its weight
        if use.bias is not None and use.weight is not None and use.weight.path in chosen:
            chosen.setdefault(use.bias.path, chosen[use.weight.path])
    taps: list[TapRule] = []
    uses: dict[int, tuple[Found, Where | None]] = {}
    for index, (use, at, marks) in enumerate(zip(run.found, where, run.written(), strict=True)):
        if owner(use) in chosen or isinstance(at, str):
            continue
        use = use._replace(bias=_unless(use.bias, chosen), positions=_positions(use, at, found))
        if index in run.reached:
            uses[len(taps)] = use, at
        taps.append(_tap_rule(use, at, *marks))
    blocks = tuple(group(uses))
    claimed = {path for block in blocks for path in block.layout.leaves}
    unused = tuple(path for path in paths if path not in claimed and path not in chosen)
    return Plan(paths, tuple(taps), blocks, tuple(chosen.items()), unused, found.cut)


def _positions(use: Found, where: Where | None, found: Located) -> int:
    """S, the rows of one example."""
    return use.positions if where is None else use.positions // (found.examples if found.cut.whole else 2)


def _tap_rule(found: Found, where: Where | None, input_written: bool, result_written: bool) -> TapRule:
    if input_written:
        raise CaptureError(
            explain(
                f"the input of {found.kind.name} with {owner(found)!r} is written in place after it was read.",
                why="its curvature and weight gradient need the values that the layer saw",
                options="write out of place: x = x + y, not x += y",
            )
        )
    out = found.output
    return TapRule(signature(found), owner(found), tuple(out.shape), where, out.dtype, out.device, result_written)


def _unless(ref: layers.Ref | None, chosen: dict[str, Policy]) -> layers.Ref | None:
    return None if ref is None or ref.path in chosen else ref


def _again_hidden(hidden: dict[str, list[str]], chosen: dict[str, Policy]) -> None:
    """Raise CaptureError when even the gradient by autograd is another one on the tape."""
    path = next((path for path in hidden if path in chosen), None)
    if path is not None:
        raise CaptureError(
            explain(
                f"the gradient of parameter {path!r} on the tape is not that of torch.func.vjp.",
                why="something in the model behaves in another way when the outputs of layers are watched",
                options="torch.func.grad for the gradient; kf.products with route='loop' for per-example quantities",
            )
        )
