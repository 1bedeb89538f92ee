"""From a seed to a case: a model, its batch, a loss and options, with the names of everything that was drawn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_func as kf
from tests.fuzz.bodies import Body, Fn, NoParameters, cast, module_body, raw_body
from tests.fuzz.described import described
from tests.fuzz.draw import Draw
from tests.fuzz.losses import drawn
from tests.fuzz.trees import INPUT_LAYOUTS, flat, laid_out, mapped

LEAVES = 400  # numbers in the parameters, at most


class Problem(NamedTuple):
    """Something to differentiate: `fn` for the library, `plain` for torch."""

    fn: Fn
    plain: Fn
    params: Any
    inputs: Any
    targets: Tensor
    loss: kf.losses.Loss
    value: Callable[[Tensor, Tensor], Tensor]
    pair: Callable[[Any], Any] = tuple

    @property
    def batch(self) -> Any:
        return self.pair((self.inputs, self.targets))


class Case(NamedTuple):
    """A problem in its dtype and layout; `wide` is the same one in float64.

    options    of `value_grad_and_stats`: policies for parameters that no kind sees
    """

    seed: int
    names: tuple[str, ...]
    hostile: bool
    traits: frozenset[str]
    examples: int
    dtype: torch.dtype
    problem: Problem
    wide: Callable[[], Problem]
    options: dict[str, Any]


DTYPES = {torch.float64: 7.0, torch.float32: 1.5, torch.bfloat16: 0.4, torch.float16: 0.4}
POLICIES: tuple[tuple[dict[str, Any], float], ...] = (
    ({}, 6.0), ({"unclaimed": "diagonal"}, 1.5), ({"unclaimed": "identity"}, 1.0), ({"strict": False}, 1.0),
)  # fmt: skip


def case(seed: int, hostile: bool) -> Case:
    """The case of a seed. With `hostile`, one construct that a tape cannot see or that mixes examples is inside."""
    d = Draw(seed)
    d.n = d.weighted({1: 0.6, 2: 1.5, 3: 2.5, 4: 2.5, 5: 1.5})
    body = _body(d, hostile)
    dtype = d.weighted(DTYPES)
    one = drawn(d, (d.n, *body.shape))
    said, describe = described(d, body)
    pair: Callable[[Any], Any] = d.pick(tuple, tuple, tuple, list)
    names = [*body.names, *said, *(["batch: list"] if pair is list else [])]
    layout = d.weighted({"": 6.0} | dict.fromkeys(INPUT_LAYOUTS, 0.5))
    if any("norm" in name for name in names) and layout == "channels last":  # torch's group norm dies of it
        layout = ""
    x = INPUT_LAYOUTS[layout](body.x) if layout else body.x
    names += [f"inputs {layout}"] if layout else []

    def problem(at: torch.dtype) -> Problem:
        def rounded(tensor: Tensor) -> Tensor:
            return cast(cast(tensor, dtype), at)

        fn, plain, params = body.at(at)
        extras = {k: rounded(v) for k, v in body.extras.items()}
        inputs = body.container.pack(rounded(x), extras)
        fn = describe(fn, inputs, [extras[k] for k in body.whole])
        params = mapped(params, rounded)
        return Problem(fn, plain, params, inputs, rounded(one.targets), one.make(at), one.value, pair)

    given = problem(dtype)
    name, params = laid_out(d, given.params)
    policy = POLICIES[d.weighted({k: often for k, (_, often) in enumerate(POLICIES)})][0]
    policy = policy or ({"sharing": "reduce"} if d.chance(0.1) else {})
    names += [one.name, f"N = {d.n}" if d.n < 3 else "", str(dtype)[6:] if dtype != torch.float64 else "", name]
    names += [f"{key}={value}" for key, value in policy.items()]
    rough = frozenset() if dtype in (torch.float64, torch.float32) else frozenset({"half"})
    return Case(
        seed, tuple(filter(None, names)), hostile, body.traits | rough, d.n, dtype,
        given._replace(params=params), partial(problem, torch.float64), policy,
    )  # fmt: skip


def _body(d: Draw, hostile: bool) -> Body:
    """A model that is not too large."""
    while True:
        try:
            body = (module_body if d.chance(0.25) else raw_body)(d, hostile)
        except NoParameters:
            continue
        if sum(leaf.numel() for leaf in flat(body.at(torch.float64)[2]).values()) <= LEAVES:
            return body
