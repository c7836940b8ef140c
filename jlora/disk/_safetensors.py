"""Tensors in safetensors files, read and written by ranges, so that a file larger than memory can be worked through.

A file is 8 bytes of length n, n bytes of JSON, and the tensors' bytes. Each tensor's entry gives its dtype, shape and
the range of its bytes; the ranges cover the rest of the file without a gap or an overlap (the format's specification,
https://github.com/huggingface/safetensors).
"""

import copy
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import ml_dtypes
import numpy as np

from jlora.disk._formats import START, format_of
from jlora.disk._lazy import LazyArray
from jlora.disk._open import changed, identity, open_to_read, reason
from jlora.disk._small import parse_json
from jlora.errors import DataError, shortened

_MOST_HEADER = 100_000_000
_MOST_AXES = 64

# In the order of the format's own library, by which it sorts the tensors of a file.
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
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
}
_BITS = {code: 8 * np.dtype(dtype).itemsize for code, dtype in _DTYPES.items()}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # carried as bytes, never read as numbers
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class Writer(Protocol):
    """What tensors are written to: a file, or what passes the bytes on to one."""

    def write(self, data: Any, /) -> Any:
        """Takes bytes."""


class TensorEntry(NamedTuple):
    """One tensor of a file: its dtype as the file names it, its shape, and the range of its bytes in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in NumPy.

        Raises:
          DataError: NumPy has none, as for numbers of four bits.
        """
        if self.code not in _DTYPES:
            raise DataError(f"dtype {self.code} cannot be read as numbers")
        return np.dtype(_DTYPES[self.code])


class TensorFile:
    """A safetensors file, opened for reading; a context manager.

    Attributes:
      entries: name -> TensorEntry, in the order of their bytes.
      metadata: the strings that the file carries.
      data_start: where the tensors' bytes begin; all before it is the header.

    Raises:
      DataError: what is no such file, cut short, or lies about itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle = open_to_read(self.path)
        try:
            self.entries, self.metadata, self.data_start = self._header()
        except BaseException as error:
            self.close()
            if not isinstance(error, ValueError) or isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: not a readable safetensors file: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._handle

    def identity(self) -> tuple[int, ...]:
        """What changes when the file is written to, and is another one's in a file that takes its place."""
        return identity(os.fstat(self._handle))

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor, `entries[name].shape`, in memory of its own.

        Raises:
          DataError: no such tensor, a dtype that NumPy lacks, bytes that are no bool, too large for the memory.
        """
        if name not in self.entries:
            raise DataError(f"{self.path}: no tensor {shortened(name)}")
        entry = self.entries[name]
        if entry.code not in _DTYPES:
            raise DataError(f"{self.path}: {shortened(name)}: dtype {entry.code} cannot be read as numbers")
        try:
            flat = np.empty(math.prod(entry.shape), entry.dtype)
        except MemoryError:
            size = entry.stop - entry.start
            raise DataError(f"{self.path}: {shortened(name)}: no memory for its {size:,} bytes") from None
        self.read_into(entry.start, flat)
        if entry.code == "BOOL" and flat.size and flat.view(np.uint8).max() > 1:
            raise DataError(f"{self.path}: {shortened(name)}: a bool that is neither 0 nor 1")
        return flat.reshape(entry.shape)

    def lazy(self, name: str) -> LazyArray:
        """One tensor, read from the file anew each time that its numbers are asked for, also when this is closed."""

        def load() -> np.ndarray[Any, Any]:
            file = copy.copy(self)
            file._handle = open_to_read(self.path)
            with file:
                if file.identity() != found:
                    raise changed(self.path)
                return file.read(name)

        entry, found = self.entries[name], self.identity()
        return LazyArray(entry.shape, entry.dtype, load)

    def read_into(self, start: int, array: np.ndarray[Any, Any]) -> None:
        """Fills a contiguous array with the bytes of the file from `start` on."""
        left = _bytes_of(array)
        while left.nbytes:
            try:
                count = os.preadv(self._handle, [left], start)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read: {reason(error)}") from None
            if count <= 0:
                raise DataError(f"{self.path}: cut short at byte {start:,} while it was read")
            left, start = left[count:], start + count

    def _header(self) -> tuple[dict[str, TensorEntry], dict[str, str], int]:
        size = os.fstat(self._handle).st_size
        if size < 8:
            raise ValueError(f"{size} bytes, which is less than a header")
        first = np.empty(8, np.uint8)
        self.read_into(0, first)
        length = int.from_bytes(first.tobytes(), "little")
        if length > min(size - 8, _MOST_HEADER):
            start = np.empty(min(size, START), np.uint8)
            self.read_into(0, start)
            what = f"a header of {length:,} bytes in a file of {size:,}: cut short, or another format"
            raise ValueError(format_of(start.tobytes()) or what)
        text = np.empty(length, np.uint8)
        self.read_into(8, text)
        data = parse_json(text.tobytes())
        metadata = _metadata(data.pop("__metadata__", {}))
        return _entries(data, 8 + length, size), metadata, 8 + length


def write_tensors(file: Writer, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays as one safetensors file, wide dtypes first and then by name, as the format's own library does.

    Arrays may be in any order in memory; each is brought to C order as it is written. Those of JAX come to the host one
    at a time.

    Raises:
      DataError: a dtype or a name that the format cannot hold.
    """
    arrays = {name: tensors[name] for name in sorted(tensors, key=lambda n: (-_position(tensors[n].dtype), n))}
    file.write(header_bytes({name: (array.dtype, array.shape) for name, array in arrays.items()}, metadata))
    for array in arrays.values():
        file.write(tensor_bytes(array))


