"""What differs between the versions of JAX."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn


def bind(eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """The equation as it stands, on other inputs; always a sequence of outputs."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)  # before JAX 0.9 functions stand apart
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def jaxpr_and_consts(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants; before JAX 0.12 an open one has none."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


def scan_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a scan that later versions dropped."""
    return {"_split_transpose": True} if params.get("_split_transpose") else {}


def mapped_axes(params: Mapping[str, Any]) -> set[str]:
    """The axes of the mesh that a shard_map is over; renamed in JAX 0.10."""
    return set(params.get("manual_axes") or params["newly_manual_axes"])


def varying_axes(array: Any) -> tuple[str, ...]:
    """The axes of the mesh over which an array varies, within shard_map."""
    aval: Any = jax.typeof(array)
    kind = getattr(aval, "manual_axis_type", None)  # JAX 0.10
    return tuple(sorted(aval.vma if kind is None else kind.varying))


def varied(array: Any, axes: Sequence[str]) -> Any:
    """The array, varying over these axes too; lax.pvary was renamed in JAX 0.8."""
    more = tuple(axis for axis in axes if axis not in varying_axes(array))
    if not more:
        return array
    cast: Any = getattr(lax, "pcast", None)
    pvary: Any = getattr(lax, "pvary", None)
    return cast(array, more, to="varying") if cast else pvary(array, more)
