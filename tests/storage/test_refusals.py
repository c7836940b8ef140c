"""What cannot be saved or loaded is refused with one error that says why, and nothing is changed."""

import errno
import json
import math
import os
import stat
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jlora import AdapterError, ConfigError, DataError, LoraConfig, TargetError
from jlora.disk import write_tensors
from jlora.storage import is_adapters_folder, load_adapters, read_metadata, save_adapters
from jlora.storage._folder import write_folder
from tests.fuzz import seal_own
from tests.storage.trees import assert_same, entry, random, small

RNG = np.random.default_rng(5)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def nested(levels: int) -> Any:
    tree: Any = entry(RNG)
    for _ in range(levels):
        tree = [tree]
    return tree


def deleted() -> jax.Array:
    array = jnp.ones((5, 2))
    array.delete()
    return array


A, B = entry(RNG).values()
TREES: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "adapters: found none, wanted an adapter"),
    "only None": ([None, {"a": ()}], "adapters: found none"),
    "an array": ({"a": {"w": A}}, "a/w: found ndarray, wanted an adapter"),
    "a number": ({"a": [entry(RNG), 3.0]}, "a/1: found float"),
    "A alone": ({"a": {"A": A}}, "a/A: found ndarray"),
    "lists for arrays": ({"A": [1.0], "B": [1.0]}, "2 problems:\n  A/0: found float"),
    "shapes": ({"w": {"A": jax.ShapeDtypeStruct((5, 2), "float32"), "B": B}}, "w/A: found ShapeDtypeStruct"),
    "deleted": ({"w": {"A": deleted(), "B": B}}, "w/A: found an array that was deleted"),
    "keys": ({"w": {"A": jax.random.key(0), "B": B}}, r"w/A: dtype key<fry> has no place"),
    "text": ({"w": {"A": np.array([["a"]]), "B": B}}, "w/A: dtype <U1 has no place"),
    "int4": ({"w": {"A": jnp.ones((5, 2), jnp.int4), "B": B}}, "w/A: dtype int4 has no place"),
    "complex128": ({"w": {"value": np.ones(3, complex)}}, "w/value: dtype complex128 has no place"),
    "a float key": ({"w": {1.5: entry(RNG)}}, "w: found the key 1.5 of float"),
    "a bool key": ({"w": {True: entry(RNG)}}, "w: found the key True of bool"),
    "a tuple key": ({("a", "b"): entry(RNG)}, r"adapters: found the key \('a', 'b'\) of tuple"),
    "a large key": ({10**5000: entry(RNG)}, "adapters: found a key of more than 64 bits"),
    "mixed keys": ({1: entry(RNG), "1": entry(RNG)}, "adapters: found strings and integers as keys"),
    "a surrogate": ({"\ud800": entry(RNG)}, "half of a surrogate pair"),
    "deep": (nested(101), "nested more than 100 levels deep"),
    "very deep": (nested(5000), "nested more than 100 levels deep"),
    "rank": ({"w": entry(RNG, (5, 3), (3, 7))}, r"w: A \(5, 3\) does not have the rank 2"),
    "B": ({"w": entry(RNG, (5, 2), (3, 7))}, r"w: B \(3, 7\) does not fit A \(5, 2\): wanted \(\*batch, 2, \*out\)"),
    "no axes": ({"w": {"A": np.float32(1), "B": B}}, r"w: A \(\) does not have the rank 2"),
    "batch": ({"w": entry(RNG, (3, 5, 2), (4, 2, 7))}, r"w: B \(4, 2, 7\) does not fit"),
    "NaN": ({"w": {"A": A * np.nan, "B": B}, "v": {"A": A, "B": B * np.inf}}, "2 problems:\n  w/A: holds a NaN or an"),
    "float8 NaN": ({"w": {"A": jnp.full((5, 2), jnp.nan, "float8_e4m3fn"), "B": B}}, "w/A: holds a NaN"),
}


@pytest.mark.parametrize("case", TREES)
def test_trees_that_cannot_be_saved(tmp_path, case):
    tree, message = TREES[case]
    folder = tmp_path / "folder"
    with pytest.raises(AdapterError, match=message):
        save_adapters(folder, tree, LoraConfig(rank=2))
    assert not folder.exists()


