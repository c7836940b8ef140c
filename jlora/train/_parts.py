"""A batch in parts: gradients and values of the whole, in the memory of a part."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jlora.errors import DataError
from jlora.paths import leaves_by_path
from jlora.train._loss import Returned, widened

Part = Callable[[Any, chex.PRNGKey, Any], tuple[Any, Returned]]  # (part, key, model state) -> what is added, returned


def added(run: Part, batch: Any, key: chex.PRNGKey, model_state: Any, count: int) -> tuple[Any, Returned]:
    """The sum over the parts of what `run` gives, one after the other, each with a key of its own.

    The model state goes from one part to the next.

    Args:
      run: `run(part, key, model_state) -> (tree to add, Returned)`.
      count: into how many parts.

    Raises:
      DataError: the batch cannot be split evenly.
    """
    if count == 1:
        return run(batch, key, model_state)
    leaves, structure = jax.tree.flatten(batch)
    _check(batch, count)
    split = [_split(leaf, count) if jnp.ndim(leaf) else None for leaf in leaves]

    def part(rows: list[Any]) -> Any:
        whole = [leaf if row is None else row for leaf, row in zip(leaves, rows, strict=True)]
        return jax.tree.unflatten(structure, whole)

    def values(rows: list[Any], key: chex.PRNGKey, model_state: Any) -> tuple[Any, Any]:
        tree, returned = run(part(rows), key, model_state)
        return (jax.tree.map(widened, tree), returned.value, returned.metrics), returned.model_state

    def add(carry: tuple[Any, Any], item: tuple[list[Any], chex.PRNGKey]) -> tuple[tuple[Any, Any], None]:
        total, model_state = carry
        found, model_state = values(*item, model_state)
        return (jax.tree.map(jnp.add, total, found), model_state), None

    keys = jax.random.split(key, count)
    first = [row if row is None else row[0] for row in split]
    shapes, _ = jax.eval_shape(values, first, keys[0], model_state)
    (total, model_state), _ = jax.lax.scan(add, (jax.tree.map(_zeros, shapes), model_state), (split, keys))
    tree, value, metrics = total
    return tree, Returned(value, metrics, model_state)


def _check(batch: Any, count: int) -> None:
    lengths = {path: jnp.shape(leaf)[0] for path, leaf in leaves_by_path(batch).items() if jnp.ndim(leaf)}
    for length in lengths.values():
        if length % count:
            raise DataError(f"a batch of {length} examples cannot be split into accumulate = {count} equal parts")
    if len(set(lengths.values())) > 1:
        raise DataError(f"the arrays of a batch differ in length: {lengths}; only scalars are given to every part")


def _split(leaf: chex.Array, count: int) -> chex.Array:
    """The parts along a new leading axis; part k has the rows k, k + count, k + 2 count and so on.

    So a device that holds a range of rows has its share of every part, and no row goes to another device.
    """
    rows = leaf.shape[0] // count
    spread = _devices(leaf)
    if rows % spread:
        raise DataError(
            f"a batch of {leaf.shape[0]} examples in accumulate = {count} parts gives parts of {rows}, which "
            f"{spread} devices cannot share evenly"
        )
    return jnp.moveaxis(jnp.reshape(leaf, (rows, count, *leaf.shape[1:])), 1, 0)


def _devices(leaf: chex.Array) -> int:
    """How many devices share the examples of an array, where its type says so (a mesh with explicit axes)."""
    sharding = jax.typeof(leaf).sharding
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def _zeros(like: jax.ShapeDtypeStruct) -> chex.Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)
