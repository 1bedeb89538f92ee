"""Pytrees: one world for flattening, paths that name leaves, None as "nothing here", static nodes without leaves."""

from __future__ import annotations

import collections
import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_func import _tree
from kfac_func._errors import TreeMismatchError
from kfac_func._tree import Static


class Pair(NamedTuple):
    left: Any
    right: Any


TREE = {"b": [1, None, (2,)], "a": Pair(3, {"z": 4, "y": None}), "c": Static("rules"), "d": ()}


def test_leaves_come_in_one_order_without_none():
    assert _tree.leaves(TREE) == [3, 4, 1, 2]  # keys sorted
    assert _tree.leaves(None) == []
    assert _tree.leaves(5) == [5]


def test_paths_are_keys_fields_and_indices():
    paths = [(leaf.path, leaf.value) for leaf in _tree.leaves_with_paths(TREE)]
    assert paths == [("a.left", 3), ("a.right.z", 4), ("b.0", 1), ("b.2.0", 2)]
    assert _tree.leaves_with_paths(7) == [("", 7)]


def test_map_keeps_containers_none_and_key_order():
    mapped = _tree.tree_map(lambda x: 10 * x, TREE)
    assert mapped == {"b": [10, None, (20,)], "a": Pair(30, {"z": 40, "y": None}), "c": Static("rules"), "d": ()}
    assert list(mapped) == list(TREE)
    assert type(mapped["a"]) is Pair


def test_map_matches_keys_by_name_in_any_order():
    assert _tree.tree_map(lambda x, y: x - y, {"a": 5, "b": 7}, {"b": 1, "a": 2}) == {"a": 3, "b": 6}


def test_none_in_the_first_tree_skips_and_in_another_is_seen():
    assert _tree.tree_map(lambda x, y: (x, y), [1, None], [None, 2]) == [(1, None), None]
    assert _tree.tree_map(lambda x, y: y, [1, None], [{"any": "subtree"}, 2]) == [{"any": "subtree"}, None]


MISMATCHES = {
    "a missing key": ({"a": 1, "w": {"x": 1}}, {"a": 1, "w": {}}, "missing", "'w.x'"),
    "a key too many": ({"a": 1}, {"a": 1, "z": 2}, "unexpected", "'z'"),
    "a longer list": ([1], [1, 2], "unexpected", "'1'"),
    "another container": ([1], (1,), "got", "tuple"),
    "another class": (Pair(1, 2), (1, 2), "missing", "'left'"),
    "a leaf for a node": ({"a": [1]}, {"a": 1}, "missing", "'a.0'"),
}


