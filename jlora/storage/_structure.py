"""The structure of a tree of adapters as plain data, and the names of its entries.

    None                    null
    an entry                its name; the tensors are `name/A`, `name/B`, and so on
    a list, a tuple         {"list": [node, ...]}, {"tuple": [node, ...]}
    a dict                  {"dict": [[key, node], ...]}, keys strings or integers, in their order
    any other pytree node   as a dict, by the keys of its children

The name of an entry is its path; where two have the same path, the later ones get a number behind it.
"""

from collections.abc import Callable
from typing import Any

from jlora.adapter import is_entry
from jlora.boxes import unboxed
from jlora.errors import AdapterError, DataError, raise_all, shortened
from jlora.paths import path_string
from jlora.pytrees import Key, leaves_with_path

Keys = tuple[Any, ...]
Entries = dict[str, tuple[str, Any]]

MOST_LEVELS = 100
_SEQUENCES = {"list": list, "tuple": tuple}


def take_apart(adapters: Any) -> tuple[Any, Entries]:
    """The structure, and name -> (path, entry).

    Raises:
      AdapterError: with every problem at once: a leaf that is no entry, a key that cannot be written, no entry at all.
    """
    entries: Entries = {}
    problems: list[str] = []

    def visit(node: Any, keys: Keys) -> Any:
        if node is None:
            return None
        if is_entry(node):
            return _enter(entries, path_string(keys), unboxed(node))
        children = _children(node)
        problem = f"found {type(node).__name__}, wanted an adapter {{'A', 'B'}} or None" if children is None else None
        if len(keys) == MOST_LEVELS:
            problem = problem or f"nested more than {MOST_LEVELS} levels deep"
        if problem := problem or _key_problem([key for key, _, _ in children or ()]):
            problems.append(f"{path_string(keys) or 'adapters'}: {problem}")
            return None
        items = [(key, visit(child, (*keys, in_path))) for key, in_path, child in children or ()]
        if type(node) in _SEQUENCES.values():
            return {type(node).__name__: [child for _, child in items]}
        return {"dict": [[key, child] for key, child in items]}

    structure = visit(adapters, ())
    if not entries and not problems:
        problems.append("adapters: found none, wanted an adapter {'A', 'B'} at one path at least")
    raise_all(problems, AdapterError)
    return structure, entries


def put_together(structure: Any, entry: Callable[[str, str], Any]) -> Any:
    """The tree of a structure, with `entry(name, path)` at its entries.

    Raises:
      DataError: what is no structure.
    """

    def build(node: Any, keys: Keys) -> Any:
        if node is None:
            return None
        if isinstance(node, str):
            return entry(node, path_string(keys))
        kind, items = next(iter(node.items())) if isinstance(node, dict) and len(node) == 1 else ("", None)
        if kind not in (*_SEQUENCES, "dict") or not isinstance(items, list) or len(keys) == MOST_LEVELS:
            raise _unknown(keys)
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](build(child, (*keys, Key(i))) for i, child in enumerate(items))
        if not all(isinstance(item, list) and len(item) == 2 for item in items):
            raise _unknown(keys)
        if problem := _key_problem([key for key, _ in items]):
            raise DataError(f"its structure, at {path_string(keys) or 'the root'}: {problem}")
        return {key: build(child, (*keys, Key(key))) for key, child in items}

    return build(structure, ())


def _unknown(keys: Keys) -> DataError:
    return DataError(f"its structure, at {path_string(keys) or 'the root'}: no dict, list, tuple, name or null")


def is_name_of(name: str, path: str) -> bool:
    """Whether `name` is what `take_apart` can call the entry at `path`."""
    return name == path or (name.startswith(f"{path}~") and name[len(path) + 1 :].isdecimal())


def _children(node: Any) -> list[tuple[Any, Any, Any]] | None:
    """(key, the key in a path, child) of the children of a pytree node; None for a leaf."""
    if type(node) is dict:
        return [(key, Key(key), child) for key, child in node.items()]
    if type(node) in _SEQUENCES.values():
        return [(i, Key(i), child) for i, child in enumerate(node)]
    items = leaves_with_path(node, lambda part: part is not node)
    if len(items) == 1 and not items[0][0]:
        return None
    return [(_plain(keys), keys[0], child) for keys, child in items]


def _enter(entries: Entries, path: str, update: Any) -> str:
    name, number = path, 1
    while name in entries:
        number += 1
        name = f"{path}~{number}"
    entries[name] = (path, update)
    return name


def _plain(keys: Keys) -> Any:
    """The key or the name in a path of one level."""
    (entry,) = keys
    return next((getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)), path_string(keys))


def _key_problem(keys: list[Any]) -> str | None:
    for key in keys:
        if type(key) not in (str, int):
            return f"found the key {shortened(key)} of {type(key).__name__}, wanted a string or an integer"
        if type(key) is int and not -(2**63) <= key < 2**63:
            return "found a key of more than 64 bits"
        if type(key) is str and not _is_text(key):
            return f"found the key {shortened(key)}, with half of a surrogate pair"
    if len(set(map(type, keys))) > 1:
        return "found strings and integers as keys of one dict, wanted one of the two, as JAX does"
    return "found a key twice" if len(set(keys)) < len(keys) else None


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
