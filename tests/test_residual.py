"""Residuals: every bit comes back, or an error says that it does not."""

import tracemalloc
import zlib
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from jlora.errors import DataError
from jlora.residual import Packer, Residual, Unpacker, pack, unpack

DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
LOST = "does not lead back to the base: the weight or the adapters are not those that were merged, or the arithmetic"


def from_bits(raw: Any, dtype: Any) -> Any:
    """Numbers of any bits: infinities, NaNs, denormals, negative zeros."""
    return np.ascontiguousarray(raw).view(dtype)


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@hypothesis.given(data=st.data())
def test_any_bits_come_back(dtype, data):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7))
    size = np.dtype(dtype).itemsize
    raw = hnp.arrays(np.uint8, (*shape, size))
    base, guess = (from_bits(data.draw(raw), dtype).reshape(shape) for _ in range(2))
    assert_same_bits(unpack(pack(base, guess), guess), base)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (127, 131), (3, 5, 7)])
def test_a_guess_that_is_off_by_little(rng, dtype, shape):
    base = np.asarray(rng.standard_normal(shape)).astype(dtype)
    guess = (base.astype(np.float64) * (1 + 1e-3 * rng.standard_normal(shape))).astype(dtype)
    assert_same_bits(unpack(pack(base, guess), guess), base)
    assert_same_bits(unpack(pack(base, base), base), base)


def test_arrays_of_jax_and_arrays_that_are_not_contiguous(rng):
    base = rng.standard_normal((7, 5)).astype(np.float32)
    packed = pack(jnp.asarray(base).T, jnp.asarray(base + 1).T)
    assert packed == pack(base.T, (base + 1).T)
    assert_same_bits(unpack(packed, (base + 1).T), base.T)


def blocks_of(array: Any, sizes: list[int]) -> list[Any]:
    return np.split(array, np.cumsum(sizes))


def pieces(packed: bytes, most: int) -> Any:
    """A reader that gives at most so many bytes at a time."""
    place = 0

    def read(count: int) -> bytes:
        nonlocal place
        data = packed[place : place + min(count, most)]
        place += len(data)
        return data

    return read


@pytest.mark.parametrize("most", [1, 7, 1 << 20])
@pytest.mark.parametrize("sizes", [[], [1, 1], [100], [0, 17, 0, 83], [3] * 30])
def test_block_by_block(rng, sizes, most):
    base = rng.standard_normal((131, 13)).astype(ml_dtypes.bfloat16)
    guess = (base.astype(np.float32) * 1.003).astype(ml_dtypes.bfloat16)
    packer = Packer()
    packed = b"".join(map(packer.add, blocks_of(base, sizes), blocks_of(guess, sizes)))
    end, digest = packer.finish()
    unpacker = Unpacker(pieces(packed + end, most), digest)
    found = np.concatenate([unpacker.restore(block) for block in blocks_of(guess, sizes)])
    unpacker.check()
    assert_same_bits(found, base)


def outcome(residual: Residual, guess: Any) -> Any:
    """The base, or the message of the error."""
    try:
        return unpack(residual, guess)
    except DataError as error:
        return str(error)


@pytest.fixture
def packed(rng):
    base = rng.standard_normal((61, 31)).astype(np.float32)
    guess = np.nextafter(base, np.float32(0))
    return pack(base, guess), base, guess


def test_every_damaged_byte_is_told_or_without_effect(packed, rng):
    residual, base, guess = packed
    told = 0
    for place in range(len(residual.packed)):
        damaged = bytearray(residual.packed)
        damaged[place] ^= 1 << int(rng.integers(8))
        found = outcome(Residual(bytes(damaged), residual.digest), guess)
        if isinstance(found, str):
            told += 1
            assert any(text in found for text in ("is damaged: Error -", "is cut short", LOST))
        else:
            assert_same_bits(found, base)
    assert told >= len(residual.packed) - 10


def test_every_cut_is_told_or_without_effect(packed):
    residual, base, guess = packed
    for length in range(len(residual.packed) - 8):
        with pytest.raises(DataError, match=r"^the residual is cut short$"):
            unpack(Residual(residual.packed[:length], residual.digest), guess)
    for length in range(len(residual.packed) - 8, len(residual.packed)):
        found = outcome(Residual(residual.packed[:length], residual.digest), guess)
        assert "is cut short" in found if isinstance(found, str) else found.tobytes() == base.tobytes()


def test_bytes_that_are_no_deflate_stream(packed):
    residual, _, guess = packed
    with pytest.raises(DataError, match=r"^the residual is damaged: Error -3 while decompressing data: "):
        unpack(Residual(b"words" * 100, residual.digest), guess)


def test_another_digest_another_guess_another_dtype(packed):
    residual, base, guess = packed
    for wrong in ("0" * 64, "", residual.digest[:-1], residual.digest.upper()):
        with pytest.raises(DataError, match=LOST):
            unpack(Residual(residual.packed, wrong), guess)
    other = guess.copy()
    other[60, 30] += 1
    for wrong in (other, guess.view(np.int32) + 1, guess[:-1], np.nextafter(base, np.float32(9))):
        with pytest.raises(DataError, match=LOST):
            unpack(residual, wrong)
    with pytest.raises(DataError, match=r"is cut short"):
        unpack(residual, np.concatenate([guess, guess]))


def test_a_bomb_takes_no_more_memory_than_the_weight():
    bomb = zlib.compress(bytes(100 << 20), 9)
    guess = np.ones((64, 64), np.float32)
    tracemalloc.start()
    with pytest.raises(DataError, match=LOST):
        unpack(Residual(bomb, "0" * 64), guess)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 << 20


def test_the_repr_does_not_show_the_bytes():
    residual = pack(np.ones(3, np.float32), np.zeros(3, np.float32))
    assert repr(residual) == f"Residual({len(residual.packed)} bytes, base {residual.digest[:12]})"


@pytest.mark.parametrize("std", [0.0005, 0.002, 0.005, 0.02])
def test_the_size_of_what_merging_bfloat16_loses(rng, std):
    base = (0.02 * rng.standard_normal((512, 512))).astype(ml_dtypes.bfloat16)
    delta = (std * rng.standard_normal((512, 512))).astype(np.float32)
    merged = (base.astype(np.float32) + delta).astype(ml_dtypes.bfloat16)
    guess = (merged.astype(np.float32) - delta).astype(ml_dtypes.bfloat16)
    residual = pack(base, guess)
    assert_same_bits(unpack(residual, guess), base)
    assert 0.05 <= len(residual.packed) / base.size <= 0.6, len(residual.packed) / base.size


def test_what_stands_behind_the_end_is_not_read(rng):
    base = rng.standard_normal(1000).astype(np.float32)
    residual = pack(base, base)
    calls = []

    def read(count):
        calls.append(count)
        return residual.packed if len(calls) == 1 else b"\0" * count

    unpacker = Unpacker(read, residual.digest)
    with pytest.raises(DataError, match="cut short"):
        unpacker.restore(np.zeros(10**6, np.float32))
    assert len(calls) < 5
