"""The forms that are compared: each makes of a case a problem, the loss and the gradients of one train step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import linen, products, rivals
from benchmarks.problem import Case, Problem
from jlora.adapter import is_entry
from jlora.paths import leaves_by_path, path_string
from jlora.tree import bind


def floor(way: products.Plain, case: Case) -> Problem:
    """No adapters at all: forward, and backward as far as the first activations."""
    workload = case.workload

    def value_and_grad(trained: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        rows = workload.enter(way, frozen, inputs)
        return jax.value_and_grad(lambda rows: workload.loss(workload.body(way, frozen, rows), labels))(rows)

    return Problem((), case.merged_params, value_and_grad, compared="activations")


def full(way: products.Plain, case: Case) -> Problem:
    """Every parameter is trained; by the chain rule their gradients give those of A and B, for the check."""

    def loss(trained: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return case.loss(way, trained, inputs, labels)

    def adapters(grads: Any) -> Any:
        return jax.vjp(lambda tree: jlora.merge_params(case.params, tree, case.config), case.adapters)[1](grads)[0]

    return Problem(case.merged_params, (), jax.value_and_grad(loss), adapters)


def by_hand(way: products.Plain, case: Case) -> Problem:
    """Adapters in a model whose products know them."""

    def loss(trained: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return case.loss(way, products.bind(frozen, trained), inputs, labels)

    return Problem(case.adapters, case.params, jax.value_and_grad(loss))


def by_jlora(way: products.Plain, case: Case) -> Problem:
    """Adapters in the model as it is, by the transform."""
    adapted = jlora.lora(partial(case.workload.apply, way), case.config)

    def loss(trained: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return case.workload.loss(adapted(frozen, trained, inputs), labels)

    return Problem(case.adapters, case.params, jax.value_and_grad(loss))


def by_dora(way: products.Plain, case: Case) -> Problem:
    """DoRA by the transform; each magnitude is its norm, so that the loss and the gradients of A and B are LoRA's."""
    adapted = jlora.lora(partial(case.workload.apply, way), case.config)
    merged, trained = leaves_by_path(case.merged_params), leaves_by_path(case.adapters, is_leaf=jlora.is_adapter)
    entries = bind(case.params, case.adapters, case.config)
    by_path = {}
    for path, adapter in trained.items():
        split = entries[path].split
        squares = jnp.sum(jnp.square(merged[path]), split.axes("i"))  # the batch and out axes, as the weight has them
        order = [*split.axes("b"), *split.axes("o")]
        by_path[path] = adapter | {"magnitude": jnp.sqrt(squares).transpose([sorted(order).index(n) for n in order])}

    def loss(trained: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return case.workload.loss(adapted(frozen, trained, inputs), labels)

    def adapters(grads: Any) -> Any:
        return jax.tree.map(lambda entry: {name: entry[name] for name in "AB"}, grads, is_leaf=is_entry)

    dora = jax.tree_util.tree_map_with_path(
        lambda path, _: by_path[path_string(path)], case.adapters, is_leaf=jlora.is_adapter
    )
    return Problem(dora, case.params, jax.value_and_grad(loss), adapters)


@dataclass(frozen=True)
class Form:
    """A way to write the train step; `package` is that of the other library that it needs."""

    about: str
    build: Callable[[Case], Problem]
    package: str | None = None


PLAIN, FLAT, MERGED = products.PLAIN, products.FLAT, products.Merged()
FORMS = {
    "floor": Form("no adapters, backward for activations only; tokens flattened", partial(floor, FLAT)),
    "floor_plain": Form("the same, products over (batch, time, features)", partial(floor, PLAIN)),
    "full": Form("full fine-tuning as everybody writes it", partial(full, PLAIN)),
    "full_flat": Form("full fine-tuning, tokens flattened", partial(full, FLAT)),
    "hand": Form("x@W + s*(x@A)@B by hand", partial(by_hand, products.Hand(PLAIN))),
    "hand_flat": Form("x@W + s*(x@A)@B by hand, tokens flattened", partial(by_hand, products.Hand(FLAT))),
    "merged": Form("x@(W + s*A@B) by hand", partial(by_hand, MERGED)),
    "jlora": Form("jlora.lora of the plain base", partial(by_jlora, PLAIN)),
    "jlora_dora": Form("jlora.lora with magnitudes (DoRA), of the plain base", partial(by_dora, PLAIN)),
    "jlora_flat": Form("jlora.lora of the flattened base", partial(by_jlora, FLAT)),
    "jlora_linen": Form("jlora.linen.LoRA of a Flax Linen model", linen.jlora_linen),
    "gemma": Form("gemma.peft's interceptor and layers on a Flax Linen model", linen.gemma, "gemma"),
    "qwix": Form("qwix.apply_lora_to_model on a Flax Linen model", linen.qwix, "qwix"),
    "nnx": Form("flax.nnx.LoRALinear in a Flax NNX model", rivals.nnx, "flax"),
    "quax": Form("quax.quaxify of the plain base, over LoraArrays", rivals.quax, "quax"),
}
FLOORS = ("floor", "floor_plain")
