"""A mesh of explicit axes over eight devices, in a process of its own: shardings are part of types."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.contraction import Factorization
from tests.storage.devices import run_with_devices
from tests.transform.test_primitives import FACTORED, MERGED

IDS = np.array([3, 1, 0, 7], np.int32)
COLUMNS, ROWS, WHOLE = ((None, "m"), ("d", None)), (("m", None), ("d", "m")), ((None, None), ("d", None))


def looked_up(w: Any, *spec: Any) -> Any:
    return w.at[jnp.asarray(IDS)].get(out_sharding=P(*(spec or ("d", None))))


def by_rows(w: Any, x: Any) -> Any:
    return jnp.einsum("ti,io->to", x, w, out_sharding=P("d", None))


def in_auto_axes(w: Any, x: Any) -> Any:
    return jax.sharding.auto_axes(lambda w, x: x @ w, out_sharding=P("d", None))(w, x)


def scanned(w: Any, x: Any) -> Any:
    return lax.scan(lambda c, s: (c, by_rows(w, c * s)), x, jnp.arange(3.0))[1]


def with_time(x: Any) -> Any:
    return jnp.stack([x, 2 * x], 1)  # (batch, time, in)


def conv(*spec: Any, groups: int = 1) -> Callable[[Any, Any], Any]:
    """A convolution whose output is split so."""
    options = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": groups, "out_sharding": P(*spec)}
    return lambda w, x: lax.conv_general_dilated(x, w, (1,), "VALID", **options)


def ragged(*spec: Any) -> Callable[[Any, Any], Any]:
    return lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 3]), out_sharding=P(*spec))


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of a weight and x, the shapes of both, and how they are split over d (4) and m (2)."""

    fn: Callable[[Any, Any], Any]
    split: tuple[Any, Any]
    roles: str = "io"
    weight: tuple[int, ...] = (8, 6)
    x: tuple[int, ...] = (4, 8)
    has_gradient: bool = True


CASES = {
    "columns": Case(lambda w, x: x @ w, COLUMNS),
    "columns, time": Case(lambda w, x: with_time(x) @ w, COLUMNS),
    "rows": Case(by_rows, ROWS),
    "rows, time": Case(lambda w, x: jnp.einsum("bti,io->bto", with_time(x), w, out_sharding=P("d", None, None)), ROWS),
    "rows, the weight first": Case(lambda w, x: jnp.einsum("io,ti->ot", w, x, out_sharding=P(None, "d")), ROWS),
    "rows, scan": Case(scanned, ROWS),
    "rows, checkpoint": Case(jax.checkpoint(by_rows), ROWS),
    "jit": Case(jax.jit(lambda w, x: x @ w), COLUMNS),
    "at[].get": Case(lambda w, x: looked_up(w) + x[:, :6], WHOLE),
    "at[].get, rows": Case(lambda w, x: looked_up(w) + x[:, :6], (("m", None), ("d", None))),
    "at[].get, rows and columns": Case(lambda w, x: looked_up(w, None, "m"), (("d", "m"), ("d", None))),
    "at[].get, columns": Case(lambda w, x: looked_up(w, "d", "m"), COLUMNS),
    "take, columns": Case(lambda w, x: jnp.take(w, IDS, axis=0), COLUMNS),
    "tied": Case(lambda w, x: jnp.einsum("td,vd->tv", looked_up(w), w) * x, WHOLE),
    "auto_axes": Case(in_auto_axes, WHOLE),
    "merged": Case(lambda w, x: x @ w**2, COLUMNS),
    "merged, heads": Case(
        lambda w, x: jnp.einsum("ti,ihd->thd", x, w**2), ((None, "m", None), ("d", None)), roles="ioo", weight=(8, 4, 3)
    ),
}
if "out_sharding" in inspect.signature(lax.conv_general_dilated).parameters:  # since JAX 0.8
    KERNEL: dict[str, Any] = {"roles": "iio", "weight": (3, 8, 6), "x": (4, 5, 8)}
    WITHIN_GROUPS: dict[str, Any] = {"roles": "iio", "weight": (3, 4, 6), "x": (4, 5, 8)}
    EXPERTS: dict[str, Any] = {"roles": "bio", "weight": (2, 8, 6)}
    NONE = (None, None, None)
    CASES |= {
        "conv, rows": Case(conv("d", None, None), (NONE, ("d", None, None)), **KERNEL),
        "conv, features": Case(conv("d", None, "m"), ((None, None, "m"), ("d", None, None)), **KERNEL),
        "conv, channels": Case(
            conv("d", None, None), ((None, "m", None), ("d", None, "m")), **KERNEL, has_gradient=False
        ),
        "conv, groups": Case(conv("d", None, None, groups=2), (NONE, ("d", None, None)), **WITHIN_GROUPS),
        # JAX has no gradient of ragged_dot in an explicit mesh, nor rows that are split
        "ragged_dot": Case(ragged(None, None), (NONE, (None, None)), **EXPERTS, has_gradient=False),
        "ragged_dot, features": Case(
            ragged(None, "m"), ((None, None, "m"), (None, None)), **EXPERTS, has_gradient=False
        ),
    }


