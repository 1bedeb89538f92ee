"""What a chain passes to its members, and which members it takes."""

from __future__ import annotations

import functools

import pytest
import torch

from kfac_func._errors import HyperparameterError
from kfac_func._tree import leaves
from kfac_func.transforms import (
    add_decayed_weights,
    chain,
    identity,
    named_chain,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    sgd,
    trace,
)

PARAMS = {"w": torch.full((2,), 3.0), "b": torch.full((1,), 5.0)}
GRADS = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([4.0])}
CALL = {"params": PARAMS, "stats": "s", "inplace": True, "refresh": True}


def no_state(params):
    return ()


def takes_a_refresh(updates, state, *, refresh):
    return updates, state


def seen_by(update, seen):
    """What reaches a member written as `update`, which reports to the list `seen`."""
    tx = chain(chain((no_state, update)), (no_state, takes_a_refresh))
    tx.update(GRADS, tx.init(PARAMS), **CALL)
    return seen.pop()


def test_members_get_what_their_signature_accepts():
    seen, trails = [], []

    def report(updates, state, trail=None, **got):
        seen.append(got)
        trails.append(trail)
        return updates, state

    def nothing(updates, state):
        return report(updates, state)

    def strict(updates, state, params=None):
        return report(updates, state, params=params)

    def renamed(updates, state, p=None, *, stats=None):
        return report(updates, state, p=p, stats=stats)

    def renamed_open(updates, state, p, **kw):
        return report(updates, state, p=p, **kw)

    def positional(updates, state, params, /):
        return report(updates, state, params=params)

    def keywords(updates, state, *, params=None, inplace=True):
        return report(updates, state, params=params, inplace=inplace)

    def without_params(updates, state, stats=None):
        return report(updates, state, stats=stats)

    def late_params(updates, state, refresh=False, *, params=None):
        return report(updates, state, refresh=refresh, params=params)

    def picky(updates, state, params=None, *, refresh):
        return report(updates, state, params=params, refresh=refresh)

    def everything(updates, state, params=None, **kw):
        return report(updates, state, params=params, **kw)

    def stars(*args):
        return report(*args[:2], params=args[2])

    def open_stars(*args, **kw):
        return report(*args, **kw)

    params, all_of_it = {"params": PARAMS}, {**CALL, "inplace": False}
    table = {
        nothing: {},
        strict: params,
        renamed: {"p": PARAMS, "stats": "s"},
        renamed_open: {"p": PARAMS, "stats": "s", "inplace": False, "refresh": True},
        positional: params,
        keywords: {"params": PARAMS, "inplace": False},
        without_params: {"stats": "s"},
        late_params: {"params": PARAMS, "refresh": True},
        picky: {"params": PARAMS, "refresh": True},
        everything: all_of_it,
        stars: params,
        open_stars: all_of_it,
        functools.partial(keywords, inplace=True): {"params": PARAMS, "inplace": False},
    }
    for update, wanted in table.items():
        assert seen_by(update, seen) == wanted, update
    assert any(trail is not None and trail.gradient is GRADS for trail in trails)


def test_signatures_are_read_once():
    class Counting:
        reads = 0

        @property
        def __signature__(self):
            type(self).reads += 1
            return None

        def __call__(self, updates, state):
            return updates, state

    tx = chain((no_state, Counting()))
    assert Counting.reads > 0
    before, state = Counting.reads, tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(GRADS, state)
    assert Counting.reads == before


def test_members_apply_in_order_with_their_own_state():
    tx = chain(add_decayed_weights(1.0), chain(trace(0.5)), scale(10.0))
    state = tx.init(PARAMS)
    for wanted in (40.0, 60.0):
        updates, state = tx.update(GRADS, state, PARAMS)
        assert updates["w"][0].item() == wanted
    assert (len(state), len(state[1])) == (3, 1)
    assert state[1][0].trace["w"][0].item() == 6.0


def test_one_member_and_none():
    for tx in (chain(), chain(identity())):
        updates, state = tx.update(GRADS, tx.init(PARAMS))
        assert torch.equal(updates["w"], GRADS["w"])
        assert len(state) == len(tx.init(PARAMS))


