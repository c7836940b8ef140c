"""The transform over eight devices, in a process of its own."""

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jlora
from tests.transform.test_places import checkpoint, scan_constant, scanned
from tests.transform.test_primitives import (
    FACTORED,
    MERGED,
    PROGRAMS,
    Program,
    arguments,
    assert_trees_close,
    config_of,
    derivatives,
    of_params,
    reference,
    x64,
)

Function = Callable[[Any, Any], Any]
P = PartitionSpec


@functools.lru_cache
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("d", "m"))


def sharded(fn: Function, w: Any, x: Any, y: Any, **options: Any) -> Function:
    return lambda *args: jax.shard_map(fn, mesh=mesh(), in_specs=(w, x), out_specs=y, **options)(*args)


def summed(fn: Function) -> Function:
    return lambda w, x: lax.psum(fn(w, x), "m")


def vocabulary(w: Any, x: Any) -> Any:
    """A lookup in a table of 16 rows of which each device has eight."""
    ids = np.array([3, 0, 12, 15, 7, 8, 5, 5]) - 8 * lax.axis_index("m")
    rows = w.at[jnp.where(ids < 0, 99, ids)].get(mode="fill", fill_value=0)
    return lax.psum(rows, "m") * x


def matmul(w: Any, x: Any) -> Any:
    return x @ w


def gathered(axis: int, name: Any = "d", **options: Any) -> Function:
    """Each device has a part of the weight and gathers the whole before it is used."""
    options = {"tiled": True} | options
    return lambda w, x: x @ lax.all_gather(w, name, axis=axis, **options)


def gathered_apart(w: Any, x: Any) -> Any:
    return jnp.einsum("tdi,dio->to", x.reshape(-1, 4, 5), lax.all_gather(w, "d"))


def gathered_layers(w: Any, x: Any) -> Any:
    """Layer by layer in a scan, as by hand in FSDP."""
    return lax.scan(lambda c, wi: (jnp.tanh(c @ lax.all_gather(wi, "d", tiled=True)), None), x, w)[0]


def passed_on(w: Any, x: Any) -> Any:
    """Every device uses the parts of all, one after the other, as they come around a ring."""
    ring = [(n, (n + 1) % 4) for n in range(4)]
    y = 0.0
    for _ in range(4):
        w = lax.ppermute(w, "d", ring)
        y += jnp.sin(x @ w)
    return y


def exchanged(w: Any, x: Any) -> Any:
    """Experts of which every device had a part become a few whole ones on each."""
    return jax.vmap(jnp.matmul)(x, lax.all_to_all(w, "d", 0, 1, tiled=True))


def chosen_there(w: Any, x: Any) -> Any:
    """Each device takes another of two forms of its weight."""
    there = w * (1 + lax.axis_index("d"))
    return x @ lax.cond(lax.axis_index("d") > 1, lambda w: w, lambda w: 2 * w[::-1] + 1, there)


def joined_there(w: Any, x: Any) -> Any:
    there = w * (1 + lax.axis_index("d"))
    return x @ jnp.concatenate([there, jnp.ones_like(w), w], 1)


