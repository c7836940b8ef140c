"""Training over several devices: what a device computes of a batch, and where a state lies that is restored."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from jlora import DataError, LoraConfig, init_lora
from jlora.train import Checkpoints, Mean, Sum, fit, init_state, make_train_step
from tests.reference import as64, assert_close
from tests.storage.devices import run_with_devices
from tests.work import compilations

OPTIMIZER = optax.adam(0.1)
MOVES = "all-gather|all-to-all|collective-permute"
N, IN, RANK, OUT = 48, 16, 3, 24


def loss(adapter: Any, weight: jax.Array, batch: Any, key: jax.Array) -> Any:
    wrong = batch["x"] @ weight + (batch["x"] @ adapter["A"]) @ adapter["B"] - batch["scale"]
    errors = batch["mask"] * jnp.mean(wrong**2, axis=1)
    return Mean(jnp.sum(errors), jnp.sum(batch["mask"])), {"examples": Sum(jnp.sum(batch["mask"]))}


def arrays() -> tuple[Any, Any, Any]:
    """An adapter, its weight and a batch, on the host."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batch = {"x": normal(N, IN), "mask": rng.integers(0, 2, N).astype(np.float32), "scale": np.float32(0.5)}
    return {"A": normal(IN, RANK), "B": normal(RANK, OUT), "none": None}, normal(IN, OUT), batch


def placed(tree: Any, mesh: Any, *spec: Any) -> Any:
    def place(leaf: Any) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec) if np.ndim(leaf) else PartitionSpec()))

    return jax.tree.map(place, tree)


def every_device_keeps_its_rows(_: Path) -> None:
    adapter, weight, batch = arrays()
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        spread = placed(batch, mesh, "data")
        state, frozen = init_state(placed(adapter, mesh), OPTIMIZER), placed(weight, mesh)
        step = make_train_step(loss, OPTIMIZER, accumulate=3, clip_norm=9.0)
        text = step.lower(state, frozen, spread).compile().as_text()
        assert re.findall(rf"= .*\b(?:{MOVES})(?:-start)?\(", text) == []
        rows = {int(count) for count in re.findall(rf"f32\[(\d+),{OUT}\]\S* dot\(", text)}
        assert rows == {N // 3 // 8}
        wrong = as64(batch["x"]) @ (as64(weight) + as64(adapter["A"]) @ as64(adapter["B"])) - 0.5
        mask = as64(batch["mask"])
        for number in range(3):
            state, metrics = step(state, frozen, spread)
            if number == 0:
                assert_close(metrics["loss"], (mask * (wrong**2).mean(1)).sum() / mask.sum())
            assert int(metrics["examples"]) == mask.sum()


def the_state_stays_where_it_is(_: Path) -> None:
    """Every step leaves each leaf on the devices where it was, so that the second one is the same program."""
    _, weight, batch = arrays()
    layouts = {"fsdp": ("data", None), "columns": (None, "model"), "both": ("data", "model"), "none": ()}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        for name, spec in layouts.items():
            frozen = {"kernel": placed(weight, mesh, *spec)}
            adapters = init_lora(jax.random.key(0), frozen, LoraConfig(rank=RANK))
            three_steps_are_one_program(adapters["kernel"], frozen["kernel"], placed(batch, mesh, "data"), name)


def three_steps_are_one_program(adapter: Any, weight: jax.Array, batch: Any, name: str) -> None:
    step, state = make_train_step(loss, OPTIMIZER), init_state(adapter, OPTIMIZER)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)

    def one_more() -> None:
        nonlocal state
        state, _ = step(state, weight, batch)

    compiled = []
    for _ in range(3):
        compiled.append(compilations(one_more))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == places, name
    assert compiled[0] > 0
    assert compiled[1:] == [0, 0], name


def explicit_parts_that_cannot_be_shared_are_refused(_: Path) -> None:
    adapter, weight, batch = arrays()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    spread = placed(batch, mesh, ("data", "model"))
    state = init_state(placed(adapter, mesh), OPTIMIZER)
    step = make_train_step(loss, OPTIMIZER, accumulate=4)
    with pytest.raises(
        DataError, match="in accumulate = 4 parts gives parts of 12, which 8 devices cannot share evenly"
    ):
        step(state, placed(weight, mesh), spread)


def resumed_on(folder: Path) -> None:
    """Data parallel, sharded like FSDP, and on one device: each to itself and another, on to the same numbers."""
    adapter, weight, batch = arrays()
    eight, four = (Mesh(np.array(jax.devices()[:count]), ("data",)) for count in (8, 4))
    square = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    layouts = {
        "parallel": (eight, ()),
        "fsdp": (eight, (None, "data")),
        "fsdp over two axes": (square, (None, ("data", "model"))),
        "fewer": (four, (None, "data")),
    }

    def parts(name: str) -> tuple[Any, Any, Any]:
        if name == "one":
            return init_state(jax.tree.map(jnp.asarray, adapter), OPTIMIZER), weight, batch
        mesh, spec = layouts[name]
        trained = {"A": placed(adapter["A"], mesh, *spec[1:]), "B": placed(adapter["B"], mesh, *spec), "none": None}
        return init_state(trained, OPTIMIZER), placed(weight, mesh, *spec), placed(batch, mesh, "data")

    def train(name: str, steps: int, checkpoints: Checkpoints) -> Any:
        state, frozen, spread = parts(name)
        if checkpoints.latest_step is not None:
            like, state = state, checkpoints.restore(state)
            for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
                assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
                assert found.committed == wanted.committed
        step = make_train_step(loss, OPTIMIZER, accumulate=2)
        quiet = Console(quiet=True)
        return fit(step, state, frozen, lambda _: spread, steps=steps, checkpoints=checkpoints, console=quiet)

    whole = train("one", 4, Checkpoints(folder / "whole"))
    names = [*layouts, "one"]
    for before, after in [*zip(names, names, strict=True), *zip(names, names[2:] + names[:2], strict=True)]:
        run = folder / f"{before} {after}"
        train(before, 2, Checkpoints(run))
        state = train(after, 4, Checkpoints(run))
        for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def adapters_and_an_optimizer_that_no_init_state_made(folder: Path) -> None:
    adapter, *_ = arrays()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    adapters = {"A": placed(adapter["A"], mesh, "data"), "B": placed(adapter["B"], mesh, None, "data"), "none": None}
    state = {"adapters": adapters, "optimizer": OPTIMIZER.init(adapters)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state)
        found = checkpoints.restore(state)
    after = jax.jit(OPTIMIZER.update)(found["adapters"], found["optimizer"])
    assert int(after[1][0].count) == 1
    assert found["adapters"]["A"].sharding == adapters["A"].sharding


def every_case(folder):
    for case in (
        every_device_keeps_its_rows,
        the_state_stays_where_it_is,
        explicit_parts_that_cannot_be_shared_are_refused,
        resumed_on,
        adapters_and_an_optimizer_that_no_init_state_made,
    ):
        (folder / case.__name__).mkdir()
        case(folder / case.__name__)


def test_over_eight_devices(tmp_path):
    run_with_devices(__name__, "every_case", tmp_path)
