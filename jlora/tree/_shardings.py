"""The shardings of a tree of adapters, as they follow from those of its weights."""

from typing import Any

import jax

from jlora.adapter import is_entry, part_axes, part_sharding
from jlora.boxes import box_like, unboxed
from jlora.config import LoraConfig
from jlora.errors import JloraError, TargetError
from jlora.lazy import is_lazy
from jlora.paths import leaves_by_path, path_string
from jlora.tree._bind import split_of
from jlora.tree._params import adapter_shapes
from jlora.tree._targets import shapes_by_path


def adapter_shardings(params: Any, config: LoraConfig, *, adapters: Any = None, shardings: Any = None) -> Any:
    """Where `init_lora` puts the adapters of a params tree: a sharding for each part, for `jit` and `jax.device_put`.

    A has the weight's sharding along its batch and in axes, B along its batch and out axes, a magnitude along both; a
    value and an offset have all of it. The rank is replicated. All lie in the devices' default memory.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`, which say by their `sharding` where they lie.
      config: what is adapted and how; with every factorization, as `resolve_config` returns it, if the weights are not
        named as Flax's.
      adapters: those at hand, arrays or shapes; those of `init_lora` where None.
      shardings: of params, for shapes that do not say it: a tree of `jax.sharding.Sharding`, or a prefix of one.

    Returns:
      A tree of the structure of the adapters; None for the parts of a weight that says no sharding: of NumPy, not
      committed to a device, or traced by jit, which decides later, if no mesh of explicit axes says it before.

    Raises:
      TargetError: the configuration, or the adapters, do not fit the tree.

    >>> mesh = jax.make_mesh((1,), ('data',))
    >>> params = {'kernel': jax.ShapeDtypeStruct((5, 7), 'float32')}
    >>> rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data', None))
    >>> config = LoraConfig(rank=2)
    >>> found = adapter_shardings(params, config, shardings=rows)
    >>> found['kernel']['A'].spec == rows.spec, found['kernel']['B'].is_fully_replicated
    (True, True)
    >>> from jlora import init_lora
    >>> init = jax.jit(lambda key: init_lora(key, params, config), out_shardings=found)
    >>> init(jax.random.key(0))['kernel']['A'].shape
    (5, 2)
    """
    if adapters is None:
        adapters = adapter_shapes(params, config)
    weights = leaves_by_path(params if shardings is None else _with(params, shardings))
    shapes = shapes_by_path(params)

    def shardings_at(key_path: Any, parts: Any) -> Any:
        path = path_string(key_path)
        if not is_entry(parts) or path not in weights:
            found = "no leaf of params" if is_entry(parts) else type(parts).__name__
            raise TargetError(f"{path}: found {found}, wanted an adapter {{'A', 'B'}} of a weight, or None")
        try:
            axes = part_axes(len(shapes[path]), split_of(path, shapes, unboxed(parts), config))
        except JloraError as error:
            raise TargetError(f"{path}: {error}") from None
        return {name: box_like(part, part_sharding(weights[path], axes[name])) for name, part in parts.items()}

    return jax.tree_util.tree_map_with_path(shardings_at, adapters, is_leaf=is_entry)


def _with(params: Any, shardings: Any) -> Any:
    """The shapes of params with these shardings, a tree that is a prefix of it."""

    def shapes(sharding: Any, subtree: Any) -> Any:
        def shape(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape, subtree, is_leaf=is_lazy)

    try:
        return jax.tree.map(shapes, shardings, params, is_leaf=lambda node: node is None)
    except ValueError as error:
        raise TargetError(f"shardings: they are no prefix of params: {error}") from None