SHARDED = {
    "gathered in axes": Program("", sharded(gathered(0), P("d"), P("d"), P("d")), (20, 11), (8, 20)),
    "gathered out axes": Program("", sharded(gathered(1), P(None, "d"), P("d"), P("d")), (5, 12), (8, 5)),
    "gathered over both": Program(
        "", sharded(gathered(0, ("d", "m")), P(("d", "m")), P(("d", "m")), P(("d", "m"))), (16, 11), (8, 16)
    ),
    "gathered over one of both": Program(
        "",
        sharded(lambda w, x: lax.pmean(lax.psum(gathered(1, "m")(w, x), "d"), "m"), P("d", "m"), P(None, "d"), P()),
        (20, 6),
        (8, 20),
    ),
    "gathered as a new axis": Program("", sharded(gathered_apart, P("d"), P("d"), P("d")), (20, 11), (8, 20)),
    "gathered experts": Program(
        "",
        sharded(lambda w, x: jnp.einsum("td,edo->teo", x, lax.all_gather(w, "d", tiled=True)), P("d"), P("d"), P("d")),
        (4, 5, 11),
        (8, 5),
        "bio",
    ),
    "gathered layers": Program("", sharded(gathered_layers, P(None, "d"), P("d"), P("d")), (3, 8, 8), (8, 8), "bio"),
    "gathered, unchecked": Program(
        "", sharded(gathered(0), P("d"), P("d"), P("d"), check_vma=False), (20, 11), (8, 20), factored=False
    ),
    "gathered experts, unchecked": Program(
        "",
        sharded(
            lambda w, x: jnp.einsum("td,edo->teo", x, lax.all_gather(w, "d", tiled=True)),
            P("d"),
            P("d"),
            P("d"),
            check_vma=False,
        ),
        (4, 5, 11),
        (8, 5),
        "bio",
    ),
    "gathered of what differs": Program(
        "",
        sharded(
            lambda w, x: x @ lax.all_gather(w * (1 + lax.axis_index("d")), "d", axis=1, tiled=True), P(), P("d"), P("d")
        ),
        (5, 3),
        (8, 5),
    ),
    "gathered of what differs in A and B": Program(
        "",
        sharded(
            lambda w, x: x @ lax.all_gather(jnp.roll(w, lax.axis_index("d"), 0), "d", axis=1, tiled=True),
            P(),
            P("d"),
            P("d"),
        ),
        (5, 3),
        (8, 5),
        factored=False,
    ),
    "passed on": Program("", sharded(passed_on, P(None, "d"), P("m"), P("m", "d")), (5, 12), (8, 5)),
    "passed on, unchecked": Program(
        "", sharded(passed_on, P(None, "d"), P("m"), P("m", "d"), check_vma=False), (5, 12), (8, 5)
    ),
    "exchanged": Program("", sharded(exchanged, P(None, "d"), P("d"), P("d")), (4, 20, 11), (4, 3, 20), "iio"),
    "exchanged, A for B": Program(
        "",
        sharded(lambda w, x: x @ lax.all_to_all(w, "d", 1, 0, tiled=True), P("d"), P(), P(None, "d")),
        (20, 12),
        (3, 20),
        factored=False,
    ),
    "chosen on each device": Program("", sharded(chosen_there, P(), P("d"), P("d")), (5, 11), (8, 5)),
    "joined on each device": Program("", sharded(joined_there, P(), P("d"), P("d")), (5, 11), (8, 5)),
    "rows": Program("", sharded(matmul, P(), P("d"), P("d")), (5, 11), (8, 5)),
    "rows over all": Program("", sharded(matmul, P(), P(("d", "m")), P(("d", "m"))), (5, 11), (8, 5)),
    "rows, unchecked": Program("", sharded(matmul, P(), P("d"), P("d"), check_vma=False), (5, 11), (8, 5)),
    "rows, jit inside": Program("", sharded(jax.jit(matmul), P(), P("d"), P("d")), (5, 11), (8, 5)),
    "rows, one axis": Program("", jax.jit(sharded(matmul, P(), P("d"), P("d"), axis_names={"d"})), (5, 11), (8, 5)),
    "rows, merged": Program("", sharded(lambda w, x: x @ w**2, P(), P("d"), P("d")), (5, 11), (8, 5), factored=False),
    "rows, conv": Program("", sharded(PROGRAMS["conv 1d"].fn, P(), P("d"), P("d")), (3, 5, 11), (8, 13, 5), "iio"),
    "rows, tied": Program(
        "", sharded(lambda w, x: jnp.tanh(w[np.arange(2)] * x) @ w.T, P(), P("d"), P("d")), (13, 5), (8, 5)
    ),
    "rows, scan": Program(
        "", sharded(lambda w, x: scan_constant(matmul)(w, x)[1], P(), P("d"), P(None, "d")), (5, 11), (8, 5)
    ),
    "rows, checkpoint": Program("", sharded(checkpoint()(matmul), P(), P("d"), P("d")), (5, 11), (8, 5)),
    "mean of rows": Program(
        "", sharded(lambda w, x: lax.pmean(jnp.sin(x @ w), "d"), P(), P("d"), P()), (5, 11), (8, 5)
    ),
    "out axes": Program("", sharded(matmul, P(None, "m"), P("d"), P("d", "m")), (5, 14), (8, 5)),
    "in axes": Program("", sharded(summed(matmul), P("m"), P("d", "m"), P("d")), (10, 11), (8, 10)),
    "in axes of w.T": Program(
        "", sharded(summed(lambda w, x: x @ w.T), P(None, "m"), P("d", "m"), P("d")), (11, 10), (8, 10), "oi"
    ),
    "in axes, unchecked": Program(
        "", sharded(summed(matmul), P("m"), P("d", "m"), P("d"), check_vma=False), (10, 11), (8, 10)
    ),
    "in and out axes": Program(
        "", sharded(lambda w, x: lax.psum(x @ w, "d"), P("d", "m"), P(None, "d"), P(None, "m")), (20, 14), (3, 20)
    ),
    "in axes, merged": Program(
        "", sharded(summed(lambda w, x: x @ w**2), P("m"), P("d", "m"), P("d")), (10, 11), (8, 10), factored=False
    ),
    "heads": Program(
        "",
        sharded(PROGRAMS["einsum BTD,NDH->BTNH"].fn, P("m"), P("d"), P("d", None, "m")),
        (6, 5, 11),
        (4, 7, 5),
        "oio",
    ),
    "experts": Program(
        "", sharded(PROGRAMS["experts by dot_general"].fn, P("m"), P("m"), P("m")), (6, 5, 11), (6, 7, 5), "bio"
    ),
    "vocabulary": Program("", sharded(vocabulary, P("m"), P(), P()), (16, 5), (8, 5)),
    "layers": Program(
        "",
        sharded(lambda w, x: scanned()(matmul)(w, x)[1], P(None, None, "m"), P("d"), P(None, "d", "m")),
        (3, 5, 14),
        (8, 5),
        "bio",
    ),
}


