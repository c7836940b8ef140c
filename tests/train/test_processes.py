"""Checkpoints of a program of two processes: one state, written by both, and every failure known to both."""

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import DataError
from jlora.train import Checkpoints
from tests.storage.devices import run_in_two_processes


def test_two_processes(tmp_path):
    run_in_two_processes(__name__, "one_of_two", tmp_path)


def state_of(mesh: Mesh, step: int) -> Any:
    """A part in each process, a copy in each, a count that lies anywhere, and what is on a device of its own."""

    def spread(array: Any, *axes: Any) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    numbers = step + np.arange(14, dtype=np.float32).reshape(2, 7)
    return {"A": spread(numbers, "x"), "B": spread(numbers.T), "step": jnp.int32(step)} | {
        "own": jax.device_put(numbers[0], jax.local_devices()[0]),
        "key": jax.random.key(step),
        "host": numbers[1],
    }


def check(found: Any, wanted: Any) -> None:
    assert (found.keys(), type(found["host"])) == (wanted.keys(), np.ndarray)
    for name, array in wanted.items():
        if name == "host":
            np.testing.assert_array_equal(found[name], array)
            continue
        assert (found[name].sharding, found[name].committed) == (array.sharding, array.committed)
        for mine, own in zip(found[name].addressable_shards, array.addressable_shards, strict=True):
            np.testing.assert_array_equal(*(plain(shard.data) for shard in (mine, own)))


def plain(array: Any) -> Any:
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def one_of_two(folder: Path, number: int) -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    states = {step: state_of(mesh, step) for step in (1, 2, 3)}
    checkpoints = Checkpoints(folder / "run")
    for step, state in states.items():
        checkpoints.save(step, state)
        assert checkpoints.latest_step == step
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["2", "3"]
    check(Checkpoints(folder / "run").restore(states[1]), states[3])

    if number == 0:
        manifest = next((folder / "run" / "3").glob("*manifest*"))
        manifest.write_bytes(manifest.read_bytes()[:-5])
    sync_global_devices("damaged")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(Checkpoints(folder / "run").restore(states[1]), states[2])
    assert any("step 3 is damaged and passed over" in str(warning.message) for warning in caught) == (number == 0)

    if number == 0:
        (folder / "file").touch()
    sync_global_devices("a file in the way")
    with pytest.raises(DataError, match=rf"^{re.escape(str(folder))}/file: cannot be (written|read): Not a directory"):
        Checkpoints(folder / "file").save(1, states[1])
    if number == 0:
        (folder / "file").unlink()
    sync_global_devices("out of the way")
    Checkpoints(folder / "file").save(1, states[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jlora.train._checkpoint.write_manifest", refuse)
        with pytest.raises(DataError, match=rf"^{re.escape(str(folder))}/file: cannot be written: No space left"):
            Checkpoints(folder / "file").save(2, states[2])
    check(Checkpoints(folder / "file").restore(states[2]), states[1])


def refuse(*_: Any) -> None:
    raise OSError(28, "No space left on device")
