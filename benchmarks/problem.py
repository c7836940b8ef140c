"""A case, the arrays that every form gets, and a problem, the train step that a form makes of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks import products
from benchmarks.workloads import Workload

LEARNING_RATE = 1e-4


class Unsupported(Exception):  # noqa: N818 - not an error of the run: the cell is left empty
    """A form cannot do a workload; the message is the sentence that says why."""


def noisy(key: jax.Array, params: Any, adapters: Any) -> Any:
    """The adapters with random A and B, every update a third of its weight: what is too small is not seen missing."""
    count = iter(range(len(jax.tree.leaves(params))))

    def one(weight: jax.Array, adapter: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, next(count)))
        std = jnp.sqrt(0.3 * weight.std() / (products.SCALE * math.sqrt(products.RANK)))
        draw = (std * jax.random.normal(k, adapter[name].shape) for k, name in zip(keys, "AB", strict=True))
        return dict(zip("AB", draw, strict=True))

    return jax.tree.map(lambda weight, adapter: adapter and one(weight, adapter), params, adapters)


@dataclass(frozen=True)
class Case:
    """A workload with its arrays, the same for every form."""

    workload: Workload
    config: jlora.LoraConfig
    params: Any
    adapters: Any
    inputs: jax.Array
    labels: jax.Array

    @classmethod
    def make(cls, workload: Workload, rank: int = products.RANK) -> "Case":
        """Random params, data and adapters; B is not zero, or a wrong update could not be seen."""
        config = jlora.LoraConfig(rank=rank, alpha=products.ALPHA, target_modules=workload.targets)
        keys = jax.random.split(jax.random.key(0), 4)
        params, inputs = workload.init(keys[0]), workload.data(keys[1])
        fn = partial(workload.apply, products.PLAIN)
        labels = workload.label(jax.jit(fn)(params, inputs))
        adapters = jlora.init_lora(keys[2], params, config, fn=fn, args=(inputs,))
        adapters = noisy(keys[3], params, adapters)
        return cls(workload, config, params, adapters, inputs, labels)

    def timed(self) -> "Case":
        """The case with its arrays in the dtype in which it is timed."""
        dtype, arrays = self.workload.dtype, (self.params, self.adapters, self.inputs, self.labels)
        if dtype == jnp.float32:
            return self
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, arrays)
        return Case(self.workload, self.config, *cast)

    @cached_property
    def merged_params(self) -> Any:
        """What the forms without adapters start from, so that their loss is the same number."""
        return jlora.merge_params(self.params, self.adapters, self.config)

    def loss(self, way: products.Plain, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return self.workload.loss(self.workload.apply(way, params, inputs), labels)


@dataclass(frozen=True)
class Problem:
    """The loss and the gradients that a form computes.

    Attributes:
      trained: the pytree that Adam updates; empty for the floor, which has gradients but nothing to update.
      frozen: the pytree that stays.
      value_and_grad: (trained, frozen, inputs, labels) -> (loss, gradients).
      adapters: brings the gradients of `trained` into the structure of jlora's adapters, for the check.
      compared: what the gradients are compared with: those of the "adapters" or of the "activations".
    """

    trained: Any
    frozen: Any
    value_and_grad: Callable[..., tuple[jax.Array, Any]]
    adapters: Callable[[Any], Any] = lambda grads: grads
    compared: str = "adapters"

    def state(self) -> Any:
        """Arrays of this problem's own, which each step may overwrite."""
        trained = jax.tree.map(lambda leaf: leaf.copy(), self.trained)
        return trained, optax.adam(LEARNING_RATE).init(trained)

    def step(self, state: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        """(state, what else a step computes): the floor returns its gradients, or XLA would leave them out."""
        trained, moments = state
        loss, grads = self.value_and_grad(trained, frozen, inputs, labels)
        if not jax.tree.leaves(trained):
            return state, (loss, grads)
        updates, moments = optax.adam(LEARNING_RATE).update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), loss
