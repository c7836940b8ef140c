"""Labels and masks for optax, the two halves of a Linen tree that holds both, and counts.

Where a tree holds the base and the adapters, names and shapes have to tell them apart, or the base at hand does. An
entry of the adapters (`jlora.adapter.is_entry`) is trained with all of its parts, and counts

    with the base     where the base has none of its parts
    without           where the whole tree is made of entries, as one of `init_lora` is, or where the entry's path says
                      so: "lora" or "adapter" in a name on it, as in `lora` and `LoRADenseAdapter_0`, or `kernel` or
                      `embedding` as its last name, which are arrays in a base

Everything else is of the base. So is a module of a state-space model whose weights are named A and B, and, with a
warning, an adapter module that was given a name of its own.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jlora.adapter import is_adapter, is_entry
from jlora.errors import JloraWarning, TargetError, listed
from jlora.fields import choice
from jlora.lazy import is_lazy
from jlora.paths import leaves_by_path, path_string
from jlora.pytrees import leaves, map_with_path

_WEIGHTS = ("kernel", "embedding")
_SAYS_SO = ("lora", "adapter")


def lora_labels(tree: Any, base: Any = None, *, by: str = "tree") -> Any:
    """`"lora"` at every part of the adapters in a tree, `"frozen"` elsewhere, for `optax.partition`.

    Args:
      tree: adapters, or a tree that holds them beside the base, as a Linen tree does.
      base: the params without adapters, arrays or shapes. Given, whatever it has is frozen, and nothing else. Without
        it an entry counts in a tree of nothing else, under a name with "lora" or "adapter" in it (`lora`,
        `LoRADenseAdapter_0`), and at a `kernel` or an `embedding`.
      by: "tree", or "part" for the names of the parts in place of "lora": "A", "B", "magnitude" and so on, so that
        each can have an optimizer of its own.

    Raises:
      TargetError: a leaf is neither of the base nor of an adapter.
      ConfigError: another `by`.

    A `JloraWarning` tells of weights named A and B that could be an adapter, and are frozen.

    >>> lora_labels({'kernel': np.ones((2, 3)), 'lora': {'A': np.ones((2, 1)), 'B': np.ones((1, 3))}})
    {'kernel': 'frozen', 'lora': {'A': 'lora', 'B': 'lora'}}
    >>> lora_labels({'down': None, 'up': {'A': np.ones((2, 1)), 'B': np.ones((1, 3))}}, by="part")
    {'down': None, 'up': {'A': 'A', 'B': 'B'}}
    """
    choice("by", by, ("tree", "part"))
    return _mark(tree, base, (lambda name: name) if by == "part" else (lambda _: "lora"), "frozen")


def lora_mask(tree: Any, base: Any = None) -> Any:
    """`True` at every part of the adapters in a tree, `False` elsewhere; arguments and errors of `lora_labels`.

    `optax.masked` alone does not freeze: it passes the gradients of the other leaves through. Use `lora_labels` with
    `optax.partition`, or take gradients of the adapters alone.
    """
    return _mark(tree, base, lambda _: True, False)


def _mark(tree: Any, base: Any, of_part: Callable[[str], Any], other: Any) -> Any:
    """The tree with `of_part(name)` at each part of an entry of the adapters, and `other` elsewhere."""
    entries, doubtful = _find_entries(tree, base)
    if doubtful:
        warnings.warn(
            f"A and B of {listed(doubtful)} are frozen as weights of the base; if they are an adapter, give its "
            "module a name with 'lora' in it, or pass base=, the params without adapters, which decides, and is silent",
            JloraWarning,
            stacklevel=3,
        )

    def mark(key_path: Any, node: Any) -> Any:
        trained = path_string(key_path) in entries
        return map_with_path(lambda within, _: of_part(path_string(within[:1])) if trained else other, node)

    return map_with_path(mark, tree, is_entry)


def _find_entries(tree: Any, base: Any) -> tuple[set[str], list[str]]:
    """The paths of the entries of the adapters, and of what could be one as well."""
    nodes = leaves_by_path(tree, is_leaf=is_entry)
    if base is not None:
        return _not_of(base, nodes), []
    updates = {path: node for path, node in nodes.items() if is_entry(node) and any(_readings(node))}
    if len(updates) == len(nodes):
        return set(updates), []
    sure = {path for path in updates if _says_so(path)}
    return sure, [path for path, node in updates.items() if path not in sure and any(_low_ranks(node))]


def _not_of(base: Any, nodes: Mapping[str, Any]) -> set[str]:
    """The paths of the entries among these nodes of which the base has no part."""
    known = leaves_by_path(base)
    entries: set[str] = set()
    for path, node in nodes.items():
        parts = [_joined(path, name) for name in node] if is_entry(node) else [path]
        foreign = [part for part in parts if part not in known]
        if foreign and (len(foreign) < len(parts) or not is_entry(node)):
            raise TargetError(f"{foreign[0]}: neither a leaf of the base nor part of an adapter")
        if foreign:
            entries.add(path)
    return entries


def _says_so(path: str) -> bool:
    return path.rpartition("/")[2] in _WEIGHTS or any(word in path.lower() for word in _SAYS_SO)


def _readings(entry: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """The rank and the sizes of in and out, for every number of batch axes with which A and B fit each other."""
    if "A" not in entry:
        yield 0, 0, 0
        return
    a, b = np.shape(entry["A"]), np.shape(entry["B"])
    for n in range(min(len(a), len(b)) - 1):
        if a[:n] == b[:n] and a[-1] == b[n]:
            yield a[-1], math.prod(a[n:-1]), math.prod(b[n + 1 :])


def _low_ranks(entry: Mapping[str, Any]) -> Iterator[bool]:
    for rank, ins, outs in _readings(entry):
        yield "A" in entry and rank <= min(ins, outs)


def split_params(params: Mapping[str, Any], base: Any = None) -> tuple[Any, Any]:
    """A Linen tree that holds both into `(base, adapters)`, as the functions of a params tree take them.

    The entry that stands under `lora` beside a `kernel` or an `embedding` becomes the entry of that weight, and one
    that stands under `lora` and the name of another leaf beside it, that of this leaf, whatever parts it has. An
    adapter that stands anywhere else keeps its place; the base has nothing there.

    Args:
      params: nested dicts.
      base: as in `lora_labels`.

    Raises:
      TargetError: a leaf is neither of the base nor of an adapter; an adapter stands in a list.

    >>> both = {'kernel': np.ones((2, 3)), 'lora': {'A': np.ones((2, 1)), 'B': np.ones((1, 3))}}
    >>> own, adapters = split_params(both)
    >>> sorted(own), sorted(adapters), sorted(adapters['kernel'])
    (['kernel'], ['kernel'], ['A', 'B'])
    """
    entries, _ = _find_entries(params, base)
    return _split(params, "", entries)


def _split(module: Mapping[str, Any], at: str, entries: set[str]) -> tuple[Any, Any]:
    base: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    if at in entries:
        return _like(module, base), module
    beside = _beside(module, at, entries)
    for name, node in module.items():
        path = _joined(at, name)
        if name == "lora" and beside:
            adapters.update(beside)
        elif path in entries:
            adapters[name] = node
        elif isinstance(node, Mapping):
            base[name], adapters[name] = _split(node, path, entries)
        else:
            _check_outside(node, path, entries)
            base[name] = node
            adapters.setdefault(name, None)
    return _like(module, base), _like(module, adapters)


def _check_outside(node: Any, path: str, entries: set[str]) -> None:
    """Raises a TargetError for an entry within a list, of which a Linen tree has none."""
    if not isinstance(node, list | tuple):
        return
    for entry in entries:
        if entry.startswith(f"{path}/"):
            raise TargetError(f"{entry}: found an adapter in a {type(node).__name__}, wanted a tree of dicts")


def _beside(module: Mapping[str, Any], at: str, entries: set[str]) -> dict[str, Any]:
    """The entries that stand under `lora`, by the names of the weights beside it."""
    node, path = module.get("lora"), _joined(at, "lora")
    if path in entries:
        weight = _weight_beside(module)
        return {weight: node} if weight else {}
    if isinstance(node, Mapping) and all(_joined(path, name) in entries and _is_leaf(module, name) for name in node):
        return dict(node)
    return {}


def combine_params(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> Any:
    """The Linen tree that holds both: what `split_params` took apart.

    The entry of a `kernel` or an `embedding`, where it is the only one of its module, stands under `lora`; those of
    other leaves, or of several, under `lora` and their names.

    Raises:
      TargetError: an entry stands where a Linen tree has no place for it; the message names the path.

    >>> adapter = {'A': np.ones((2, 1)), 'B': np.ones((1, 3))}
    >>> sorted(combine_params({'w': np.ones((2, 3))}, {'w': adapter})['lora'])
    ['w']
    """
    return _combine(base, adapters, "")


def _combine(base: Mapping[str, Any], adapters: Mapping[str, Any], at: str) -> Any:
    if is_adapter(adapters) and not base:
        return adapters
    combined = dict(base)
    beside: dict[str, Any] = {}
    weight = _weight_beside(base)
    for name, node in adapters.items():
        path = _joined(at, name)
        if is_entry(node) and _is_leaf(base, name):
            if "lora" in base:
                raise TargetError(f"{path}: no place for an adapter: the base has a 'lora' beside the weight already")
            beside[name] = node
        elif is_entry(node):
            if name in base or name in _WEIGHTS or not is_adapter(node):
                found = "a module" if name in base else "nothing"
                raise TargetError(f"{path}: no place for an adapter: the base has {found} there, and no weight")
            combined[name] = node
        elif isinstance(node, Mapping) and isinstance(base.get(name, {}), Mapping):
            combined[name] = _combine(base.get(name, {}), node, path)
        elif node is not None:
            raise TargetError(f"{path}: found {type(node).__name__}, wanted an adapter {{'A', 'B'}} or None")
    if beside:
        combined["lora"] = beside[weight] if [*beside] == [weight] else beside
    return _like(base, combined)


def _weight_beside(module: Mapping[str, Any]) -> str:
    return next((name for name in _WEIGHTS if _is_leaf(module, name)), "")


def _is_leaf(module: Mapping[str, Any], name: str) -> bool:
    return name in module and not isinstance(module[name], Mapping)


def _joined(at: str, name: Any) -> str:
    return f"{at}/{name}" if at else str(name)


def _like(original: Any, content: dict[str, Any]) -> Any:
    make: Callable[[dict[str, Any]], Any] = type(original)
    return make(content)


def count_params(tree: Any) -> int:
    """The number of scalars in a pytree of arrays or shapes.

    >>> count_params({'kernel': np.ones((5, 7)), 'bias': np.ones(7), 'lora': None})
    42
    """
    found = [leaf for leaf in leaves(tree, is_lazy) if not callable(leaf)]
    return sum(math.prod(leaf.shape if is_lazy(leaf) else np.shape(leaf)) for leaf in found)
