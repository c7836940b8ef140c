"""A pytree of arrays in a folder of Orbax, and back to where the arrays at hand lie."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jlora.errors import DataError, shortened
from jlora.paths import leaves_by_path, nest


def array_types(tree: Any) -> dict[str, str]:
    """The dtype and shape of every array by its path."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(tree).items()}


def write_arrays(folder: Path, tree: Any) -> None:
    """Writes the arrays as nested dicts of their paths; random keys as their data, empty arrays not at all.

    Of an array that each of several processes has for itself, as a count, that of the first one is written.

    Raises:
      DataError: Orbax cannot write them; for a full disk its storage raises no OSError.
    """
    arrays = {path: _data(leaf) for path, leaf in leaves_by_path(tree).items() if leaf.size}
    arrays = {path: np.asarray(leaf) if _is_of_this_process(leaf) else leaf for path, leaf in arrays.items()}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        try:
            checkpointer.save(folder, args=ocp.args.StandardSave(nest(arrays)))
        except ValueError as error:
            raise DataError(f"{folder}: cannot be written: {shortened(str(error).strip(), 300)}") from None


def read_arrays(folder: Path, like: Any) -> Any:
    """What `write_arrays` wrote, each array with the sharding of the one in `like`.

    One that is committed to no device there, as a step or a count, is so again, and goes with the others anywhere.

    Raises:
      DataError: Orbax cannot read it.
    """
    targets = {path: _target(leaf) for path, leaf in leaves_by_path(like).items() if leaf.size}
    return _read(folder, nest(targets), like)


def read_old_arrays(folder: Path, like: Any) -> Any:
    """As `read_arrays`, of a named tuple as jlora 0.1 wrote it: in its own structure, before it had `None` fields."""
    fields = {name: value for name, value in like._asdict().items() if value is not None}
    return _read(folder, jax.tree.map(_target, fields), like)


def _read(folder: Path, targets: Any, like: Any) -> Any:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        try:
            found = leaves_by_path(checkpointer.restore(folder, args=ocp.args.StandardRestore(targets)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{folder}: cannot be read: {str(error).strip()[:300]}") from None
    placed = [_placed(found.get(path), leaf) for path, leaf in leaves_by_path(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _is_of_this_process(leaf: Any) -> bool:
    """Whether an array is one of several processes' own, which Orbax would not write."""
    return jax.process_count() > 1 and isinstance(leaf, jax.Array) and leaf.is_fully_addressable


def _data(leaf: Any) -> Any:
    """The numbers of an array or of its shape and dtype."""
    if not _is_key(leaf):
        return leaf
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else jax.eval_shape(jax.random.key_data, leaf)


def _sharding(leaf: Any) -> Any:
    """Where an array has to lie; `None` for one that may lie anywhere."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _target(leaf: Any) -> Any:
    """What Orbax is asked for: an array in its place, or one in the memory of the host."""
    data = _data(leaf)
    if _sharding(leaf) is None or _is_of_this_process(leaf):
        return np.empty(data.shape, data.dtype)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=data.sharding)


def _placed(found: Any, like: Any) -> Any:
    if found is None:  # an empty array
        return like if isinstance(like, jax.Array) else jnp.zeros(like.shape, like.dtype)
    if isinstance(like, np.ndarray):
        return np.asarray(found)
    found = jnp.asarray(found)
    if _is_key(like):
        found = jax.random.wrap_key_data(found, impl=jax.random.key_impl(jnp.empty(0, like.dtype)))
    if _sharding(like) is not None and _is_of_this_process(like):
        return jax.device_put(found, like.sharding)
    return found
