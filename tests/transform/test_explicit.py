"""A mesh of explicit axes over eight devices, in a process of its own: shardings are part of types."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.transform.test_primitives import FACTORED, MERGED

IDS = np.array([3, 1, 0, 7], np.int32)
COLUMNS, ROWS, WHOLE = ((None, "m"), ("d", None)), (("m", None), ("d", "m")), ((None, None), ("d", None))


def looked_up(w: Any) -> Any:
    return w.at[jnp.asarray(IDS)].get(out_sharding=P("d", None))


def by_rows(w: Any, x: Any) -> Any:
    return jnp.einsum("ti,io->to", x, w, out_sharding=P("d", None))


def in_auto_axes(w: Any, x: Any) -> Any:
    return jax.sharding.auto_axes(lambda w, x: x @ w, out_sharding=P("d", None))(w, x)


def scanned(w: Any, x: Any) -> Any:
    return lax.scan(lambda c, s: (c, by_rows(w, c * s)), x, jnp.arange(3.0))[1]


def with_time(x: Any) -> Any:
    return jnp.stack([x, 2 * x], 1)  # (batch, time, in)


# A function of w (8, 6) and x (4, 8), and how they are split over d (4) and m (2).
PROGRAMS = {
    "columns": (lambda w, x: x @ w, COLUMNS),
    "columns, time": (lambda w, x: with_time(x) @ w, COLUMNS),
    "rows": (by_rows, ROWS),
    "rows, time": (lambda w, x: jnp.einsum("bti,io->bto", with_time(x), w, out_sharding=P("d", None, None)), ROWS),
    "rows, the weight first": (lambda w, x: jnp.einsum("io,ti->ot", w, x, out_sharding=P(None, "d")), ROWS),
    "rows, scan": (scanned, ROWS),
    "rows, checkpoint": (jax.checkpoint(by_rows), ROWS),
    "jit": (jax.jit(lambda w, x: x @ w), COLUMNS),
    "at[].get": (lambda w, x: looked_up(w) + x[:, :6], WHOLE),
    "tied": (lambda w, x: jnp.einsum("td,vd->tv", looked_up(w), w) * x, WHOLE),
    "auto_axes": (in_auto_axes, WHOLE),
    "merged": (lambda w, x: x @ w**2, COLUMNS),
}
CONFIG = jlora.LoraConfig(rank=2, alpha=3, target_modules="w", factorizations={"w": "io"})


def check(mesh: Any, name: str, form: Any) -> None:
    """Value, sharding and gradients are those of the function with the dense update added to its weight."""
    fn, (of_w, of_x) = PROGRAMS[name]
    rng = np.random.default_rng(3)

    def put(shape: tuple[int, ...], *spec: Any) -> Any:
        return jax.device_put(jnp.asarray(rng.normal(size=shape), jnp.float32), NamedSharding(mesh, P(*spec)))

    w, x = put((8, 6), *of_w), put((4, 8), *of_x)
    adapter = {"A": put((8, 2), of_w[0], None), "B": put((2, 6), None, of_w[1])}
    model = jlora.lora(lambda params, x: fn(params["w"], x), CONFIG, cost_model=form)

    def dense(adapter: Any, x: Any) -> Any:
        delta = jnp.einsum("ir,ro->io", adapter["A"], adapter["B"], out_sharding=P(*of_w))
        return fn(w + 1.5 * delta, x)

    def adapted(adapter: Any, x: Any) -> Any:
        return model({"w": w}, {"w": adapter}, x)

    found, wanted = jax.jit(adapted)(adapter, x), jax.jit(dense)(adapter, x)
    assert found.sharding.spec == wanted.sharding.spec, name
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4, err_msg=name)
    gradients = [jax.jit(jax.grad(summed(f), (0, 1)))(adapter, x) for f in (adapted, dense)]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3, err_msg=name)


def summed(fn: Any) -> Any:
    return lambda *args: jnp.sin(fn(*args)).sum()


def main() -> None:
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # public as jax.set_mesh since JAX 0.8
    with set_mesh(mesh):
        for name in PROGRAMS:
            for form in (FACTORED, MERGED):
                check(mesh, name, form)
    print("all as they should be")


def test_explicit_axes():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.transform.test_explicit"],
        cwd=Path(__file__).parents[2],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.stdout.endswith("all as they should be\n"), run.stderr[-3000:]


if __name__ == "__main__":
    main()
