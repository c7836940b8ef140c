"""Pytrees walked without JAX, against JAX."""

import collections
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jlora import pytrees


class Pair(NamedTuple):
    first: Any
    second: Any


class Own(dict):
    """A dict that is no node to JAX."""


def nodes(children):
    keys = st.text("abc/é", max_size=3)
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(keys, children, max_size=3),
        st.dictionaries(st.integers(-3, 11), children, max_size=3),
        st.dictionaries(keys, children, max_size=3).map(collections.OrderedDict),
        st.dictionaries(keys, children, max_size=3).map(lambda items: collections.defaultdict(list, items)),
        st.dictionaries(keys, children, max_size=3).map(Own),
        st.tuples(children, children).map(lambda two: Pair(*two)),
    )


LEAVES = st.one_of(st.none(), st.integers(0, 99), st.just(np.float32(2)), st.just(np.ones(3)), st.just("text"))
TREES = st.recursive(LEAVES, nodes, max_leaves=20)


def is_pair(node):
    return isinstance(node, Pair) or node is None


@pytest.fixture(scope="module", autouse=True)
def _without_jax():
    """As in a program that has not imported JAX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytrees, "loaded_jax", lambda: None)
        yield


@hypothesis.given(TREES, st.sampled_from([None, is_pair]))
def test_leaves_and_paths_are_those_of_jax(tree, stop):
    wanted = jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop)
    found = pytrees.leaves_with_path(tree, stop)
    keystr = jax.tree_util.keystr
    assert [pytrees.path_string(keys) for keys, _ in found] == [
        keystr(keys, simple=True, separator="/") for keys, _ in wanted
    ]
    assert all(leaf is other for (_, leaf), (_, other) in zip(found, wanted, strict=True))
    assert len(pytrees.leaves(tree, stop)) == len(wanted)


@hypothesis.given(TREES, st.sampled_from([None, is_pair]))
def test_trees_are_rebuilt_as_by_jax(tree, stop):
    wanted = jax.tree_util.tree_map_with_path(lambda keys, leaf: (len(keys), id(leaf)), tree, is_leaf=stop)
    found = pytrees.map_with_path(lambda keys, leaf: (len(keys), id(leaf)), tree, stop)
    assert repr(found) == repr(wanted)  # types, and the order of keys
    assert repr(pytrees.map_leaves(id, tree, stop)) == repr(jax.tree.map(id, tree, is_leaf=stop))


@hypothesis.given(TREES, TREES)
def test_structures_differ_where_those_of_jax_do(one, other):
    def same(function):
        return function(one) == function(other)

    assert same(pytrees.structure) == same(jax.tree.structure)
    assert pytrees.structure(one) == pytrees.structure(jax.tree.map(lambda leaf: 0, one))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "a": 4}, True),
        ({"a": 1}, {"b": 1}, False),
        ([1, 2], (1, 2), False),
        ([1, 2], [1, 2, 3], False),
        ([1, None], [1, 2], False),
        ([1, {}], [1, []], False),
        (Pair(1, 2), (1, 2), False),
        ({1: 2}, {"1": 2}, False),
    ],
)
def test_which_structures_are_the_same(one, other, same):
    assert (pytrees.structure(one) == pytrees.structure(other)) is same
    assert (jax.tree.structure(one) == jax.tree.structure(other)) is same
