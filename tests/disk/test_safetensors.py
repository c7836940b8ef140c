"""Safetensors files: byte by byte those of the format's own library, and every lie of a header refused."""

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given

from jlora import DataError
from jlora.disk import TensorFile, can_store, tensor_bytes, write_tensors

CODES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "C64": np.complex64,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def arrays(draw: Any) -> np.ndarray:
    """Random bytes of any dtype, of no axes or of size zero too, in any order in memory."""
    dtype = np.dtype(draw(st.sampled_from(list(CODES.values()))))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    data = rng.integers(0, 2 if dtype.kind == "b" else 256, (*shape, dtype.itemsize), np.uint8)
    array = np.ascontiguousarray(data).view(dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def by_library(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None) -> bytes:
    """What the library writes; it wants arrays in C order, and writes others wrongly."""
    return safetensors.numpy.save({name: array.copy(order="C") for name, array in tensors.items()}, metadata)


@given(st.dictionaries(NAMES, arrays(), max_size=6), st.none() | st.tuples(NAMES, NAMES))
def test_byte_by_byte_what_the_library_writes(tmp_path_factory, tensors, item):
    path = tmp_path_factory.mktemp("any") / "file.safetensors"
    metadata = None if item is None else {item[0]: item[1]}
    with path.open("wb") as file:
        write_tensors(file, tensors, metadata)
    assert path.read_bytes() == by_library(tensors, metadata)
    with TensorFile(path) as found:
        assert found.metadata == (metadata or {})
        assert found.entries.keys() == tensors.keys()
        for name, array in tensors.items():
            assert same(found.read(name), array)
            assert np.dtype(CODES[found.entries[name].code]) == array.dtype
            assert found.entries[name].dtype == array.dtype


def test_the_library_reads_it(tmp_path, rng):
    tensors = {"a": rng.standard_normal((3, 5)).astype(np.float32).T, "b": rng.standard_normal(7).astype(np.float16)}
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, tensors, {"format": "pt", "more": "é"})
    found = safetensors.numpy.load_file(tmp_path / "file")
    assert all(same(found[name], array) for name, array in tensors.items())
    with safetensors.safe_open(tmp_path / "file", "np") as opened:
        assert opened.metadata() == {"format": "pt", "more": "é"}


def test_big_endian_arrays_are_turned(tmp_path, rng):
    array = rng.standard_normal((3, 5)).astype(">f4")
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, {"a": array})
    with TensorFile(tmp_path / "file") as found:
        np.testing.assert_array_equal(found.read("a"), array)
    assert bytes(tensor_bytes(array)) == array.astype("<f4").tobytes()


