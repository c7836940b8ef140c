"""What a primitive is called, and whether it is JAX's: one of another library may have the same name.

Most primitives of JAX stand in public modules. Of those that have a rule and do not, a public function of JAX gives the
object, in the jaxpr of a tiny program. Others that JAX keeps to itself, none of which has a rule, are known by name.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import ad_checkpoint, lax
from jax.extend.core import Primitive, primitives
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, auto_axes, reshard

from jlora.transform._jax import jaxpr_and_consts, varied


def primitive_of_jax(name: str) -> Primitive | None:
    """The primitive that has this name in JAX; None if there is none, or only a private module of JAX has it."""
    return _public().get(name) or _traced(name)


def name_of_primitive(primitive: Primitive) -> str:
    """The name of a primitive; that of another library's says so where JAX has one of this name."""
    name: str = primitive.name
    return name if primitive_of_jax(name) in (None, primitive) else f"{name} (not JAX's)"


@functools.cache
def _public() -> Mapping[str, Primitive]:
    """The primitives in public modules, by name."""
    found = {}
    for module in (primitives, lax, lax.linalg, ad_checkpoint):
        for value in vars(module).values():
            if isinstance(value, Primitive):
                found[value.name] = value
    return found


@functools.cache
def _traced(name: str) -> Primitive | None:
    """The primitive of this name in its tiny program; None if there is none, or JAX has no such primitive any more.

    It is traced in a thread of its own: a mesh that is set, or a shard_map around the call, would get in its way.
    """
    if name not in _TINY:
        return None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        traced = pool.submit(jax.make_jaxpr(_TINY[name]), jax.ShapeDtypeStruct((2, 2), "float32"))
    return next((found for found in _within(traced.result()) if found.name == name), None)


def _within(jaxpr: Any) -> Iterator[Primitive]:
    """The primitives of a program and of the programs in it."""
    for eqn in jaxpr_and_consts(jaxpr)[0].eqns:
        yield eqn.primitive
        for value in eqn.params.values():
            if hasattr(jaxpr_and_consts(value)[0], "eqns"):
                yield from _within(value)


def _on_mesh(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A shard_map over one axis of a mesh, of which another one is explicit."""
    mesh = AbstractMesh((1, 1), ("d", "e"), axis_types=(AxisType.Auto, AxisType.Explicit))
    return jax.shard_map(fn, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("d"), axis_names={"d"})


_TINY: Mapping[str, Callable[[jax.Array], Any]] = {
    "mesh_cast": lambda x: _on_mesh(auto_axes(lambda x: x, axes="e", out_sharding=PartitionSpec("e")))(x),
    "name": lambda x: ad_checkpoint.checkpoint_name(x, "x"),
    "pvary": lambda x: _on_mesh(lambda x: varied(x, ("d",)))(x),
    "ragged_dot_general": lambda x: lax.ragged_dot(x, x[None], lax.iota("int32", 1)),
    "remat2": jax.checkpoint(lambda x: -x),
    "reshard": lambda x: _on_mesh(lambda x: reshard(x, PartitionSpec("e")))(x),
    "shard_map": lambda x: _on_mesh(lambda x: x)(x),
}