def test_fresh_memory_whatever_the_last_member_does():
    alias = (no_state, lambda updates, state, params=None: (params, state))
    for tx in (chain(alias), chain(chain(scale(2.0), alias))):
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert torch.equal(updates["w"], PARAMS["w"])
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(leaves(updates), leaves(PARAMS), strict=True))


def test_named_chain_is_a_chain_with_names():
    members = (trace(0.9), scale_by_adam(), scale_by_learning_rate(lambda count: 0.1 / (1 + count)))
    plain, named = chain(*members), named_chain(*zip(("z", "a", "m"), members, strict=True))
    one, two = plain.init(PARAMS), named.init(PARAMS)
    for _ in range(3):
        left, one = plain.update(GRADS, one, PARAMS)
        right, two = named.update(GRADS, two, PARAMS)
        assert torch.equal(left["w"], right["w"])
    assert list(two) == ["z", "a", "m"]
    assert two["a"].step.item() == 3
    shuffled = {name: two[name] for name in sorted(two)}
    assert torch.equal(named.update(GRADS, shuffled)[0]["w"], named.update(GRADS, two)[0]["w"])


def test_named_chain_passes_extras():
    seen = []
    spy = (no_state, lambda updates, state, *, trail, **kw: (updates, seen.append(kw) or ()))
    tx = named_chain(("spy", spy))
    tx.update(GRADS, tx.init(PARAMS), **CALL)
    assert seen == [{**CALL, "inplace": False}]


NO_MEMBERS = {
    "a constructor": sgd,
    "a list of members": [sgd(0.1), sgd(0.1)],
    "a number": 0.1,
    "a triple": (no_state, no_state, no_state),
    "a pair of numbers": (1, 2),
    "an update of one argument": (no_state, lambda updates: updates),
    "an update without a signature": (no_state, dict),
}


@pytest.mark.parametrize("member", NO_MEMBERS.values(), ids=NO_MEMBERS)
def test_what_is_no_transformation_is_refused_by_position(member):
    with pytest.raises(HyperparameterError, match=r"member 1 (.|\n)*wanted"):
        chain(identity(), member)


NO_PAIRS = {
    "a bare transformation": ([sgd(0.1)], "pair"),
    "a nameless pair": ([(1, sgd(0.1))], "pair"),
    "a triple": ([("a", sgd(0.1), 1)], "pair"),
    "two equal names": ([("a", sgd(0.1)), ("a", sgd(0.2))], "same name"),
    "a name for nothing": ([("a", None)], "no transformation"),
}


@pytest.mark.parametrize(("pairs", "message"), NO_PAIRS.values(), ids=NO_PAIRS)
def test_named_chain_refuses(pairs, message):
    with pytest.raises(HyperparameterError, match=message):
        named_chain(*pairs)


def test_torchopt_members_mix_and_are_never_told_to_write_in_place():
    torchopt = pytest.importorskip("torchopt")
    ours = chain(trace(0.9), scale_by_adam(), scale(-0.1))
    mixed = chain(trace(0.9), torchopt.transform.scale_by_adam(), torchopt.transform.scale(-0.1))
    one, two = ours.init(PARAMS), mixed.init(PARAMS)
    for step in range(3):
        grads = {name: grad * (1 + step) for name, grad in GRADS.items()}
        before = {name: grad.clone() for name, grad in grads.items()}
        left, one = ours.update(grads, one, PARAMS)
        right, two = mixed.update(grads, two, PARAMS, stats=object())
        assert all(torch.equal(grads[name], before[name]) for name in grads)
        for name in grads:
            torch.testing.assert_close(left[name], right[name])


def test_a_torchopt_trace_does_not_leak_its_state():
    torchopt = pytest.importorskip("torchopt")
    tx = chain(torchopt.transform.trace(0.9))
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    memory = {leaf.untyped_storage().data_ptr() for leaf in leaves((state, GRADS, PARAMS))}
    assert not memory & {leaf.untyped_storage().data_ptr() for leaf in leaves(updates)}