def check(mesh: Any, name: str, form: Any, magnitude: bool) -> None:
    """Value, sharding and gradients are those of the function with the dense update added to its weight."""
    case = CASES[name]
    of_w, of_x = case.split
    rng = np.random.default_rng(3)

    def put(shape: tuple[int, ...], *spec: Any) -> Any:
        return jax.device_put(jnp.asarray(rng.normal(size=shape), jnp.float32), NamedSharding(mesh, P(*spec)))

    letters = "abc"[: len(case.roles)]
    batch, ins, outs = ("".join(c for c, role in zip(letters, case.roles, strict=True) if role == r) for r in "bio")
    split = dict(zip(letters, of_w, strict=True)) | {"r": None}
    shapes = Factorization(case.roles).adapter_shapes(case.weight, 2)
    w, x = put(case.weight, *of_w), put(case.x, *of_x)
    adapter = {
        part: put(shape, *map(split.get, axes))
        for part, shape, axes in zip("AB", shapes, (f"{batch}{ins}r", f"{batch}r{outs}"), strict=True)
    }
    if magnitude:
        axes = [letters.index(c) for c in batch + outs]
        adapter["magnitude"] = put([case.weight[n] for n in axes], *(of_w[n] for n in axes))
    config = jlora.LoraConfig(rank=2, alpha=3, target_modules="w", factorizations={"w": case.roles})
    model = jlora.lora(lambda params, x: case.fn(params["w"], x), config, cost_model=form)

    def dense(adapter: Any, x: Any) -> Any:
        equation = f"{batch}{ins}r,{batch}r{outs}->{letters}"
        delta = jnp.einsum(equation, adapter["A"], adapter["B"], out_sharding=P(*of_w))
        return case.fn(gained(w + 1.5 * delta, adapter), x)

    def gained(total: Any, adapter: Any) -> Any:
        if not magnitude:
            return total
        in_axes = tuple(n for n, role in enumerate(case.roles) if role == "i")
        norm = lax.stop_gradient(jnp.sqrt(jnp.sum(total**2, in_axes, keepdims=True)))
        kept = "".join(c for c in letters if c in batch + outs)
        whole = jnp.einsum(f"{batch}{outs}->{kept}", adapter["magnitude"])
        return total * jnp.expand_dims(whole, in_axes) / norm

    def adapted(adapter: Any, x: Any) -> Any:
        return model({"w": w}, {"w": adapter}, x)

    found, wanted = jax.jit(adapted)(adapter, x), jax.jit(dense)(adapter, x)
    assert found.sharding.spec == wanted.sharding.spec, name
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4, err_msg=name)
    if case.has_gradient:
        gradients = [jax.jit(jax.grad(summed(f), (0, 1)))(adapter, x) for f in (adapted, dense)]
        for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3, err_msg=name)


def summed(fn: Any) -> Any:
    return lambda *args: jnp.sin(fn(*args)).sum()


def check_all(_: Path) -> None:
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # public as jax.set_mesh since JAX 0.8
    with set_mesh(mesh):
        for name in CASES:
            for form in (FACTORED, MERGED):
                check(mesh, name, form, magnitude=False)
            check(mesh, name, FACTORED, magnitude=True)


def test_explicit_axes(tmp_path):
    run_with_devices(__name__, "check_all", tmp_path)
