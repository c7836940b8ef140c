"""Where the parts of an entry lie: on the devices of their weight, along its axes as it does."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding, reshard

from jlora.boxes import names_of


def part_sharding(weight: Any, axes: Sequence[int | None]) -> Any:
    """The sharding of a part that has these axes of a weight; along the rank, None among the axes, it is replicated.

    Parts lie in the default memory of their devices, even those of a weight that is kept on the host. Of a sharding
    that names no axes they are replicated over its devices.

    Args:
      weight: an array or a shape.
      axes: of the weight, in the order of the part's.

    Returns:
      A sharding; None for a weight that says none: of NumPy, not committed to a device, a shape without one, or traced
      by jit, which decides later, if no mesh of explicit axes says it before.
    """
    sharding = _sharding_of(weight)
    if sharding is None:
        return None
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*names_of(tuple(sharding.spec), axes)))
    devices = list(sharding.devices_indices_map(tuple(weight.shape)))
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())


def placed(part: jax.Array, weight: Any, axes: Sequence[int | None]) -> jax.Array:
    """The part where its weight says; what is traced as far as its trace lets it, or else where jit puts it."""
    sharding = part_sharding(weight, axes)
    if sharding is None:
        return part
    is_abstract = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)
    if not is_abstract and not isinstance(part, jax.core.Tracer):
        return jax.device_put(part, sharding)
    if not isinstance(sharding, NamedSharding):
        return part
    own, around = set(sharding.mesh.axis_types), set(jax.sharding.get_abstract_mesh().axis_types)
    is_explicit = is_abstract or own == {AxisType.Explicit}  # a type names explicit axes alone
    if is_explicit and any(sharding.spec) and AxisType.Explicit in around:
        return reshard(part, sharding)
    if own == {AxisType.Auto} and not is_abstract and around <= {AxisType.Auto}:  # shard_map has axes of its own
        return lax.with_sharding_constraint(part, sharding)
    return part


def _sharding_of(weight: Any) -> Any:
    if isinstance(weight, jax.core.Tracer):
        return jax.typeof(weight).sharding
    if isinstance(weight, jax.Array) and not weight.committed:
        return None
    return getattr(weight, "sharding", None)