@pytest.mark.parametrize(("tree", "other", "line", "named"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_mismatch_names_the_first_path(tree, other, line, named):
    with pytest.raises(TreeMismatchError) as caught:
        _tree.tree_map(lambda x, y: x, tree, other)
    assert any(row.split()[0] == line and named in row for row in str(caught.value).splitlines()), str(caught.value)


def test_equal_static_nodes_match_and_others_do_not():
    tree = {"r": Static(("a", 1)), "x": 1}
    assert _tree.tree_map(lambda x, y: x + y, tree, {"r": Static(("a", 1)), "x": 2}) == {"r": tree["r"], "x": 3}
    with pytest.raises(TreeMismatchError, match="'r'"):
        _tree.tree_map(lambda x, y: x, tree, {"r": Static(("a", 2)), "x": 2})


def test_leaves_are_replaced_by_path():
    new = _tree.replace_leaves(TREE, {"a.right.z": "new", "b.2.0": 0})
    assert new == {"b": [1, None, (0,)], "a": Pair(3, {"z": "new", "y": None}), "c": Static("rules"), "d": ()}
    assert TREE["b"][2] == (2,)
    with pytest.raises(TreeMismatchError, match=r"'b\.9'"):
        _tree.replace_leaves(TREE, {"b.9": 0})


def test_a_path_names_one_leaf():
    assert _tree.unique_paths({"a": {"b": 1}, "c": None}) == {"a.b": 1}
    with pytest.raises(TreeMismatchError, match=r"'a\.b'"):
        _tree.unique_paths({"a.b": 1, "a": {"b": 2}})


def test_with_leaves_is_the_inverse_of_leaves():
    assert _tree.with_leaves(TREE, _tree.leaves(TREE)) == TREE
    assert _tree.leaves(_tree.with_leaves(TREE, [10, 20, 30, 40])) == [10, 20, 30, 40]


def test_nodes_of_a_class_are_found_and_replaced_everywhere():
    tree = {"a": [Pair(1, 2), 3], "b": (Pair(4, None), Static("s")), "c": None}
    assert _tree.nodes(tree, Pair) == [Pair(1, 2), Pair(4, None)]
    swapped = _tree.map_nodes(lambda pair: Pair(pair.right, pair.left), tree, Pair)
    assert swapped == {"a": [Pair(2, 1), 3], "b": (Pair(None, 4), Static("s")), "c": None}
    assert _tree.map_nodes(lambda pair: None, Pair(1, 2), Pair) is None
    assert _tree.nodes(tree, torch.Tensor) == []


CONTAINERS = {
    "all": TREE,
    "leaf": 3,
    "none": None,
    "ordered": collections.OrderedDict(b=1, a=(2, None)),
    "numbered": {2: "x", 1: {"y": 0}},
}


@pytest.mark.parametrize("tree", CONTAINERS.values(), ids=CONTAINERS)
def test_the_walk_of_a_traced_tree_is_the_same(tree, monkeypatch):
    def everything() -> list[Any]:
        other = _tree.tree_map(str, tree)
        mapped = _tree.tree_map(lambda *both: both, tree, other)
        replaced = _tree.with_leaves(tree, [f"new {leaf}" for leaf in _tree.leaves(tree)])
        return [_tree.leaves(tree), _tree.leaves_with_paths(tree), _tree.unique_paths(tree), other, mapped, replaced]

    wanted = everything()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = everything()
    assert got == wanted
    assert [type(x) for x in got] == [type(x) for x in wanted]


# ------------------------------------------------------------------------------------------------ vectors

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TENSORS = st.builds(
    lambda shape, dtype: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) + 0.5, SHAPES, DTYPES
)
TREES = st.recursive(
    TENSORS | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner) | st.tuples(inner, inner)
    ),
    max_leaves=6,
)


def identical(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert torch.equal(a, b)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(TREES)
def test_unravel_undoes_ravel(tree):
    vector, unravel = _tree.ravel(tree)
    assert vector.shape == (sum(leaf.numel() for leaf in _tree.leaves(tree)),)
    _tree.tree_map(identical, tree, unravel(vector))
    _tree.tree_map(identical, unravel(vector), tree)


def test_unravel_refuses_another_length():
    _, unravel = _tree.ravel({"w": torch.ones(2, 3)})
    with pytest.raises(TreeMismatchError, match=r"\[7\]"):
        unravel(torch.ones(7))


# ------------------------------------------------------------------------------------------------- static


class Holder(NamedTuple):
    x: Any
    rules: Static


def doubled(holder: Holder) -> Holder:
    return holder._replace(x=2 * holder.x)


def test_static_goes_through_vmap_and_grad():
    mapped = torch.func.vmap(doubled)(Holder(torch.ones(3), Static(("rules", 1))))
    assert mapped.rules == Static(("rules", 1))
    assert mapped.x.tolist() == [2.0, 2.0, 2.0]
    grads = torch.func.grad(lambda holder: doubled(holder).x.sum())(Holder(torch.ones(2), Static("rules")))
    assert grads.rules == Static("rules")


def test_static_is_a_node_without_leaves_in_both_worlds():
    holder = Holder(torch.ones(1), Static("rules"))
    assert len(_tree.leaves(holder)) == len(torch_pytree.tree_leaves(holder)) == 1


def test_static_is_a_value():
    one, other = Static((1, 2)), Static((1, 2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Static((1, 3))
    assert one != (1, 2)
    assert repr(one) == "Static((1, 2))"
    for again in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert again == one
