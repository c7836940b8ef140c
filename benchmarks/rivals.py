"""flax.nnx and quax: adapters that are layers, and adapters that are arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx as flax_nnx
from flax.traverse_util import flatten_dict

from benchmarks.layers import Leaf, Stack, Static, adapter_grads, adapters_by_path, leaves_of, module_params
from benchmarks.problem import Case, Problem, Unsupported
from benchmarks.products import PLAIN, RANK, SCALE, Plain
from jlora.paths import path_string

A, B = ("lora", "lora_a"), ("lora", "lora_b")


class NnxProducts(Plain):
    """Products that are NNX layers."""

    def linear(self, x: jax.Array, weight: Any) -> jax.Array:
        return weight(x)

    def scan(self, block: Callable[..., jax.Array], x: jax.Array, layers: "Layers") -> jax.Array:
        graph, stack = flax_nnx.split(layers)

        @jax.checkpoint
        def one(x: jax.Array, layer: Any) -> jax.Array:
            return block(self, flax_nnx.merge(graph, layer).tree(), x)

        return jax.lax.scan(lambda x, layer: (one(x, layer), None), x, stack)[0]


class Layers(flax_nnx.Module):
    """The layers and parameters of a tree of leaves, by name."""

    def __init__(self, leaves: Any, arrays: dict[tuple[str, ...], jax.Array]) -> None:
        self.leaves = Static(leaves)
        for leaf in jax.tree.leaves(leaves):
            own = {place[1:]: array for place, array in arrays.items() if place[0] == leaf.name}
            setattr(self, leaf.name, nnx_layer(leaf, own))

    def tree(self) -> Any:
        def one(leaf: Any) -> Any:
            found = getattr(self, leaf.name)
            return found[...] if isinstance(leaf, Leaf) and not leaf.adapted else found

        return jax.tree.map(one, self.leaves.value)


def nnx_layer(leaf: Leaf | Stack, own: dict[tuple[str, ...], jax.Array]) -> Any:
    """The layer, the parameter or the stack of layers that a leaf stands for, with these arrays."""
    if isinstance(leaf, Stack):
        return Layers(leaf.leaves, own)
    if not leaf.adapted:
        return flax_nnx.Param(own[()])
    layer = flax_nnx.LoRALinear(*leaf.shape, lora_rank=RANK, use_bias=False, rngs=flax_nnx.Rngs(0))
    layer.kernel = flax_nnx.Param(own["kernel",])
    layer.lora.lora_a, layer.lora.lora_b = flax_nnx.LoRAParam(own[A]), flax_nnx.LoRAParam(own[B])
    return layer


def nnx(case: Case) -> Problem:
    if case.workload.unmatched:
        raise Unsupported(f"flax.nnx has LoRA and LoRALinear for matrices, none for a {case.workload.unmatched}.")
    leaves = leaves_of(case).value
    arrays, base = module_params(case, A, B, SCALE)
    graph, trained, frozen = flax_nnx.split(Layers(leaves, {**arrays, **base}), flax_nnx.LoRAParam, ...)

    def loss(trained: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        model = flax_nnx.merge(graph, trained, frozen)
        return case.workload.loss(case.workload.apply(NnxProducts(), model.tree(), inputs), labels)

    def adapters(grads: Any) -> Any:
        return adapter_grads(case, flatten_dict(flax_nnx.to_pure_dict(grads)), A, B, SCALE)

    return Problem(trained, frozen, jax.value_and_grad(loss), adapters)


def quax(case: Case) -> Problem:
    """The base as it is, its adapted leaves arrays of another kind; what such an array cannot do it refuses."""
    import equinox
    import quax as library
    from quax.examples.lora import LoraArray

    adapters = adapters_by_path(case)

    def array(path: Any, weight: jax.Array) -> Any:
        adapter = adapters.get(path_string(path))
        if adapter is None:
            return weight
        empty = LoraArray(weight, rank=RANK, key=jax.random.key(0))
        return equinox.tree_at(lambda node: (node.a, node.b), empty, (adapter["A"], SCALE * adapter["B"]))

    def loss(trained: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        model = library.quaxify(partial(case.workload.apply, PLAIN))
        return case.workload.loss(model(equinox.combine(trained, frozen), inputs), labels)

    def grads_of(grads: Any) -> Any:
        def one(node: Any) -> Any:
            return {"A": node.a, "B": SCALE * node.b} if isinstance(node, LoraArray) else None

        return jax.tree.map(one, grads, is_leaf=lambda node: node is None or isinstance(node, LoraArray))

    if case.workload.unmatched:
        raise Unsupported(f"quax's LoraArray has a rule for dot_general only, none for a {case.workload.unmatched}.")
    if case.workload.stacked:
        raise Unsupported("quax has no rule for jax.checkpoint: its LoraArray refuses to be materialised there.")
    tree = jax.tree_util.tree_map_with_path(array, case.params)
    is_ab = jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "name", None) in ("a", "b"), tree)
    trained, frozen = equinox.partition(tree, is_ab)
    return Problem(trained, frozen, jax.value_and_grad(loss), grads_of)
