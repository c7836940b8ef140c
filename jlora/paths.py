"""Paths of a pytree as strings, glob patterns on them, and the nearest names for an error message."""

import difflib
import fnmatch
import glob
import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jlora.boxes import is_box, unboxed
from jlora.errors import TargetError
from jlora.lazy import is_lazy
from jlora.pytrees import leaves_with_path, path_string

__all__ = [
    "PatternIndex",
    "format_nearest",
    "is_param",
    "leaves_by_path",
    "literal_pattern",
    "matched_depths",
    "names_leaf",
    "nearest",
    "nest",
    "path_number",
    "path_string",
]


def path_number(path: str) -> int:
    """32 bits that stand for a path, the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")


def is_param(node: Any) -> bool:
    """Whether a node of a pytree stands for one param, whatever is in it: a box, or a lazy base."""
    return is_box(node) or is_lazy(node)


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a pytree by their path, in the order of the tree; of a box what lies in it; a lazy base is one.

    Raises:
      TargetError: two leaves have the same path, as `{'a/b': x, 'a': {'b': y}}`.
    """
    leaves: dict[str, Any] = {}

    def stop(node: Any) -> bool:
        return is_param(node) or (is_leaf is not None and is_leaf(node))

    for key_path, leaf in leaves_with_path(tree, stop):
        path = path_string(key_path)
        if path in leaves:
            raise TargetError(f"two leaves of the tree have the path {path!r}; rename one of the keys")
        leaves[path] = unboxed(leaf)
    return leaves


def nest(by_path: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of what is given by path.

    Raises:
      TargetError: one path leads through another.

    >>> nest({"layers/0/up": 1, "layers/1/up": 2})
    {'layers': {'0': {'up': 1}, '1': {'up': 2}}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in by_path.items():
        *modules, last = path.split("/")
        node = tree
        for depth, name in enumerate(modules, 1):
            node = node.setdefault(name, {})
            if "/".join(modules[:depth]) in by_path:
                raise TargetError(f"{path}: {'/'.join(modules[:depth])} is a leaf and a module at once")
        if last in node:
            raise TargetError(f"{path} is a leaf and a module at once")
        node[last] = leaf
    return tree


def matched_depths(pattern: str, path: str) -> set[int]:
    """How many leading segments of `path` the glob `pattern` can match.

    Within a segment `*`, `?` and `[...]` work as in `fnmatch`; a segment `**` spans any number of levels,
    none included.

    >>> sorted(matched_depths("**/attention", "encoder/attention/query"))
    [2]
    >>> sorted(matched_depths("encoder/**", "encoder/attention/query"))
    [1, 2, 3]
    """
    parts = path.split("/") if path else []
    depths = {0}
    for segment in pattern.split("/"):
        if not depths:
            break
        if segment == "**":
            depths = set(range(min(depths), len(parts) + 1))
        else:
            depths = {d + 1 for d in depths if d < len(parts) and fnmatch.fnmatchcase(parts[d], segment)}
    return depths


class PatternIndex:
    """Patterns, each with a value, that are looked up by path; as fast for thousands of literal ones as for one.

    >>> PatternIndex([("encoder", 1), ("**/query", 2), ("decoder", 3)]).matches("encoder/0/query")
    [('encoder', 1), ('**/query', 2)]
    """

    def __init__(self, items: Iterable[tuple[str, Any]]) -> None:
        self._items = list(items)
        self._literal: dict[str, list[int]] = {}
        self._globs: list[int] = []
        self._known: dict[str, list[int]] = {}  # paths that were looked up, where there are globs to compare
        for position, (pattern, _) in enumerate(self._items):
            path = _ESCAPED.sub(r"\1", pattern)
            if glob.escape(path) == pattern:
                self._literal.setdefault(path, []).append(position)
            else:
                self._globs.append(position)

    @property
    def wildcards(self) -> int:
        """How many of the patterns have wildcards; each is compared with every path."""
        return len(self._globs)

    def matches(self, path: str) -> list[tuple[str, Any]]:
        """The patterns that match the leaf at `path` or a module that holds it, with their values, in their order."""
        ends = [index for index, letter in enumerate(path) if letter == "/"]
        found = [position for end in (*ends, len(path)) for position in self._literal.get(path[:end], ())]
        if self._globs:
            found += self._matching_globs(path)
        return [self._items[position] for position in sorted(found)]

    def _matching_globs(self, path: str) -> list[int]:
        if path not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[path] = [at for at in self._globs if matched_depths(self._items[at][0], path)]
        return self._known[path]


_MOST_CHARACTERS, _MOST_COMPARED, _MOST_KNOWN = 200, 200, 100_000
_SEPARATOR = re.compile(r"[./]")
_ESCAPED = re.compile(r"\[([*?[])\]")


def literal_pattern(path: str) -> str:
    """The pattern that matches this path alone, whatever characters its keys hold; a tree that is one leaf has "".

    >>> literal_pattern("layers[0]/kernel")
    'layers[[]0]/kernel'
    """
    return glob.escape(path) or "**"


def names_leaf(pattern: str, path: str) -> bool:
    """Whether `pattern` names the leaf at `path` itself, and does not only span it with a last `*` or `**`."""
    last = pattern.rsplit("/", 1)[-1]
    return last not in ("*", "**") and len(path.split("/")) in matched_depths(pattern, path)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names of `known` that are spelled most like `name`, wildcards left aside."""
    plain = name[:_MOST_CHARACTERS].replace("*", "").strip("/").replace("//", "/")
    options = list(known)
    if len(options) > _MOST_COMPARED:  # by their segments first, which takes microseconds each, not tens of them
        segments = set(_SEPARATOR.split(plain))
        options = heapq.nlargest(_MOST_COMPARED, options, key=lambda other: len(segments & {*_SEPARATOR.split(other)}))
    short = {other[:_MOST_CHARACTERS]: other for other in options}
    return [short[other] for other in difflib.get_close_matches(plain, short, n=count, cutoff=0.0)]


def format_nearest(pattern: str, paths: Iterable[str]) -> str:
    """`nearest paths: a/b, a/c`, over the leaves and the modules that hold them."""
    known: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")
        known.update(dict.fromkeys("/".join(parts[:depth]) for depth in range(1, len(parts) + 1)))
    if not known:
        return "the tree has no leaves"
    return "nearest paths: " + ", ".join(name or "the root" for name in nearest(pattern, known))
