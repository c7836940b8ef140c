"""Labels and masks for optax, the two halves of a Linen tree that holds both, and counts."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapter import is_adapter
from jlora.errors import TargetError

_WEIGHTS = ("kernel", "embedding")


def _mark(tree: Any, adapter: Any, other: Any) -> Any:
    def mark(node: Any) -> Any:
        return jax.tree.map(lambda _: adapter, node) if is_adapter(node) else other

    return jax.tree.map(mark, tree, is_leaf=is_adapter)


def lora_labels(tree: Any) -> Any:
    """`"lora"` at every A and B of a tree, `"frozen"` elsewhere, for `optax.partition`.

    >>> lora_labels({'kernel': jnp.ones((2, 3)), 'lora': {'A': jnp.ones((2, 1)), 'B': jnp.ones((1, 3))}})
    {'kernel': 'frozen', 'lora': {'A': 'lora', 'B': 'lora'}}
    """
    return _mark(tree, "lora", "frozen")


def lora_mask(tree: Any) -> Any:
    """`True` at every A and B of a tree, `False` elsewhere.

    `optax.masked` alone does not freeze: it passes the gradients of the other leaves through. Use `lora_labels` with
    `optax.partition`, or take gradients of the adapters alone.
    """
    return _mark(tree, True, False)


def split_params(params: Mapping[str, Any]) -> tuple[Any, Any]:
    """A Linen tree that holds both into `(base, adapters)`, as the functions of a params tree take them.

    The adapter that stands under `lora` beside a `kernel` or an `embedding` becomes the adapter of that weight, and one
    that stands under `lora` and the name of another leaf beside it, that of this leaf. An adapter that stands anywhere
    else keeps its place; the base has nothing there.

    >>> both = {'kernel': jnp.ones((2, 3)), 'lora': {'A': jnp.ones((2, 1)), 'B': jnp.ones((1, 3))}}
    >>> base, adapters = split_params(both)
    >>> sorted(base), sorted(adapters), sorted(adapters['kernel'])
    (['kernel'], ['kernel'], ['A', 'B'])
    """
    base: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    if is_adapter(params):
        return _like(params, base), params
    beside = _beside(params)
    for name, node in params.items():
        if name == "lora" and beside:
            adapters.update(beside)
        elif is_adapter(node):
            adapters[name] = node
        elif isinstance(node, Mapping):
            base[name], adapters[name] = split_params(node)
        else:
            base[name] = node
            adapters.setdefault(name, None)
    return _like(params, base), _like(params, adapters)


def combine_params(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> Any:
    """The Linen tree that holds both: what `split_params` took apart.

    The adapter of a `kernel` or an `embedding`, where it is the only one of its module, stands under `lora`; those of
    other weights, or of several, under `lora` and the names of the weights.

    Raises:
      TargetError: an adapter stands where a Linen tree has no place for it; the message names the path.

    >>> adapter = {'A': jnp.ones((2, 1)), 'B': jnp.ones((1, 3))}
    >>> sorted(combine_params({'w': jnp.ones((2, 3))}, {'w': adapter})['lora'])
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
        path = f"{at}{name}"
        if is_adapter(node) and _is_leaf(base, name):
            if "lora" in base:
                raise TargetError(f"{path}: no place for an adapter: the base has a 'lora' beside the weight already")
            beside[name] = node
        elif is_adapter(node):
            if name in base or name in _WEIGHTS:
                found = "a module" if name in base else "nothing"
                raise TargetError(f"{path}: no place for an adapter: the base has {found} there, and no weight")
            combined[name] = node
        elif isinstance(node, Mapping) and isinstance(base.get(name, {}), Mapping):
            combined[name] = _combine(base.get(name, {}), node, f"{path}/")
        elif node is not None:
            raise TargetError(f"{path}: found {type(node).__name__}, wanted an adapter {{'A', 'B'}} or None")
    if beside:
        combined["lora"] = beside[weight] if [*beside] == [weight] else beside
    return _like(base, combined)


def _beside(module: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters that stand under `lora`, by the names of the weights beside it."""
    node = module.get("lora")
    if is_adapter(node):
        weight = _weight_beside(module)
        return {weight: node} if weight else {}
    if isinstance(node, Mapping) and all(is_adapter(entry) and _is_leaf(module, name) for name, entry in node.items()):
        return dict(node)
    return {}


def _weight_beside(module: Mapping[str, Any]) -> str:
    return next((name for name in _WEIGHTS if _is_leaf(module, name)), "")


def _is_leaf(module: Mapping[str, Any], name: str) -> bool:
    return name in module and not isinstance(module[name], Mapping)


def _like(original: Any, content: dict[str, Any]) -> Any:
    make: Callable[[dict[str, Any]], Any] = type(original)
    return make(content)


def count_params(tree: Any) -> int:
    """The number of scalars in a pytree of arrays or shapes.

    >>> count_params({'kernel': jnp.ones((5, 7)), 'bias': jnp.ones(7), 'lora': None})
    42
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree) if not callable(leaf))
