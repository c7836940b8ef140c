"""Two processes of one program: the first one writes what both hold, and both learn what came of it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import AdapterError, DataError, LoraConfig
from jlora.interop.peft import read_peft, write_peft
from jlora.storage import load_adapters, save_adapters
from tests.storage.devices import run_in_two_processes

CONFIG = LoraConfig(rank=2, alpha=3, factorizations={"**": "oi"})
NUMBERS = {"A": np.arange(10, dtype=np.float32).reshape(5, 2), "B": np.arange(8, dtype=np.float32).reshape(2, 4)}


def test_two_processes(tmp_path):
    run_in_two_processes(__name__, "one_of_two", tmp_path)


def one_of_two(folder: Path, number: int) -> None:
    """What each process does, in step with the other."""
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def spread(array: Any, *axes: Any) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    whole = {"up.weight": {part: spread(array) for part, array in NUMBERS.items()}}
    save_adapters(folder / "own", whole, CONFIG)
    check(*load_adapters(folder / "own"))
    check(*load_adapters(folder / "own", sharding=NamedSharding(mesh, PartitionSpec())))
    write_peft(folder / "peft", whole, CONFIG)
    check(*read_peft(folder / "peft"))
    CONFIG.write(folder / "lora.toml")
    assert LoraConfig.read(folder / "lora.toml") == CONFIG

    parts = {"up.weight": {"A": spread(NUMBERS["A"]), "B": spread(NUMBERS["B"], None, "x")}}
    with pytest.raises(AdapterError, match=r"up\.weight/B: found an array spread over several processes; gather it"):
        save_adapters(folder / "parts", parts, CONFIG)
    with pytest.raises(DataError, match=r"up\.weight: found an array spread over several processes; gather it first"):
        write_peft(folder / "parts", parts, CONFIG)
    assert not (folder / "parts").exists()

    (folder / "file").touch()
    for write in (save_adapters, write_peft):
        with pytest.raises(DataError, match=r"file: is a file, or lies in one: wanted a folder"):
            write(folder / "file", whole, CONFIG)

    save_adapters(folder / f"alone{number}", {"up.weight": NUMBERS}, CONFIG)  # its own numbers: nobody waits
    check(*load_adapters(folder / f"alone{number}"))


def check(adapters: Any, config: LoraConfig) -> None:
    """The adapters are those that were written."""
    assert (config.rank, config.alpha) == (2, 3)
    for part, array in NUMBERS.items():
        np.testing.assert_array_equal(np.asarray(adapters["up.weight"][part]), array)
