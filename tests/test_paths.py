"""Paths as strings, glob patterns on them, and the nearest names."""

import dataclasses
import re
import time
from typing import Any, NamedTuple

import flax.core
import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from jlora.errors import TargetError
from jlora.paths import (
    PatternIndex,
    format_nearest,
    leaves_by_path,
    literal_pattern,
    matched_depths,
    names_leaf,
    nearest,
    path_string,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    bias: Any
    kernel: Any


class Pair(NamedTuple):
    bias: Any
    kernel: Any


def fits(pattern, name):
    """Whether a glob of `*`, `?` and letters matches all of a name, one character at a time."""
    if pattern[:1] == "*":
        return any(fits(pattern[1:], name[k:]) for k in range(len(name) + 1))
    if not pattern or not name:
        return pattern == name
    return pattern[0] in ("?", name[0]) and fits(pattern[1:], name[1:])


def covers(segments, parts):
    """Whether the segments of a pattern match all the parts of a path, one segment at a time."""
    if segments[:1] == ["**"]:
        return any(covers(segments[1:], parts[k:]) for k in range(len(parts) + 1))
    if not segments or not parts:
        return segments == parts
    return fits(segments[0], parts[0]) and covers(segments[1:], parts[1:])


segments = st.lists(st.sampled_from(["**", "*"]) | st.text("ab*?", min_size=1, max_size=3), min_size=1, max_size=4)
names = st.lists(st.text("abA", min_size=1, max_size=3), min_size=1, max_size=5)


@hypothesis.settings(max_examples=500)
@hypothesis.given(segments, names)
def test_matched_depths_are_those_of_a_search_over_every_split(pattern, parts):
    wanted = {depth for depth in range(len(parts) + 1) if covers(pattern, parts[:depth])}
    assert matched_depths("/".join(pattern), "/".join(parts)) == wanted


@hypothesis.given(names, st.data())
def test_every_module_of_a_path_is_matched_by_its_own_name(parts, data):
    depth = data.draw(st.integers(1, len(parts)))
    module = "/".join(parts[:depth])
    assert matched_depths(module, "/".join(parts)) == {depth}
    assert matched_depths(f"{module}/**", "/".join(parts)) == set(range(depth, len(parts) + 1))


@pytest.mark.parametrize(
    ("pattern", "path", "depths"),
    [
        ("**", "", {0}),
        ("*", "", set()),
        ("**/**", "a/b", {0, 1, 2}),
        ("a/**/c", "a/c", {2}),
        ("a/**/c", "a/b/c/b/c", {3, 5}),
        ("layers_[01]/*", "layers_1/query", {2}),
        ("layers_[!01]", "layers_1/query", set()),
        ("layers_*", "layers_10/query/kernel", {1}),
        ("Query", "query", set()),
        ("quer", "query", set()),
        ("a/b/c", "a/b", set()),
        ("a**", "abc/d", {1}),
    ],
)
def test_matched_depths_of_known_patterns(pattern, path, depths):
    assert matched_depths(pattern, path) == depths


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("encoder/query/kernel", True),
        ("**/kernel", True),
        ("**/kern*", True),
        ("*/*/kernel", True),
        ("**/query/?ernel", True),
        ("**/**/kernel", True),
        ("encoder/query", False),
        ("**/query", False),
        ("encoder/query/*", False),
        ("encoder/**", False),
        ("**", False),
        ("*/kernel", False),
        ("encoder/query/kernel/A", False),
    ],
)
def test_a_leaf_is_named_by_its_last_segment_and_not_by_a_span(pattern, named):
    assert names_leaf(pattern, "encoder/query/kernel") is named


odd = st.text("ab*?[]!-^.\\ \n", min_size=1, max_size=4)
odd_paths = st.lists(odd, min_size=1, max_size=3).map("/".join)


def modules_of(path):
    """The modules that hold the leaf at a path, and the path."""
    parts = path.split("/")
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


@hypothesis.settings(max_examples=500)
@hypothesis.given(st.data())
def test_an_index_finds_what_each_pattern_alone_would(data):
    paths = data.draw(st.lists(odd_paths, min_size=1, max_size=4))
    own = st.sampled_from([module for path in paths for module in modules_of(path)])
    globs = st.lists(segments.map("/".join) | odd_paths | own | own.map(literal_pattern), max_size=8)
    items = [(pattern, position) for position, pattern in enumerate(data.draw(globs))]
    index = PatternIndex(iter(items))
    for path in paths:
        assert index.matches(path) == [item for item in items if matched_depths(item[0], path)]


@hypothesis.given(odd_paths, odd_paths)
def test_a_literal_pattern_matches_its_path_alone(path, other):
    index = PatternIndex([(literal_pattern(path), None)])
    assert matched_depths(literal_pattern(path), path) == {len(path.split("/"))}
    assert bool(index.matches(other)) == (path in modules_of(other))