METADATA: dict[str, tuple[Any, str]] = {
    "a list": ([1], "metadata: found list, wanted a mapping"),
    "a tuple": ({"a": (1, 2)}, r"metadata\['a'\]: found tuple"),
    "an array": ({"a": {"b": [np.ones(2)]}}, r"metadata\['a'\]\['b'\]\[0\]: found ndarray"),
    "a NumPy number": ({"a": np.float64(2)}, r"metadata\['a'\]: found float64"),
    "a key": ({"a": {1: 2}}, r"metadata\['a'\]: found the key 1, wanted a string"),
    "NaN": ({"a": math.nan}, "cannot be written as JSON: Out of range float"),
    "infinite": ({"a": math.inf}, "cannot be written as JSON"),
    "a surrogate": ({"a": "\ud800"}, "cannot be written as JSON"),
    "digits": ({"a": 10**5000}, "cannot be written as JSON: Exceeds the limit"),
    "size": ({"a": "x" * (17 << 20)}, "of configuration and metadata, more than 16,777,216"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_cannot_be_saved(tmp_path, case):
    metadata, message = METADATA[case]
    with pytest.raises(DataError, match=message):
        save_adapters(tmp_path / "folder", {"w": entry(RNG)}, LoraConfig(rank=2), metadata=metadata)
    assert not (tmp_path / "folder").exists()


def test_metadata_that_holds_itself(tmp_path):
    metadata: dict[str, Any] = {}
    metadata["self"] = metadata
    with pytest.raises(DataError, match="nested too deeply"):
        save_adapters(tmp_path, {"w": entry(RNG)}, LoraConfig(rank=2), metadata=metadata)


def test_a_configuration_that_does_not_fit(tmp_path, rng):
    with pytest.raises(ConfigError, match="config: found dict, wanted a LoraConfig"):
        save_adapters(tmp_path, {"w": entry(rng)}, {"rank": 2})
    for fields in ({"target_modules": "v"}, {"rank_pattern": {"v": 2}}, {"alpha_pattern": {"v": 2}}):
        with pytest.raises(TargetError, match="'v' matches nothing"):
            save_adapters(tmp_path, {"w": entry(rng)}, LoraConfig(rank=2, **fields))
    with pytest.raises(ConfigError, match="a pattern of 1,001 characters"):
        save_adapters(tmp_path, {"w": entry(rng)}, LoraConfig(rank=2, exclude_modules="[" * 1001))
    assert not list(tmp_path.iterdir())
    save_adapters(tmp_path, {"w": entry(rng)}, LoraConfig(rank=2, exclude_modules="v"))


def test_tracers(tmp_path, rng):
    adapters = {"w": entry(rng)}
    with pytest.raises(AdapterError, match="w/A: found a tracer, wanted numbers: save outside of jit"):
        jax.jit(lambda tree: save_adapters(tmp_path, tree, LoraConfig(rank=2)))(adapters)


def test_places_that_cannot_be_written(tmp_path, rng):
    adapters, config = small(rng)
    file = tmp_path / "file"
    file.write_text("keep")
    for path in (file, file / "below"):
        with pytest.raises(DataError, match="is a file, or lies in one: wanted a folder"):
            save_adapters(path, adapters, config)
    with pytest.raises(DataError, match="cannot be made"):
        save_adapters("a\0b", adapters, config)
    with pytest.raises(DataError, match="cannot be made"):
        save_adapters("/proc/nothing/here", adapters, config)
    for name in (CONFIG, TENSORS):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match=f"{name}: is a folder"):
            save_adapters(tmp_path, adapters, config)
        (tmp_path / name).rmdir()
    assert file.read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def system_error(monkeypatch: pytest.MonkeyPatch, name: str, call: int, code: int) -> None:
    """Lets one call to the system fail."""
    real, count = getattr(os, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("replace", 1), ("fsync", 3), ("replace", 2)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_system_that_refuses_leaves_what_was_there(tmp_path, rng, name, call, code):
    adapters, config = small(rng)
    save_adapters(tmp_path, adapters, config)
    other = jax.tree.map(lambda leaf: leaf + 1, adapters)
    with pytest.MonkeyPatch.context() as monkeypatch:
        system_error(monkeypatch, name, call, code)
        with pytest.raises(DataError, match=f"cannot be written: {os.strerror(code)}"):
            save_adapters(tmp_path, other, config.replace(alpha=9))
    assert_same(load_adapters(tmp_path)[0], adapters)
    assert load_adapters(tmp_path)[1] == config
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_a_full_disk_while_tensors_are_written(tmp_path, rng, monkeypatch):
    adapters, config = small(rng)
    save_adapters(tmp_path, adapters, config)

    def full(file: Any, *args: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jlora.storage._folder.write_tensors", full)
    with pytest.raises(DataError, match=f"{TENSORS}: cannot be written: No space left on device"):
        save_adapters(tmp_path, adapters, config.replace(alpha=9))
    assert load_adapters(tmp_path)[1] == config
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_the_last_rename_fails_after_the_new_tensors_are_in_place(tmp_path, rng, monkeypatch):
    adapters, config = small(rng)
    save_adapters(tmp_path, adapters, config)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == CONFIG:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(DataError, match="Input/output error"):
        save_adapters(tmp_path, adapters, config.replace(alpha=9))
    assert load_adapters(tmp_path)[1].alpha == 9


def test_links_are_replaced_and_never_written_through(tmp_path, rng):
    adapters, config = small(rng)
    outside = tmp_path / "outside"
    outside.write_text("keep")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (CONFIG, TENSORS, f".{CONFIG}.new"):
        (folder / name).symlink_to(outside)
    save_adapters(folder, adapters, config)
    assert outside.read_text() == "keep"
    assert sorted(path.name for path in folder.iterdir() if not path.is_symlink()) == [CONFIG, TENSORS]
    assert_same(load_adapters(folder)[0], adapters)


def test_leftovers_of_killed_saves_go_and_other_files_stay(tmp_path, rng):
    adapters, config = small(rng)
    for name in (f".{TENSORS}.0123456789abcdef.jlora", f"..{CONFIG}.new.0123456789abcdef.jlora", f".{CONFIG}.new"):
        (tmp_path / name).write_text("left")
    for name in (f".{TENSORS}.mine.jlora", "README.md"):
        (tmp_path / name).write_text("mine")
    save_adapters(tmp_path, adapters, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{TENSORS}.mine.jlora", "README.md", CONFIG, TENSORS]


def test_one_writer_at_a_time(tmp_path, rng):
    import fcntl

    adapters, config = small(rng)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is writing here"):
        save_adapters(tmp_path, adapters, config)
    os.close(handle)
    save_adapters(tmp_path, adapters, config)


def saved(folder: Path, **fields: Any) -> Path:
    adapters, config = small(RNG, **fields)
    save_adapters(folder, adapters, config, metadata={"a": 1})
    return folder


def test_folders_that_are_something_else(tmp_path):
    saved(tmp_path / "adapters")
    with pytest.raises(DataError, match="adaptors: no such folder; beside it: adapters"):
        load_adapters(tmp_path / "adaptors")
    with pytest.raises(DataError, match=r"no such folder$"):
        load_adapters(tmp_path / "far" / "away")
    with pytest.raises(DataError, match="is a file: wanted the folder that save_adapters wrote"):
        load_adapters(tmp_path / "adapters" / TENSORS)
    with pytest.raises(DataError, match="no such folder"):
        load_adapters("a\0b")
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(DataError, match=f"holds no adapters: wanted {CONFIG} and {TENSORS}"):
        load_adapters(folder)
    with pytest.raises(DataError, match="holds no adapters itself, but adapters in it does"):
        load_adapters(tmp_path)
    safetensors.numpy.save_file({"a": np.ones(3)}, folder / "model.safetensors")
    with pytest.raises(DataError, match="this is a checkpoint of a model"):
        load_adapters(folder)
    (folder / "_METADATA").write_text("{}")
    with pytest.raises(DataError, match="this is an Orbax checkpoint"):
        load_adapters(folder)
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    for _ in range(2):
        with pytest.raises(DataError, match=r"this is a PEFT adapter: read it with jlora.interop.peft.read_peft"):
            load_adapters(folder)
        safetensors.numpy.save_file({"a": np.ones(3)}, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text("{}")
    with pytest.raises(DataError, match="found the format 'pt', wanted 'jlora adapters'"):
        load_adapters(folder)
    assert not is_adapters_folder(folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("kind", ["folder", "pipe", "zeros", "loop", "missing", "empty"])
def test_files_that_are_none(tmp_path, name, kind):
    path = saved(tmp_path) / name
    path.unlink()
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "zeros": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path.name),
        "missing": lambda: None,
        "empty": path.touch,
    }
    make[kind]()
    start = time.perf_counter()
    with pytest.raises(DataError, match=f"{name}|holds no adapters"):
        load_adapters(tmp_path)
    assert time.perf_counter() - start < 1


def change_config(folder: Path, old: str, new: str, seal: bool = True) -> None:
    path = folder / CONFIG
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if seal:
        seal_own(folder)


CONFIGS = {
    "NaN": ('"alpha": 3.0', '"alpha": NaN', "not valid JSON: NaN is no JSON number"),
    "infinite": ('"alpha": 3.0', '"alpha": 1e999', "alpha = inf: wanted a finite number"),
    "digits": ('"alpha": 3.0', '"alpha": ' + "9" * 5000, "not valid JSON: Exceeds the limit"),
    "huge": ('"alpha": 3.0', '"alpha": 1' + "0" * 400, "alpha = 10{199}\\.\\.\\.: wanted a finite number"),
    "a string": ('"alpha": 3.0', '"alpha": "3"', "alpha = '3': wanted a finite number"),
    "unknown": ('"alpha": 3.0', '"alpha": 3, "alhpa": 3', "unknown key 'alhpa'"),
    "twice": ('"alpha": 3.0', '"alpha": 3, "alpha": 4', "key 'alpha' stands twice"),
    "rank": ('"rank": 2', '"rank": 3', r"2 problems:\n  up/kernel: A \(5, 2\) does not have the rank 3"),
    "pattern": ('"rank_pattern": {}', '"rank_pattern": {"left": 2}', "rank_pattern: 'left' matches nothing"),
    "metadata": ('{\n    "a": 1\n  }', "[1]", "found metadata of list, wanted an object"),
    "format": ('"format": "jlora adapters"', '"format": "x"', "does not name the format 'jlora adapters'"),
    "no object": ("{", "[{", "not valid JSON"),
    "deep": ('"a": 1', '"a": ' + "[" * 9999, "not valid JSON: nested too deeply"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_sealed_and_wrong(tmp_path, case):
    old, new, message = CONFIGS[case]
    change_config(saved(tmp_path), old, new)
    with pytest.raises(DataError, match=message) as caught:
        load_adapters(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_configuration_changed_by_hand(tmp_path):
    change_config(saved(tmp_path), '"alpha": 3.0', '"alpha": 4.0', seal=False)
    for read in (load_adapters, read_metadata):
        with pytest.raises(DataError, match="was changed after it was written, or is missing: bring it back, or save"):
            read(tmp_path)


def hostile(folder: Path, structure: Any, tensors: Any, config: Any = None) -> Path:
    """A folder whose checksums are right."""
    config = LoraConfig(rank=2).to_dict() if config is None else config
    write_folder(folder, json.dumps({"format": "jlora adapters", **config}).encode(), tensors, structure)
    return folder


W = {"w/A": A, "w/B": B}
STRUCTURES: dict[str, tuple[Any, Any, str]] = {
    "a number": (3, W, "its structure, at the root: no dict, list, tuple, name or null"),
    "two kinds": ({"list": [], "dict": []}, W, "at the root: no dict"),
    "another kind": ({"set": ["w"]}, W, "at the root: no dict"),
    "items": ({"dict": [["w"]]}, W, "at the root: no dict"),
    "inside": ({"dict": [["w", 1.5]]}, W, "at w: no dict"),
    "a key": ({"dict": [[None, "w"]]}, W, "found the key None of NoneType"),
    "a key of lists": ({"dict": [[["w"], "w"]]}, W, r"found the key \['w'\] of list"),
    "a key twice": ({"dict": [["w", "w"], ["w", None]]}, W, "found a key twice"),
    "a large key": ({"dict": [[2**64, "w"]]}, W, "found a key of more than 64 bits"),
    "another name": ({"dict": [["w", "v"]]}, W, "has the name 'v' at 'w'"),
    "a name twice": ({"dict": [["w", "w"], ["v", "w"]]}, W, "has the name 'w' at 'v'"),
    "no tensors": (
        {"dict": [["w", "w"], ["v", "v"]]},
        W,
        "'v': wanted A and B, or other parts of an adapter, found no",
    ),
    "left over": ({"dict": [["w", "w"]]}, {**W, "v/A": A}, "tensors that are not in its structure: 'v/A'"),
    "A alone": ({"dict": [["w", "w"]]}, {"w/A": A}, "'w': wanted A and B, or other parts of an adapter, found 'A'"),
    "other parts": ({"dict": [["w", "w"]]}, {**W, "w/C": A}, "found 'A', 'B', 'C'"),
    "nothing": ({"dict": []}, {}, "holds no adapters"),
    "all None": (None, {}, "holds no adapters"),
    "rank": ({"dict": [["w", "w"]]}, {"w/A": B, "w/B": A}, "does not have the rank 2"),
    "NaN": ({"dict": [["w", "w"]]}, {"w/A": A * np.nan, "w/B": B}, "w/A: holds a NaN or an infinity"),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_structures_that_are_sealed_and_wrong(tmp_path, case):
    structure, tensors, message = STRUCTURES[case]
    with pytest.raises(DataError, match=message) as caught:
        load_adapters(hostile(tmp_path, structure, tensors))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("levels", [101, 320, 5000])
def test_a_structure_that_is_too_deep(tmp_path, levels):
    text = '{"list":[' * levels + '"w"' + "]}" * levels
    saved(tmp_path)
    with (tmp_path / TENSORS).open("wb") as file:
        metadata = {"format": "jlora adapters", "version": "1", "config_sha256": "0" * 64, "sha256": "0" * 64}
        write_tensors(file, W, metadata | {"structure": text})
    seal_own(tmp_path)
    with pytest.raises(DataError, match="its structure"):
        load_adapters(tmp_path)


def test_another_version(tmp_path):
    path = saved(tmp_path) / TENSORS
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    seal_own(tmp_path)
    with pytest.raises(DataError, match="found version '2', wanted '1': a newer jlora wrote it"):
        load_adapters(tmp_path)


def test_a_file_cut_short_or_damaged(tmp_path):
    path = saved(tmp_path) / TENSORS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="cut short"):
        load_adapters(tmp_path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="its SHA-256 is not the one it states: damaged, or changed"):
        load_adapters(tmp_path)
    assert read_metadata(tmp_path) == {"a": 1}


def test_dtypes_that_jax_would_narrow(tmp_path, rng):
    save_adapters(tmp_path, {"w": {"A": random(rng, (5, 2), "float64"), "B": B}}, LoraConfig(rank=2))
    with pytest.raises(DataError, match=r"holds float64, which JAX would narrow: .*jax_enable_x64"):
        load_adapters(tmp_path)


def test_the_modes_of_older_files_are_kept(tmp_path):
    saved(tmp_path)
    for name, mode in ((CONFIG, 0o600), (TENSORS, 0o640)):
        (tmp_path / name).chmod(mode)
    saved(tmp_path)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CONFIG, TENSORS)] == [0o600, 0o640]


def test_a_cut_off_save_over_tensors_that_cannot_be_read(tmp_path):
    saved(tmp_path)
    (tmp_path / CONFIG).rename(tmp_path / f".{CONFIG}.new")
    with pytest.MonkeyPatch.context() as patched:
        system_error(patched, "preadv", 1, errno.EIO)
        system_error(patched, "replace", 1, errno.ENOSPC)
        with pytest.raises(DataError, match="No space left"):
            saved(tmp_path, seed=7)
    assert load_adapters(tmp_path)[1].seed == 0
