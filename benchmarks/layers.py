"""What the Flax forms share: the model code of `benchmarks.workloads`, run over products that are layers.

A leaf of params is then a `Leaf`, a name and a shape, in place of which a layer is called.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.problem import Case
from benchmarks.products import SCALE
from jlora.paths import leaves_by_path, path_string

Place = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """A leaf of params by its name in a module; `adapted` where a layer with an adapter is called."""

    name: str
    shape: tuple[int, ...]
    adapted: bool


@dataclass(frozen=True, eq=False)
class Stack:
    """The leaves of a stack of layers, each without the axis of the stack; no pytree, but a leaf of one."""

    name: str
    length: int
    leaves: Any


@dataclass(frozen=True, eq=False)
class Static:
    """A value that a module's fields leave as it is: Flax looks into dicts and lists, not into this."""

    value: Any


def leaves_of(case: Case) -> Static:
    """The params of a case with each leaf a `Leaf`, and what is stacked a `Stack`."""
    stacked = case.workload.stacked

    def leaves(params: Any, adapters: Any, stack: bool) -> Any:
        def leaf(path: Any, weight: jax.Array, adapter: Any) -> Leaf:
            return Leaf(path_string(path).replace("/", "_"), weight.shape[stack:], adapter is not None)

        return jax.tree_util.tree_map_with_path(leaf, params, adapters)

    tree = leaves(case.params, case.adapters, False)
    if stacked:
        inner = leaves(case.params[stacked], case.adapters[stacked], True)
        tree[stacked] = Stack(stacked, len(jax.tree.leaves(case.params[stacked])[0]), inner)
    return Static(tree)


def places(case: Case) -> dict[str, Place]:
    """Path in params -> where the leaf stands in a module: by its name, or by that of its stack and its own."""

    def place(path: str) -> Place:
        head, _, rest = path.partition("/")
        return (head, rest.replace("/", "_")) if head == case.workload.stacked else (path.replace("/", "_"),)

    return {path: place(path) for path in leaves_by_path(case.params)}


def module_params(case: Case, a: Place, b: Place, scale: float) -> tuple[dict[Place, Any], dict[Place, Any]]:
    """What a module trains and what not, by place; A and B stand at `a` and `b` within their layer.

    A library that has no alpha gets the scale within B: s*(x@A)@B = (x@A)@(s*B).
    """
    weights = leaves_by_path(case.params)
    adapters = adapters_by_path(case)
    trained, frozen = {}, {}
    for path, place in places(case).items():
        if path in adapters:
            frozen[(*place, "kernel")] = weights[path]
            trained[place + a] = adapters[path]["A"]
            trained[place + b] = scale * adapters[path]["B"]
        else:
            frozen[place] = weights[path]
    return trained, frozen


def adapter_grads(case: Case, grads: Mapping[Place, Any], a: Place, b: Place, scale: float = SCALE) -> Any:
    """The gradients of what `module_params` trains, as a tree of jlora's adapters."""
    adapters, place = adapters_by_path(case), places(case)

    def one(path: Any, _: jax.Array) -> Any:
        path = path_string(path)
        return {"A": grads[place[path] + a], "B": scale * grads[place[path] + b]} if path in adapters else None

    return jax.tree_util.tree_map_with_path(one, case.params)


def adapters_by_path(case: Case) -> dict[str, Any]:
    """The adapters alone."""

    def is_adapter(node: Any) -> bool:
        return isinstance(node, dict) and set(node) == {"A", "B"}

    found = leaves_by_path(case.adapters, is_leaf=is_adapter)
    return {path: adapter for path, adapter in found.items() if adapter is not None}
