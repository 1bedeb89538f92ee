"""Parts of states by name."""

from __future__ import annotations

import pytest
import torch

import kfac_func as kf
from kfac_func._errors import HyperparameterError, StateError, TreeMismatchError
from kfac_func._tree import leaves
from kfac_func.transforms import adam, chain, named_chain, sgd, trace, tree_get, tree_set
from tests.unit.transforms.problem import PARAMS, close, run

TX = named_chain(("kfac", kf.kfac(damping=0.5)), ("again", chain(kf.kfac(damping=0.25), trace(0.9))))
STATE = run(TX, 1)[1]


def test_a_part_is_found_by_its_name_and_by_the_end_of_its_path():
    assert tree_get(STATE, "trace") is STATE["again"][1].trace
    assert tree_get(STATE, "kfac") is STATE["kfac"]
    assert tree_get(STATE, "kfac.damping").item() == 0.5
    assert tree_get(STATE, "0.damping") is tree_get(STATE, "again.0.damping") is STATE["again"][0].damping
    assert tree_get(STATE, "kfac.rules") is STATE["kfac"].rules
    assert tree_get(adam(0.1).init(PARAMS), "mu.0.weight").shape == (4, 3)
    assert tree_get(((torch.ones(1), 2), 3), "0.1") == 2


def test_a_whole_path_comes_before_the_ends_of_others():
    state = {"step": torch.tensor(1), "inner": {"step": torch.tensor(2)}}
    assert tree_get(state, "step").item() == 1
    assert tree_get(tree_set(state, step=7), "inner.step").item() == 2


def test_keys_are_whole():
    state = {"0.weight": 1, "weighty": 2, "deep": {"weight": 3}}
    assert tree_get(state, "weight") == 3
    assert tree_get(state, "0.weight") == 1


def test_what_is_not_there_and_what_is_there_twice():
    assert tree_get(STATE, "momentum", default=None) is None
    with pytest.raises(StateError, match=r"no part 'momentum'(.|\n)*damping, (.|\n)*trace"):
        tree_get(STATE, "momentum")
    for ask in (lambda: tree_get(STATE, "damping", default=0), lambda: tree_set(STATE, damping=1.0)):
        with pytest.raises(StateError, match=r"several parts 'damping'(.|\n)*again\.0\.damping, kfac\.damping"):
            ask()
    with pytest.raises(StateError, match="no part 'dampng'"):
        tree_set(STATE, dampng=1.0)
    with pytest.raises(StateError, match=r"no part 'x'(.|\n)*a state with parts"):
        tree_get((), "x")


def test_a_new_value_takes_the_place_of_the_old_and_of_nothing_else():
    before = [leaf.clone() for leaf in leaves(STATE)]
    new = tree_set(STATE, **{"kfac.damping": 2, "0.step": torch.tensor(7, dtype=torch.int32)})
    assert (tree_get(new, "kfac.damping").item(), tree_get(new, "kfac.damping").dtype) == (2.0, torch.float64)
    assert (tree_get(new, "0.step").item(), tree_get(new, "0.step").dtype) == (7, torch.int64)
    close(tree_set(new, **{"kfac.damping": 0.5, "0.step": 1}), STATE, 0)
    assert tree_get(tree_set(STATE, **{"kfac.damping": 0.1}), "kfac.damping").item() == 0.1
    assert new["kfac"].rules is STATE["kfac"].rules
    assert type(new["again"][0]) is kf.KFacState
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(STATE), strict=True))
    updates = TX.update(PARAMS, new, refresh=True)[0]
    assert (updates["0.weight"] - TX.update(PARAMS, STATE, refresh=True)[0]["0.weight"]).abs().max() > 1e-3


def test_trees_numbers_and_tensors_of_ensembles():
    state = sgd(0.1, 0.9).init(PARAMS)
    doubled = tree_set(state, trace={path: 2 + leaf for path, leaf in PARAMS.items()})
    close(doubled[0].trace, {path: 2 + leaf for path, leaf in PARAMS.items()}, 0)
    many = {"rate": torch.zeros(3), "half": torch.zeros(2, dtype=torch.bfloat16)}
    assert tree_set(many, rate=0.5)["rate"].tolist() == [0.5] * 3
    assert tree_set(many, rate=torch.tensor([1, 2, 3]))["rate"].tolist() == [1.0, 2.0, 3.0]
    assert tree_set(many, half=0.5)["half"].dtype == torch.bfloat16
    given = torch.zeros(3)
    assert tree_set(many, rate=given)["rate"].data_ptr() != given.data_ptr()
    assert torch.func.grad(lambda r: tree_set(many, rate=r)["rate"].sum())(torch.tensor(1.0)).item() == 3.0
    assert tree_set({"name": "a"}, name="b") == {"name": "b"}


WRONG = {
    "fraction in a count": {"again.0.step": 0.5},
    "shape": {"kfac.damping": torch.ones(2)},
    "word": {"kfac.damping": "small"},
    "leaf of a tree": {"trace": dict.fromkeys(PARAMS, "small")},
}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
def test_values_that_do_not_fit_are_refused(values):
    with pytest.raises(HyperparameterError, match=rf"^{next(iter(values))} cannot hold this value(.|\n)*wanted"):
        tree_set(STATE, **values)


def test_a_tree_of_another_structure_is_refused():
    with pytest.raises(TreeMismatchError, match=r"0\.bias"):
        tree_set(STATE, trace={"w": torch.ones(2)})
