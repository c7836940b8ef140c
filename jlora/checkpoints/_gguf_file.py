"""GGUF files: what they say, and their tensors as numbers, a few rows at a time.

    "GGUF"  version u32  tensors u64  pairs u64                          all little-endian; a string is u64 and UTF-8
    pairs    key  type u32  value                                        an array is type u32, count u64, values
    tensors  name  axes u32  sizes u64, the fastest first  type u32  start u64
    bytes of the tensors, from a multiple of general.alignment on        (ggml, docs/gguf.md)

The package `gguf` knows the types of blocks and makes numbers of them. The header is read here: its own reader makes
an array of every string and every number, and goes on behind the end of a file that is cut short.
"""

import importlib
import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from jlora.disk import START, format_of, open_to_read, reason
from jlora.errors import DataError, listed, shortened

_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_AXES = 4
_ALIGNMENT = 32
_NUMBERS_AT_ONCE = 4 << 20  # as float32 16 MiB


class GGUFTensor(NamedTuple):
    """One tensor of a file: ggml's type, the shape with the slowest axis first, and the range of its bytes."""

    type: int
    shape: tuple[int, ...]
    start: int
    stop: int


class GGUFFile:
    """A GGUF file, opened for reading; a context manager.

    Attributes:
      metadata: key -> a number, a bool, a string, or a list of one of them.
      tensors: name -> GGUFTensor.

    Raises:
      DataError: gguf is not installed; no such file, cut short, of another version or byte order, or not GGUF.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._gguf = Path(path), imported("gguf", "lm")
        self._file = os.fdopen(open_to_read(self.path), "rb")
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            tensors, pairs = self._start()
            self.metadata = self._pairs(pairs)
            self.tensors = self._places(tensors)
        except OSError as error:
            self.close()
            raise DataError(f"{self.path}: cannot be read: {reason(error)}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def unreadable(self) -> list[str]:
        """The tensors, with their types, of which gguf makes no numbers."""
        types = {tensor.type for tensor in self.tensors.values()}
        known = {type_ for type_ in types if self._is_known(type_)}
        return [
            f"{name} ({self._gguf.GGMLQuantizationType(tensor.type).name})"
            for name, tensor in self.tensors.items()
            if tensor.type not in known
        ]

    def read(self, name: str, dtype: Any, added: float = 0.0) -> np.ndarray[Any, Any]:
        """The numbers of a tensor plus `added`, computed in float32 and rounded once to `dtype`.

        Memory holds the result and a few rows in float32.
        """
        tensor = self.tensors[name]
        width = tensor.shape[-1] if tensor.shape else 1
        rows = math.prod(tensor.shape) // max(1, width)
        result = np.empty((rows, width), dtype)
        if result.size:
            row_bytes = (tensor.stop - tensor.start) // rows
            step = max(1, _NUMBERS_AT_ONCE // width)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                packed = self._bytes(tensor.start + first * row_bytes, count * row_bytes)
                numbers = self._numbers(name, packed, tensor.type, count)
                result[first : first + count] = numbers + np.float32(added) if added else numbers
        return result.reshape(tensor.shape)

    def _numbers(self, name: str, packed: bytes, type_: int, rows: int) -> np.ndarray[Any, Any]:
        """Rows of blocks as float32."""
        blocks = np.frombuffer(packed, np.uint8).reshape(rows, -1)
        with np.errstate(all="ignore"):  # what comes of it is looked at
            numbers: np.ndarray[Any, Any] = self._gguf.dequantize(blocks, self._gguf.GGMLQuantizationType(type_))
            if not np.isfinite(numbers).all():
                raise DataError(f"{self.path}: {shortened(name)} holds NaN or infinity: damaged, or badly quantised")
        return numbers

    def _is_known(self, type_: int) -> bool:
        _, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(type_)]
        try:
            self._gguf.dequantize(np.zeros((1, size), np.uint8), self._gguf.GGMLQuantizationType(type_))
        except NotImplementedError:
            return False
        return True

    def _start(self) -> tuple[int, int]:
        """How many tensors and pairs there are."""
        start = self._file.read(8)
        if start[:4] != b"GGUF" or len(start) < 8:
            instead = "" if start[:4] == b"GGUF" else format_of(start + self._file.read(START))
            raise DataError(f"{self.path}: is no GGUF file of a model{instead and f'; it is {instead}'}")
        version = int.from_bytes(start[4:], "little")
        if version not in _VERSIONS:
            if int.from_bytes(start[4:], "big") in _VERSIONS:
                raise DataError(f"{self.path}: is big-endian; give the little-endian file, as most machines have it")
            raise DataError(f"{self.path}: GGUF version {version:,}; versions {listed(_VERSIONS)} are known here")
        return self._number("Q"), self._number("Q")

    def _pairs(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in metadata:
                raise DataError(f"{self.path}: {shortened(key)} stands twice")
            metadata[key] = self._value(key)
        return metadata

    def _value(self, key: str) -> Any:
        type_ = self._number("I")
        if type_ == _STRING:
            return self._string()
        if type_ in _NUMBERS:
            return self._number(_NUMBERS[type_])
        if type_ != _ARRAY:
            raise DataError(f"{self.path}: {shortened(key)}: type {type_:,}, which GGUF does not have")
        type_, count = self._number("I"), self._number("Q")
        if type_ == _STRING:
            self._check_left(8 * count)
            return [self._string() for _ in range(count)]
        if type_ not in _NUMBERS:
            raise DataError(f"{self.path}: {shortened(key)}: an array of type {type_:,}, which is not known here")
        code = _NUMBERS[type_]
        data = self._taken(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", data))

    def _places(self, count: int) -> dict[str, GGUFTensor]:
        found: dict[str, GGUFTensor] = {}
        for _ in range(count):
            name = self._string()
            axes = self._number("I")
            if axes > _MOST_AXES:
                raise DataError(f"{self.path}: {shortened(name)}: {axes:,} axes; GGUF has at most {_MOST_AXES}")
            shape = tuple(reversed([self._number("Q") for _ in range(axes)]))
            type_, start = self._number("I"), self._number("Q")
            if name in found:
                raise DataError(f"{self.path}: {shortened(name)} stands twice")
            found[name] = GGUFTensor(type_, shape, start, start + self._size_of(name, type_, shape))
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise DataError(f"{self.path}: general.alignment = {shortened(alignment)}: wanted a power of two")
        begin = -(-self._file.tell() // alignment) * alignment
        moved = {
            name: tensor._replace(start=begin + tensor.start, stop=begin + tensor.stop)
            for name, tensor in found.items()
        }
        for name, tensor in moved.items():
            if tensor.stop > self._size:
                ends = f"{shortened(name)} ends at byte {tensor.stop:,}, the file at {self._size:,}"
                raise DataError(f"{self.path}: cut short: {ends}")
        return moved

    def _size_of(self, name: str, type_: int, shape: tuple[int, ...]) -> int:
        """The bytes of a tensor, of which every row is made of whole blocks."""
        try:
            block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(type_)]
        except (ValueError, KeyError):
            raise DataError(f"{self.path}: {shortened(name)}: ggml type {type_:,} is not known to gguf") from None
        if (shape[-1] if shape else 1) % block:
            raise DataError(f"{self.path}: {shortened(name)} {list(shape)}: rows are no multiple of blocks of {block}")
        return math.prod(shape) // block * size

    def _string(self) -> str:
        data = self._taken(self._number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{self.path}: {shortened(data)} is not UTF-8") from None

    def _number(self, code: str) -> Any:
        form = f"<{code}"
        return struct.unpack(form, self._taken(struct.calcsize(form)))[0]

    def _taken(self, count: int) -> bytes:
        """The next bytes of the header."""
        self._check_left(count)
        return self._file.read(count)

    def _check_left(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise DataError(f"{self.path}: cut short or damaged: its header goes on behind its {self._size:,} bytes")

    def _bytes(self, start: int, count: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(count)
        if len(data) < count:
            raise DataError(f"{self.path}: cut short at byte {start + len(data):,} while it was read")
        return data


def imported(name: str, extra: str) -> Any:
    """A package that is not in every installation."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is not installed: pip install 'jlora[{extra}]'") from None