@pytest.mark.parametrize(
    ("pattern", "path", "matched"),
    [
        ("a", "a/b", True),
        ("a", "ab", False),
        ("a/b", "a", False),
        ("layers[[]0]", "layers[0]/kernel", True),
        ("layers[0]", "layers0/kernel", True),
        ("layers[0]", "layers[0]/kernel", False),
        ("a[*]", "a*/b", True),
        ("a[*]", "ab", False),
        ("[*][*]", "**/b", True),
        ("[*][*]", "a/b", False),
        ("a[?]", "a?", True),
        ("a]", "a]/b", True),
        ("[", "[/b", True),
        ("[!]", "[!]", True),
        ("**", "", True),
        ("a.b", "axb", False),
    ],
)
def test_an_index_of_odd_patterns(pattern, path, matched):
    assert PatternIndex([(pattern, 3)]).matches(path) == ([(pattern, 3)] if matched else [])


def test_an_index_keeps_the_order_and_what_stands_twice():
    items = [("**", 1), ("a/b", 2), ("a", 3), ("*/b", 4), ("a/b", 5), ("c", 6), ("a/b/c", 7), ("a/*", 8)]
    assert PatternIndex(items).matches("a/b") == [items[i] for i in (0, 1, 2, 3, 4, 7)]
    assert PatternIndex(reversed(items)).matches("a/b") == [items[i] for i in (7, 4, 3, 2, 1, 0)]
    assert PatternIndex([]).matches("a/b") == []


def test_an_index_of_many_literal_patterns_is_fast():
    paths = [f"model/layers[{i}]/kernel" for i in range(20_000)]
    index = PatternIndex((literal_pattern(path), i) for i, path in enumerate(paths))
    begin = time.perf_counter()
    assert all(index.matches(path)[0][1] == i for i, path in enumerate(paths))
    assert time.perf_counter() - begin < 5


TREES = {
    "dict": {"encoder": {"0": {"bias": 1, "kernel": 2}}},
    "integer key": {"encoder": {0: {"bias": 1, "kernel": 2}}},
    "list": {"encoder": [{"bias": 1, "kernel": 2}]},
    "tuple": {"encoder": ({"bias": 1, "kernel": 2},)},
    "dataclass": {"encoder": [Layer(1, 2)]},
    "named tuple": {"encoder": [Pair(1, 2)]},
    "FrozenDict": flax.core.freeze({"encoder": {"0": {"bias": 1, "kernel": 2}}}),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_paths_are_the_same_for_every_kind_of_tree(tree):
    assert leaves_by_path(tree) == {"encoder/0/bias": 1, "encoder/0/kernel": 2}
    found = [path_string(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert found == ["encoder/0/bias", "encoder/0/kernel"]


def test_leaves_come_in_the_order_of_the_tree():
    tree = {"b": [1, {"d": 2, "c": 3}], "a": (4, None, 5)}
    assert list(leaves_by_path(tree).values()) == jax.tree.leaves(tree)
    assert list(leaves_by_path(tree)) == ["a/0", "a/2", "b/0", "b/1/c", "b/1/d"]


def test_is_leaf_stops_the_descent():
    tree = {"a": {"A": 1, "B": 2}, "b": None}
    found = leaves_by_path(tree, is_leaf=lambda node: node is None or "A" in node)
    assert found == {"a": {"A": 1, "B": 2}, "b": None}


def test_a_bare_leaf_has_the_empty_path():
    assert path_string(()) == ""
    assert leaves_by_path(3) == {"": 3}


@pytest.mark.parametrize("tree", [{"a/b": 1, "a": {"b": 2}}, {"a": {"b/c": 1, "b": [{}, 2], "b/1": 3}}])
def test_two_leaves_with_one_path_are_refused(tree):
    path = "a/b" if "a/b" in tree else "a/b/1"
    message = f"two leaves of the tree have the path {path!r}; rename one of the keys"
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        leaves_by_path(tree)


@hypothesis.given(st.lists(names.map("/".join), min_size=1, max_size=6, unique=True), st.data())
def test_a_known_name_is_nearest_to_itself(known, data):
    name = data.draw(st.sampled_from(known))
    assert nearest(name, known, 1) == [name]
    assert nearest(f"**/{name}/*", known, 1) == [name]


@pytest.mark.parametrize(
    ("name", "known", "wanted"),
    [
        ("alfa", ["rank", "alpha", "init"], "alpha"),
        ("**/quer/kernel", ["key/kernel", "query/kernel", "value/kernel"], "query/kernel"),
        ("encoder/**/qurey", ["decoder/query", "encoder/query", "encoder/key"], "encoder/query"),
    ],
)
def test_the_nearest_name_is_the_one_spelled_most_like_it(name, known, wanted):
    assert nearest(name, known)[0] == wanted


def test_nearest_returns_count_names_however_far_and_all_where_there_are_fewer():
    known = ["query", "key", "value", "out"]
    assert [len(nearest("zzz", known, count)) for count in (1, 3, 9)] == [1, 3, 4]
    assert nearest("zzz", iter(known), 4) == nearest("zzz", known, 4)
    assert nearest("zzz", []) == []


def test_format_nearest_lists_leaves_and_the_modules_that_hold_them():
    paths = ["encoder/query/kernel", "encoder/query/bias", "decoder/out/kernel"]
    assert format_nearest("**/encoder/qery", paths) == (
        "nearest paths: encoder/query, encoder/query/bias, encoder/query/kernel"
    )
    assert format_nearest("decoder", iter(paths)).startswith("nearest paths: decoder, encoder, ")


def test_format_nearest_of_an_empty_tree_says_so():
    assert format_nearest("**", []) == "the tree has no leaves"
