"""The bits that unmerging by arithmetic would not give back, compressed, with a hash of the base they lead to.

Merging rounds: W' = round(W + D). The same arithmetic backwards, round(W' - D), misses W in its last bits. What is kept
is the exclusive or of the two, its bytes grouped by their place in a number, since the high ones are almost all zero.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jlora.errors import DataError

__all__ = ["Packer", "Residual", "Unpacker", "pack", "unpack"]

# Runs alone, no matches: the high bytes are zero, the low ones noise. Smaller than level 6, and six times as fast.
_DEFLATE = (1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)


@dataclasses.dataclass(frozen=True)
class Residual:
    """What leads from an unmerged weight to the base, bit by bit.

    Attributes:
      packed: the exclusive or of both, deflated.
      digest: the SHA-256 of the base's bytes, in hexadecimal.
    """

    packed: bytes
    digest: str

    def __repr__(self) -> str:
        return f"Residual({len(self.packed):,} bytes, base {self.digest[:12]})"


class Packer:
    """Packs the residual of one weight, block by block."""

    def __init__(self) -> None:
        self._deflate, self._hash = zlib.compressobj(*_DEFLATE), hashlib.sha256()

    def add(self, base: np.ndarray[Any, Any], guess: np.ndarray[Any, Any]) -> bytes:
        """The next bytes of the packed residual, for a block of the base and what unmerging gives for it."""
        own, other = _bits(base), _bits(guess)
        self._hash.update(own.data)
        return self._deflate.compress(np.ascontiguousarray((own ^ other).T).data)

    def finish(self) -> tuple[bytes, str]:
        """The last bytes, and the digest of the base."""
        return self._deflate.flush(), self._hash.hexdigest()


class Unpacker:
    """Gives back a base, block by block, in the blocks in which it was packed.

    `read` gives the next bytes of the packed residual, at most as many as it is asked for.
    """

    def __init__(self, read: Callable[[int], bytes], digest: str) -> None:
        self._read, self._digest = read, digest
        self._inflate, self._hash = zlib.decompressobj(), hashlib.sha256()

    def restore(self, guess: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The block of the base whose unmerging gave `guess`."""
        bits = _bits(guess)
        planes = np.frombuffer(self._take(bits.size), np.uint8).reshape(bits.shape[::-1])
        base = np.ascontiguousarray(bits ^ planes.T)
        self._hash.update(base.data)
        return base.reshape(-1).view(guess.dtype).reshape(guess.shape)

    def check(self) -> None:
        """Raises a DataError where what was restored is not the base."""
        if self._hash.hexdigest() != self._digest:
            raise DataError(
                "the residual does not lead back to the base: the weight or the adapters are not those that were "
                "merged, or the arithmetic of this machine differs; keep the base"
            )

    def _take(self, size: int) -> bytes:
        parts = []
        try:
            while size:
                if self._inflate.eof:
                    raise DataError("the residual is cut short")
                more = self._inflate.unconsumed_tail or self._read(1 << 20)
                part = self._inflate.decompress(more, size)
                if not part and not more:
                    raise DataError("the residual is cut short")
                parts.append(part)
                size -= len(part)
        except zlib.error as error:
            raise DataError(f"the residual is damaged: {error}") from None
        return b"".join(parts)


def pack(base: Any, guess: Any) -> Residual:
    """The residual of one weight in memory."""
    packer = Packer()
    start = packer.add(np.asarray(base), np.asarray(guess))
    end, digest = packer.finish()
    return Residual(start + end, digest)


def unpack(residual: Residual, guess: Any) -> np.ndarray[Any, Any]:
    """The base of which `pack` kept the residual, checked by its hash.

    Raises:
      DataError: it does not come out.
    """
    left = iter((residual.packed,))
    unpacker = Unpacker(lambda _: next(left, b""), residual.digest)
    base = unpacker.restore(np.asarray(guess))
    unpacker.check()
    return base


def _bits(array: np.ndarray[Any, Any]) -> Any:
    """The bytes of an array, one row for each number."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(array.size, array.dtype.itemsize)
