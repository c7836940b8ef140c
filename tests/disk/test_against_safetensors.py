"""Malformed files, for us and for the safetensors package: what it refuses we refuse; what both read is the same."""

import json
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from jlora import DataError
from jlora.disk import Checkpoint, write_tensors
from tests.fuzz import BYTES, change_json

safetensors = pytest.importorskip("safetensors")

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def theirs(data):
    """Name to dtype, shape and bytes."""
    return {
        name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in safetensors.deserialize(data)
    }


def ours(path):
    checkpoint = Checkpoint(path)
    found = {}
    for name, entry in checkpoint.entries.items():
        array = checkpoint.read(name)
        assert DTYPES[array.dtype.name] == entry.code
        found[name] = entry.code, array.shape, array.tobytes()
    return found


def outcome(data, path):
    """Who reads it; an AssertionError where we read what they refuse, or read something else."""
    path.write_bytes(data)
    try:
        wanted = theirs(data)
    except safetensors.SafetensorError:
        wanted = None
    try:
        found = ours(path)
    except DataError:
        return "refused" if wanted is None else "refused by us alone"
    assert wanted is not None, "they refuse it"
    assert found == wanted
    return "read"


@pytest.fixture
def valid(tmp_path, rng):
    """The bytes of a file with every dtype, an array without axes and one without numbers."""
    tensors = {name: rng.standard_normal((2, 3)).astype(jnp.dtype(name)) for name in DTYPES}
    tensors |= {"no axes": np.float32(0.5).reshape(()), "none": np.ones((0, 3), np.float16)}
    with (tmp_path / "valid").open("wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    return (tmp_path / "valid").read_bytes()


def file_of(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


EIGHT = bytes(range(8))
FILES = {
    "whole": file_of({"a": entry()}, EIGHT),
    "spaces behind": file_of(json.dumps({"a": entry()}).encode() + b"   ", EIGHT),
    "spaces before": file_of(b" " + json.dumps({"a": entry()}).encode(), EIGHT),
    "no tensors": file_of({}),
    "nothing": b"",
    "seven bytes": b"1234567",
    "length beyond the end": file_of({"a": entry()}, EIGHT, 10_000),
    "length of 2^63": file_of({"a": entry()}, EIGHT, 2**63),
    "length of nothing": file_of(b"", EIGHT),
    "no JSON": file_of(b"{", EIGHT),
    "a list": file_of([1], EIGHT),
    "not UTF-8": file_of(b'{"\xff": 1}', EIGHT),
    "a gap": file_of({"a": entry(offsets=(4, 12))}, EIGHT + b"1234"),
    "an overlap": file_of({"a": entry(), "b": entry(offsets=(4, 12))}, EIGHT + b"1234"),
    "the same place": file_of({"a": entry(), "b": entry()}, EIGHT),
    "too short": file_of({"a": entry()}, EIGHT[:7]),
    "more behind": file_of({"a": entry()}, EIGHT + b"1"),
    "ends before it begins": file_of({"a": entry(offsets=(8, 0))}, EIGHT),
    "offsets below zero": file_of({"a": entry(offsets=(-8, 0))}, EIGHT),
    "offsets that are floats": file_of({"a": entry(offsets=(0.0, 8.0))}, EIGHT),
    "three offsets": file_of({"a": entry(offsets=(0, 8, 8))}, EIGHT),
    "another size": file_of({"a": entry(shape=(3,))}, EIGHT),
    "a shape below zero": file_of({"a": entry(shape=(-2,))}, EIGHT),
    "a shape that overflows": file_of({"a": entry(shape=(2**63, 2**63))}, EIGHT),
    "a shape that wraps": file_of({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "true as a size": file_of({"a": entry(shape=(True, 2))}, EIGHT),
    "a size as text": file_of({"a": entry(shape=("2",))}, EIGHT),
    "unknown dtype": file_of({"a": entry("F99")}, EIGHT),
    "dtype in small letters": file_of({"a": entry("f32")}, EIGHT),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "another key": file_of({"a": entry(more=1)}, EIGHT),
    "a name twice": file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), EIGHT),
    "a key twice": file_of(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "metadata of a number": file_of({"__metadata__": {"a": 1}, "a": entry()}, EIGHT),
    "metadata that is a list": file_of({"__metadata__": [], "a": entry()}, EIGHT),
    "metadata of null": file_of({"__metadata__": None, "a": entry()}, EIGHT),
    "metadata alone": file_of({"__metadata__": {"a": "b"}}),
    "an empty name": file_of({"": entry()}, EIGHT),
    "NaN in the header": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT),
    "half of a pair": file_of(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "nested deeply": file_of(b'{"a":' + b"[" * 100_000, EIGHT),
    "not in order": file_of({"b": entry(offsets=(4, 8), shape=(1,)), "a": entry(offsets=(0, 4), shape=(1,))}, EIGHT),
    "half a number": file_of({"a": entry("F4", (3,), (0, 2))}, b"12"),
    "truth that is 2": file_of({"a": entry("BOOL", (2,), (0, 2))}, b"\1\2"),
}


READ = (
    "whole",
    "spaces behind",
    "spaces before",
    "no tensors",
    "metadata of null",
    "metadata alone",
    "an empty name",
    "not in order",
)
STRICTER = ("another key", "a name twice", "truth that is 2")  # these they read


@pytest.mark.parametrize("name", FILES)
def test_files_made_by_hand(name, tmp_path):
    found = outcome(FILES[name], tmp_path / "x.safetensors")
    assert found == ("read" if name in READ else "refused by us alone" if name in STRICTER else "refused")


def test_damaged_files(valid, tmp_path):
    assert outcome(valid, tmp_path / "x.safetensors") == "read"
    counts = Counter()
    for case in range(3000):
        rng = np.random.default_rng(case)
        data = valid
        for _ in range(rng.integers(1, 3)):
            change = [*BYTES, change_json, change_json, change_json][rng.integers(len(BYTES) + 3)]
            data = change(data, rng)
        try:
            counts[outcome(data, tmp_path / "x.safetensors")] += 1
        except AssertionError as error:
            raise AssertionError(f"case {case}: {error}") from error
    assert counts["read"] > 40
    assert counts["refused"] > 1000