def test_what_the_format_cannot_hold(tmp_path):
    cases: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "a: dtype complex128 has no place": ({"a": np.ones(2, complex)}, {}),
        "a: dtype object has no place": ({"a": np.array([None])}, {}),
        "a: dtype <U3 has no place": ({"a": np.array(["abc"])}, {}),
        "__metadata__: the name is taken by the format": ({"__metadata__": np.ones(2)}, {}),
        "half of a surrogate pair": ({"\ud800": np.ones(2)}, {}),
        "half of a surrogate pair in a name or in the metadata": ({"a": np.ones(2)}, {"a": "\udc00"}),
    }
    for message, (tensors, metadata) in cases.items():
        with (tmp_path / "file").open("wb") as file, pytest.raises(DataError, match=re.escape(message)):
            write_tensors(file, tensors, metadata)
    assert can_store(np.float32)
    assert can_store(ml_dtypes.bfloat16)
    assert not can_store(ml_dtypes.int4)


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HUGE = "9" * 5000
LIES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "Expecting property name"),
    "a list": ([], "wanted an object, found list"),
    "latin-1": (b'{"\xe9": 1}', "'utf-8' codec can't decode"),
    "a surrogate": (b'{"\\ud800": 1}', "half of a surrogate pair"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"),
    "digits": (b'{"a": ' + HUGE.encode() + b"}", "Exceeds the limit"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 50_000, "nested too deeply"),
    "twice": (b'{"a": 1, "a": 1}', "key 'a' stands twice"),
    "twice in an entry": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "key 'dtype' stands twice"),
    "a long key twice": (b'{"%s": 1, "%s": 1}' % (b"x" * 9999, b"x" * 9999), "key 'xxx+[.][.][.] stands twice"),
    "entry": ({"a": 3}, "the entry of 'a' is not made of dtype, shape and data_offsets"),
    "more": ({"a": {**one()["a"], "x": 1}}, "the entry of 'a' is not made of"),
    "fewer": ({"a": {"dtype": "F32", "shape": [2]}}, "the entry of 'a' is not made of"),
    "dtype": (one("F33"), "'a' has the unknown dtype 'F33'"),
    "dtype number": (one(32), "'a' has the unknown dtype 32"),
    "dtype list": (one(["F32"]), r"'a' has the unknown dtype \['F32'\]"),
    "long dtype": (one("F" * 9999), "'a' has the unknown dtype 'FFF+[.][.][.]\\Z"),
    "shape": (one(shape="2"), "'a' has the shape '2'"),
    "negative": (one(shape=[-2]), r"'a' has the shape \[-2\]"),
    "fraction": (one(shape=[2.0]), r"'a' has the shape \[2.0\]"),
    "bool": (one(shape=[True, 2]), r"'a' has the shape \[True, 2\]"),
    "infinite": (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', r"'a' has the shape \[inf\]"),
    "axes": (one(shape=[1] * 65), "'a' has the shape"),
    "large": (one(shape=[2**63]), "'a' has the shape"),
    "overflow": (one(shape=[2**32, 2**32]), "'a' has the shape"),
    "empty and large": (one(shape=[0, 2**62, 2**62], offsets=[0, 0]), "'a' has the shape"),
    "offsets": (one(offsets=[0]), r"'a' has the data_offsets \[0\]"),
    "backwards": (one(offsets=[8, 0]), r"'a' has the data_offsets \[8, 0\]"),
    "negative offsets": (one(offsets=[-8, 0]), "'a' has the data_offsets"),
    "too small": (one(shape=[3]), r"'a' F32 \[3\] does not fit in its 8 bytes"),
    "beyond": (one(shape=[4], offsets=[0, 16]), "its tensors end at byte [0-9]+, the file at byte [0-9]+: cut short"),
    "unused": (one(shape=[1], offsets=[0, 4]), "bytes at its end that belong to no tensor"),
    "gap": (one(shape=[1], offsets=[4, 8]), "the bytes of 'a' overlap with another tensor's, or leave a gap"),
    "overlap": ({**one(), "b": one()["a"]}, "the bytes of 'b' overlap"),
    "far": (one(shape=[2**40], offsets=[0, 2**42]), "cut short"),
    "metadata": ({"__metadata__": [], **one()}, "__metadata__ is no mapping of strings"),
    "metadata values": ({"__metadata__": {"a": 1}, **one()}, "__metadata__ is no mapping of strings"),
    "half a byte": (one("F4", [3], [0, 2]), r"'a' F4 \[3\] does not fit"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies(tmp_path, case):
    header, message = LIES[case]
    path = write_header(tmp_path / "file", header, bytes(8))
    with pytest.raises(DataError, match=message) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(f"{path}: not a readable safetensors file: ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("more", [{}, {"__metadata__": None}])  # null, as MLX writes it
def test_an_honest_header(tmp_path, more):
    with TensorFile(write_header(tmp_path / "file", {**more, **one()}, bytes(8))) as file:
        assert same(file.read("a"), np.zeros(2, np.float32))
        assert file.metadata == {}


@pytest.mark.parametrize("length", [9, 2**20, 100_000_001, 2**63, 2**64 - 1])
def test_a_length_that_lies(tmp_path, length):
    path = write_header(tmp_path / "file", b"{}", length=length)
    with pytest.raises(DataError, match=f"a header of {length:,} bytes in a file of 10: cut short"):
        TensorFile(path)


def test_files_cut_short(tmp_path, rng):
    path = tmp_path / "file"
    with path.open("wb") as file:
        write_tensors(file, {"a": rng.standard_normal(5), "b": np.ones((0, 3))})
    whole = path.read_bytes()
    for count in range(len(whole)):
        path.write_bytes(whole[:count])
        with pytest.raises(DataError, match=r"which is less than a header|cut short"):
            TensorFile(path)


def test_a_file_cut_short_while_it_is_read(tmp_path):
    path = write_header(tmp_path / "file", one(), bytes(8))
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(DataError, match=r"cut short at byte [0-9]+ while it was read"):
            file.read("a")


def test_what_cannot_be_read_as_numbers(tmp_path):
    with TensorFile(write_header(tmp_path / "file", one("F4", [4], [0, 2]), bytes(2))) as file:
        with pytest.raises(DataError, match="'a': dtype F4 cannot be read as numbers"):
            file.read("a")
        with pytest.raises(DataError, match="dtype F4 cannot be read as numbers"):
            _ = file.entries["a"].dtype
        with pytest.raises(DataError, match="no tensor 'b'"):
            file.read("b")
    path = write_header(tmp_path / "file", one("BOOL", [2], [0, 2]), b"\1\2")
    with TensorFile(path) as file, pytest.raises(DataError, match="'a': a bool that is neither 0 nor 1"):
        file.read("a")


def test_a_sparse_file_larger_than_memory(tmp_path):
    size = 2**50
    path = write_header(tmp_path / "file", one("U8", [size], [0, size]))
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        size = 2**43
        path = write_header(tmp_path / "file", one("U8", [size], [0, size]))
        os.truncate(path, path.stat().st_size + size)
    with TensorFile(path) as file:
        assert file.entries["a"].shape == (size,)


def test_an_array_without_memory(tmp_path, monkeypatch):
    with TensorFile(write_header(tmp_path / "file", one(), bytes(8))) as file:

        def empty(*_: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(np, "empty", empty)
        with pytest.raises(DataError, match="'a': no memory for its 8 bytes"):
            file.read("a")


def test_a_disk_that_fails(tmp_path, monkeypatch):
    with TensorFile(write_header(tmp_path / "file", one(), bytes(8))) as file:

        def preadv(*_: Any) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(DataError, match="file: cannot be read: Input/output error"):
            file.read("a")


def test_a_file_is_closed_once(tmp_path):
    file = TensorFile(write_header(tmp_path / "file", one(), bytes(8)))
    with file:
        file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.fileno())


def test_a_header_larger_than_any_reader_takes_is_not_read(tmp_path):
    path = tmp_path / "file.safetensors"
    for length in (100_000_001, 150_000_000):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        os.truncate(path, 200_000_000)  # a hole, which takes no place
        tracemalloc.start()
        with pytest.raises(DataError, match=f"a header of {length:,} bytes in a file of 200,000,000"):
            TensorFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()
