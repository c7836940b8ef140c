"""Where A and B lie that jit traces for weights at hand, or shapes: as the weights do, over eight devices."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
from tests.storage.devices import run_with_devices
from tests.tree.test_shardings import CONFIG, LAYOUTS, check, mesh_of, shardings_of, wanted_of, weights


def in_context(mesh: Any) -> Any:
    return (getattr(jax, "set_mesh", None) or jax.sharding.use_mesh)(mesh)  # public as jax.set_mesh since JAX 0.8


def close(found: Any, wanted: Any) -> None:
    """Under jit XLA fuses the products of the draw, and rounds otherwise than they do one by one."""
    np.testing.assert_array_max_ulp(found, wanted, 2)


def shapes_and_arrays_closed_over(_: Path) -> None:
    key, plain = jax.random.key(5), jlora.init_lora(jax.random.key(5), weights(), CONFIG)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind)
        with in_context(mesh):
            for layout in LAYOUTS:
                spread, wanted = jax.device_put(weights(), shardings_of(layout, mesh)), wanted_of(layout, mesh)
                shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), spread)
                for params in (spread, shapes):
                    made = jax.jit(lambda key, params=params: jlora.init_lora(key, params, CONFIG))(key)
                    check(made, wanted)
                    jax.tree.map(close, made, plain)
                if kind == AxisType.Explicit:  # shapes on a mesh without devices
                    check(jlora.init_lora(key, jax.eval_shape(lambda params: params, spread), CONFIG), wanted)
    mesh = mesh_of()
    spread = jax.device_put(weights(), shardings_of("fsdp", mesh))
    inside = jax.shard_map(lambda key: jlora.init_lora(key, spread, CONFIG), mesh=mesh, in_specs=P(), out_specs=P())
    jax.tree.map(close, jax.jit(inside)(key), plain)


def test_closed_over(tmp_path: Path) -> None:
    run_with_devices(__name__, "shapes_and_arrays_closed_over", tmp_path)
