"""Where the parts of an entry lie: on the devices of their weight, along its axes as it does."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

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
    """The part where its weight says; what is traced is left to jit, if no mesh of explicit axes says it."""
    sharding = part_sharding(weight, axes)
    if sharding is None:
        return part
    if isinstance(part, jax.core.Tracer):
        is_explicit = isinstance(weight, jax.core.Tracer) and any(sharding.spec)
        in_mesh = is_explicit and not jax.sharding.get_abstract_mesh().empty
        return jax.sharding.reshard(part, sharding) if in_mesh else part
    is_abstract = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)
    return part if is_abstract else jax.device_put(part, sharding)


def _sharding_of(weight: Any) -> Any:
    if isinstance(weight, jax.core.Tracer):
        return jax.typeof(weight).sharding
    if isinstance(weight, jax.Array) and not weight.committed:
        return None
    return getattr(weight, "sharding", None)