def dropped_rows() -> list[list[int]]:
    """How many different updates there are of rows that are the same, by the devices that have them, with dropout."""
    params = {"w": jnp.zeros((30, 14))}
    adapters = {"w": {"A": jnp.arange(60.0).reshape(30, 2), "B": jnp.ones((2, 14))}}
    config = jlora.LoraConfig(rank=2, target_modules="w", dropout=0.5)
    counts = []
    for axes in (("d", "m"), "d"):
        model = jax.jit(jlora.lora(of_params(sharded(matmul, P(), P(axes), P(axes))), config))
        ys = [np.asarray(model(params, adapters, jnp.ones((8, 30)), dropout_key=jax.random.key(n))) for n in (3, 3, 4)]
        assert np.array_equal(ys[0], ys[1])
        counts.append([len({row.tobytes() for row in y}) for y in (ys[0], np.concatenate(ys))])
    return counts


def check_sharded() -> dict[str, str]:
    """What went wrong in each case; run in a process with eight devices."""
    problems = {}
    for name, program in SHARDED.items():
        rng = np.random.default_rng(20260)
        config = config_of(program)
        fns = (
            reference(program.fn, program.roles),
            jlora.lora(of_params(program.fn), config, strict=program.factored, cost_model=FACTORED),
            jlora.lora(of_params(program.fn), config, cost_model=MERGED),
        )
        try:
            with x64():
                primals, tangents = arguments(program, rng), arguments(program, rng)
                run = jax.jit(lambda *args, fns=fns: [derivatives(fn, *args) for fn in fns])
                wanted, *found = run(primals, tangents)
            for form in found:
                assert_trees_close(form, wanted, program.tolerance)
            problems[name] = ""
        except Exception:
            problems[name] = traceback.format_exc()
    return problems


def report_sharded() -> None:
    print(json.dumps({"problems": check_sharded(), "dropped": dropped_rows()}))


@pytest.fixture(scope="module")
def eight_devices() -> Any:
    """What a process with eight devices reports."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    code = "from tests.transform.test_shard_map import report_sharded; report_sharded()"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", SHARDED)
def test_shard_map_over_eight_devices(eight_devices, case):
    assert not eight_devices["problems"][case], eight_devices["problems"][case]


def test_dropout_differs_from_device_to_device(eight_devices):
    assert eight_devices["dropped"] == [[8, 16], [8, 16]]
