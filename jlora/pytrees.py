"""Pytrees, walked by JAX where it is loaded.

Where it is not, nobody has registered a node with it: what is left are the containers of Python that are nodes by
themselves, and a loop over them does the same.
"""

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jlora.arrays import loaded_jax

__all__ = ["Key", "leaves", "leaves_with_path", "map_leaves", "map_with_path", "path_string", "structure"]

Stop = Callable[[Any], bool]
KeyPath = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a dict, or a place in a sequence, on the way to a leaf."""

    key: Any

    def __str__(self) -> str:
        return str(self.key)


def path_string(key_path: Sequence[Any]) -> str:
    """`encoder/layers/0/query/kernel`, the same for dicts, lists, dataclasses and Flax trees."""
    if (jax := loaded_jax()) is not None:
        return str(jax.tree_util.keystr(tuple(key_path), simple=True, separator="/"))
    return "/".join(map(str, key_path))


def leaves_with_path(tree: Any, is_leaf: Stop | None = None) -> list[tuple[KeyPath, Any]]:
    """As `jax.tree_util.tree_leaves_with_path`."""
    if (jax := loaded_jax()) is not None:
        return list(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf))
    return list(_leaves(tree, (), is_leaf))


def leaves(tree: Any, is_leaf: Stop | None = None) -> list[Any]:
    """As `jax.tree.leaves`."""
    return [leaf for _, leaf in leaves_with_path(tree, is_leaf)]


def map_with_path(change: Callable[[KeyPath, Any], Any], tree: Any, is_leaf: Stop | None = None) -> Any:
    """As `jax.tree_util.tree_map_with_path` for one tree."""
    if (jax := loaded_jax()) is not None:
        return jax.tree_util.tree_map_with_path(change, tree, is_leaf=is_leaf)
    return _mapped(change, tree, (), is_leaf)


def map_leaves(change: Callable[[Any], Any], tree: Any, is_leaf: Stop | None = None) -> Any:
    """As `jax.tree.map` for one tree."""
    return map_with_path(lambda _, leaf: change(leaf), tree, is_leaf)


def structure(tree: Any, is_leaf: Stop | None = None) -> Any:
    """What two trees have in common that differ in their leaves alone: it can be compared and hashed."""
    if (jax := loaded_jax()) is not None:
        return jax.tree.structure(tree, is_leaf=is_leaf)
    children = _children(tree, is_leaf)
    if children is None:
        return None
    return type(tree), tuple((key, structure(child, is_leaf)) for key, child in children)


def _children(node: Any, is_leaf: Stop | None) -> list[tuple[Key, Any]] | None:
    """The children of a node in JAX's order, None for a leaf."""
    if is_leaf is not None and is_leaf(node):
        return None
    kind = type(node)
    if node is None:
        return []
    if kind is OrderedDict:
        return [(Key(key), child) for key, child in node.items()]
    if kind in (dict, defaultdict):
        return [(Key(key), node[key]) for key in sorted(node)]
    if isinstance(node, tuple) and hasattr(kind, "_fields"):
        return [(Key(name), child) for name, child in zip(kind._fields, node, strict=True)]
    if kind in (list, tuple):
        return [(Key(place), child) for place, child in enumerate(node)]
    return None


def _leaves(node: Any, keys: KeyPath, is_leaf: Stop | None) -> Iterator[tuple[KeyPath, Any]]:
    children = _children(node, is_leaf)
    if children is None:
        yield keys, node
    for key, child in children or ():
        yield from _leaves(child, (*keys, key), is_leaf)


def _mapped(change: Callable[[KeyPath, Any], Any], node: Any, keys: KeyPath, is_leaf: Stop | None) -> Any:
    children = _children(node, is_leaf)
    if children is None:
        return change(keys, node)
    mapped = [(key.key, _mapped(change, child, (*keys, key), is_leaf)) for key, child in children]
    kind = type(node)
    if node is None:
        return None
    if kind is defaultdict:
        return defaultdict(node.default_factory, mapped)
    if isinstance(node, dict):
        return kind(mapped)
    values = [child for _, child in mapped]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)
