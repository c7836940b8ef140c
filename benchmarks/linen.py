"""jlora.linen, gemma.peft and qwix: the workloads as Flax Linen modules that each turns into adapted ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict

import jlora
from benchmarks.layers import (
    Leaf,
    Place,
    Stack,
    Static,
    adapter_grads,
    adapters_by_path,
    leaves_of,
    module_params,
    places,
)
from benchmarks.problem import Case, Problem, Unsupported
from benchmarks.products import ALPHA, RANK, SCALE, Plain
from jlora.linen import LoRA


class LinenProducts(Plain):
    """Products that are Linen layers, made in the compact method that calls them."""

    def linear(self, x: jax.Array, weight: Leaf) -> jax.Array:
        return nn.Dense(weight.shape[-1], use_bias=False, name=weight.name)(x)

    def conv(self, x: jax.Array, kernel: Leaf, stride: int = 1) -> jax.Array:
        return nn.Conv(kernel.shape[-1], kernel.shape[:2], stride, use_bias=False, name=kernel.name)(x)

    def scan(self, block: Callable[..., jax.Array], x: jax.Array, layers: Stack) -> jax.Array:
        body = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=layers.length,
        )
        return body(block, Static(layers.leaves), name=layers.name)(x, None)[0]


def declared(module: nn.Module, leaves: Static) -> Any:
    """The leaves, with a parameter of the module in place of each that is no weight."""

    def one(leaf: Any) -> Any:
        plain = isinstance(leaf, Leaf) and not leaf.adapted
        return module.param(leaf.name, nn.initializers.zeros, leaf.shape) if plain else leaf

    return jax.tree.map(one, leaves.value)


class Block(nn.Module):
    """A layer of a stack, as nn.scan wants it."""

    block: Any
    leaves: Static

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return self.block(LinenProducts(), declared(self, self.leaves), x), None


class Model(nn.Module):
    """A workload."""

    workload: Any
    leaves: Static

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.workload.apply(LinenProducts(), declared(self, self.leaves), inputs)


def linen_problem(case: Case, model: nn.Module, a: Place, b: Place, folded: float) -> Problem:
    """A Linen model whose layers hold A and B at `a` and `b`; `folded` is the part of the scale that B holds."""

    def loss(trained: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return case.workload.loss(model.apply({"params": unflatten_dict({**frozen, **trained})}, inputs), labels)

    trained, frozen = module_params(case, a, b, folded)
    return Problem(trained, frozen, jax.value_and_grad(loss), lambda grads: adapter_grads(case, grads, a, b, folded))


def jlora_linen(case: Case) -> Problem:
    if case.workload.unmatched == "lookup in a table":
        raise Unsupported("The Linen model of this benchmark has no layer that looks up in a table.")
    place = places(case)
    targets = tuple("/".join((*place[path], "kernel")) for path in adapters_by_path(case))
    config = jlora.LoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
    return linen_problem(case, LoRA(Model(case.workload, leaves_of(case)), config), ("lora", "A"), ("lora", "B"), 1.0)


class GemmaLoRA(nn.Module):
    """What gm.nn.LoRA does, without the import of all of gemma: the interceptor puts its own layers in."""

    model: nn.Module

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope is not None:
            nn.share_scope(self, self.model)

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        from gemma import peft

        def adapted(module: nn.Module) -> nn.Module:
            if not isinstance(module, nn.Dense):
                return module
            return peft.LoRADense(rank=RANK, dtype=jnp.float32, wrapped=module)

        with peft.ModuleInterceptor(adapted):
            return self.model(inputs)


def gemma(case: Case) -> Problem:
    if case.workload.unmatched:
        raise Unsupported(f"gemma.peft wraps Dense, DenseGeneral and Einsum, no {case.workload.unmatched}.")
    model = GemmaLoRA(Model(case.workload, leaves_of(case)))
    return linen_problem(case, model, ("lora", "a"), ("lora", "b"), SCALE)


def qwix(case: Case) -> Problem:
    import qwix as library

    if case.workload.unmatched == "lookup in a table":
        raise Unsupported("qwix.LoraProvider adapts dot_general, einsum and convolutions, no lookup in a table.")
    provider = library.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    model = library.apply_lora_to_model(Model(case.workload, leaves_of(case)), provider)
    return linen_problem(case, model, ("kernel_lora_a",), ("kernel_lora_b",), 1.0)
