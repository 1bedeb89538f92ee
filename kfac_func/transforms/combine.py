r"""Transformations made of transformations: the updates of each member are what the next one gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kfac_func._errors import HyperparameterError, StateError, explain
from kfac_func._tracing import settled
from kfac_func._tree import tree_map
from kfac_func._typing import PyTree
from kfac_func.transforms.base import GradientTransformation, identity
from kfac_func.transforms.keywords import Names, lenient, named, strict, together
from kfac_func.transforms.trail import Trail


def chain(*members: Any) -> GradientTransformation:
    r"""Apply transformations one after the other:  u' = (f_n ∘ ... ∘ f_1)(u).

    A member is a GradientTransformation, a chain, or a foreign pair `(init, update)` such as a torchopt transformation
    or an optax-strict one, whose `update(updates, state, params=None)` knows nothing more. Each is passed those
    keywords (`params`, `stats`, `inplace=False`, extras) that its signature accepts, read once, here; a third
    positional argument under any other name is taken to be the params. A keyword that no member names is refused, as it
    would be lost; the `**` of a foreign function takes any, that of a GradientTransformation stands for the keywords of
    others. The state is the tuple of the members' states. The extra `trail` tells members what entered the chain and
    what its preconditioner was given (see `Trail`).

    Members of the class GradientTransformation promise fresh updates. As others do not (momentum in torchopt returns
    its own trace), their updates are copied when they come last.
    Raises HyperparameterError for a member that is no transformation, StateError for a state that is not of this chain,
    KeywordError for a keyword that no member takes.     Source: optax.chain.

    >>> import torch
    >>> double = (lambda params: (), lambda updates, state, params=None: (2 * updates, state))
    >>> tx = chain(double, identity())
    >>> updates, state = tx.update(torch.ones(2), tx.init(torch.ones(2)))
    >>> updates.tolist(), state
    ([2.0, 2.0], ((), EmptyState()))
    """
    tx = linked(*members)
    return tx._replace(update=strict(tx.update))


def linked(*members: Any) -> GradientTransformation:
    """A chain that may be called with every keyword."""
    links = [_link(member, f"member {index}") for index, member in enumerate(members)]
    copy = not links or not isinstance(members[-1], GradientTransformation)

    def init(params: PyTree) -> tuple[PyTree, ...]:
        return tuple(link.init(params) for link in links)

    def update(updates, state, params=None, *, stats=None, inplace=False, **extra):
        del inplace
        if not isinstance(state, tuple) or len(state) != len(links):
            raise StateError(_foreign_state(state, f"the tuple of {len(links)} states that init returned"))
        own = None if params is None else tree_map(settled, params)
        options = {"trail": Trail(updates), **extra, "params": own, "stats": stats, "inplace": False}
        states = []
        for link, old in zip(links, state, strict=True):
            updates, new = link.update(updates, old, options)
            states.append(new)
        if copy:
            updates, _ = identity().update(updates, ())
        return updates, tuple(states)

    return GradientTransformation(init, lenient(update, together(*(link.takes for link in links))))


def named_chain(*pairs: Any) -> GradientTransformation:
    r"""A chain whose state is a dictionary: pairs `(name, transformation)`, states found by name.

    Raises what `chain` raises, and HyperparameterError when a pair is no pair or two names are the same.
    Source: optax.named_chain.

    >>> tx = named_chain(("first", identity()), ("second", identity()))
    >>> tx.init({})
    {'first': EmptyState(), 'second': EmptyState()}
    """
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise HyperparameterError(
                explain("named_chain cannot use a member.", got=repr(pair), wanted="a pair (name, transformation)")
            )
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise HyperparameterError(
            explain("two members of a chain have the same name.", got=names, wanted="unique names")
        )
    inner = linked(*(member for _, member in pairs))

    def init(params: PyTree) -> dict[str, PyTree]:
        return dict(zip(names, inner.init(params), strict=True))

    def update(updates, state, params=None, *, stats=None, inplace=False, **extra):
        if not isinstance(state, dict) or set(state) != set(names):
            raise StateError(_foreign_state(state, f"the dictionary with keys {names} that init returned"))
        states = tuple(state[name] for name in names)
        updates, states = inner.update(updates, states, params, stats=stats, inplace=inplace, **extra)
        return updates, dict(zip(names, states, strict=True))

    return GradientTransformation(init, strict(update, inner.update))


def _foreign_state(state: Any, wanted: str) -> str:
    size = f" of length {len(state)}" if isinstance(state, (tuple, list, dict)) else ""
    return explain(
        "the state does not belong to this chain.",
        got=f"a {type(state).__name__}{size}",
        wanted=wanted,
        options="call init again when the members of a chain change",
    )


class _Link(NamedTuple):
    """A member as the chain calls it, `update(updates, state, options)`, and the keywords that it takes."""

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, dict[str, Any]], tuple[PyTree, PyTree]]
    takes: Names


def _pair(member: Any) -> GradientTransformation:
    return GradientTransformation(member.init, member.update)


def _link(member: Any, where: str) -> _Link:
    own = isinstance(member, GradientTransformation)
    if isinstance(member, tuple) and hasattr(member, "init") and hasattr(member, "update"):
        member = _pair(member)
    if not (isinstance(member, tuple) and len(member) == 2 and all(callable(part) for part in member)):
        raise HyperparameterError(
            explain(
                f"{where} of the chain is no transformation.",
                got=repr(member),
                wanted="a pair (init, update) of functions, such as sgd(0.1)",
                options="call the constructor; unpack a list: chain(*members)",
            )
        )
    init, update = member
    if torch.compiler.is_compiling() and isinstance(member, GradientTransformation):  # Dynamo reads no signatures
        return _Link(init, lambda updates, state, options: update(updates, state, **options), None)
    positional, accepts = _accepted(update, where)

    def call(updates: PyTree, state: PyTree, options: dict[str, Any]) -> tuple[PyTree, PyTree]:
        keywords = {name: value for name, value in options.items() if accepts(name)}
        if positional:
            return update(updates, state, options["params"], **keywords)
        return update(updates, state, **keywords)

    return _Link(init, call, named(update, own))


_KEYWORD = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _accepted(update: Callable[..., Any], where: str) -> tuple[bool, Callable[[str], bool]]:
    """Whether params go in by position, and which keywords may be passed."""
    try:
        signature = inspect.signature(update)
        signature.bind_partial(None, None)
    except (TypeError, ValueError) as error:
        raise HyperparameterError(
            explain(
                f"the update function of {where} of the chain cannot be called.",
                got=str(error),
                wanted="update(updates, state, params=None, ...)",
            )
        ) from error
    parameters = list(signature.parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    anything = inspect.Parameter.VAR_KEYWORD in kinds
    keywords = {p.name for p in parameters[2:] if p.kind in _KEYWORD}
    third = next((p.name for p in parameters[2:3] if p.kind in _POSITIONAL), None)
    only_stars = inspect.Parameter.VAR_POSITIONAL in kinds and not anything and not keywords
    positional = only_stars or ("params" not in keywords and third not in (None, "stats", "inplace"))
    taken = {third, "params"} if positional else set()
    return positional, lambda name: name not in taken and (anything or name in keywords)