def header_bytes(layout: Mapping[str, tuple[Any, Iterable[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a file whose tensors, name -> (dtype, shape), follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name, (dtype, shape) in layout.items():
        code = _code(dtype)
        if code is None:
            raise DataError(f"{name}: dtype {dtype} has no place in a safetensors file")
        if name == "__metadata__":
            raise DataError(f"{name}: the name is taken by the format: rename the tensor")
        start, stop = stop, stop + math.prod(shape) * _BITS[code] // 8
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("half of a surrogate pair in a name or in the metadata") from None
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        raise DataError(f"a header of {len(text):,} bytes: the format's readers take at most {_MOST_HEADER:,}")
    return len(text).to_bytes(8, "little") + text


def can_store(dtype: Any) -> bool:
    """Whether a safetensors file can hold numbers of this dtype."""
    return _code(dtype) is not None


def _code(dtype: Any) -> str | None:
    try:
        return _CODES.get(np.dtype(dtype).newbyteorder("="))
    except TypeError:  # such as the dtype of a PRNG key
        return None


def _position(dtype: Any) -> int:
    return list(_BITS).index(_code(dtype) or "BOOL")


def bytes_of(shape: Iterable[int], dtype: Any) -> int:
    """The size of a tensor in bytes."""
    return math.prod(shape) * int(np.dtype(dtype).itemsize)


def bytes_of_all(tensors: Mapping[str, Any]) -> int:
    """The size of arrays in bytes."""
    return sum(bytes_of(array.shape, array.dtype) for array in tensors.values())


def tensor_bytes(array: Any) -> memoryview:
    """The bytes of an array in C order, little-endian."""
    host = np.asarray(array)
    host = host.astype(host.dtype.newbyteorder("<"), copy=False) if host.dtype.byteorder == ">" else host
    return _bytes_of(np.ascontiguousarray(host))


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    raw: Any = array.reshape(-1).view(np.uint8)
    return memoryview(raw)


def _metadata(data: Any) -> dict[str, str]:
    if data is None:  # as MLX writes it where there is none
        return {}
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise ValueError("__metadata__ is no mapping of strings")
    return data


def _entries(data: Mapping[str, Any], data_start: int, size: int) -> dict[str, TensorEntry]:
    entries = {name: _entry(name, value, data_start) for name, value in data.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = data_start
    for name, entry in entries.items():
        if entry.start != position:
            raise ValueError(f"the bytes of {shortened(name)} overlap with another tensor's, or leave a gap")
        position = entry.stop
    if position != size:
        cut = "cut short" if position > size else "bytes at its end that belong to no tensor"
        raise ValueError(f"its tensors end at byte {position:,}, the file at byte {size:,}: {cut}")
    return entries


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {shortened(name)} is not made of dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _BITS:
        raise ValueError(f"{shortened(name)} has the unknown dtype {shortened(code)}")
    if not _naturals(shape) or len(shape) > _MOST_AXES or 16 * math.prod(size or 1 for size in shape) >= 2**63:
        raise ValueError(f"{shortened(name)} has the shape {shortened(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shortened(name)} has the data_offsets {shortened(offsets)}")
    start, stop = offsets
    if math.prod(shape) * _BITS[code] != 8 * (stop - start):
        raise ValueError(f"{shortened(name)} {code} {shape} does not fit in its {stop - start:,} bytes")
    return TensorEntry(code, tuple(shape), data_start + start, data_start + stop)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
