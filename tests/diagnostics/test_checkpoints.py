"""Two checkpoints compared by blocks, against NumPy on the whole arrays, and in bounded memory."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jlora import DataError
from jlora.diagnostics import CheckpointDifference, TensorDifference, _checkpoints, diff_checkpoints
from jlora.disk import write_tensors

BF16 = ml_dtypes.bfloat16


def write(path: Path, tensors: dict[str, Any]) -> Path:
    with open(path, "wb") as file:
        write_tensors(file, tensors)
    return path


def compare(folder: Path, left: dict[str, Any], right: dict[str, Any]) -> CheckpointDifference:
    return diff_checkpoints(write(folder / "left.safetensors", left), write(folder / "right.safetensors", right))


def row(folder: Path, left: np.ndarray, right: np.ndarray) -> TensorDifference:
    (found,) = compare(folder, {"w": left}, {"w": right}).rows
    return found


@pytest.fixture(params=[64, 1 << 22])
def block(request, monkeypatch):
    monkeypatch.setattr(_checkpoints, "BLOCK_BYTES", request.param)


DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "int8", "int32", "uint16", "complex64"]


def drawn(rng: np.random.Generator, dtype: str) -> np.ndarray:
    numbers = 10 * rng.standard_normal((13, 11))
    numbers = np.abs(numbers) if dtype.startswith("u") else numbers
    return numbers.astype(getattr(ml_dtypes, dtype, None) or np.dtype(dtype))


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", DTYPES)
def test_changed_values(tmp_path, rng, dtype):
    left, right = drawn(rng, dtype), drawn(rng, dtype)
    right = np.where(rng.random(left.shape) < 0.3, right, left)
    found = row(tmp_path, left, right)
    apart = np.abs(wide(left) - wide(right))
    assert (found.status, found.shapes) == ("changed", ((13, 11), (13, 11)))
    assert found.elements == np.count_nonzero(apart)
    assert found.largest == apart.max()
    assert found.relative == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(wide(left)), rel=1e-12)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_identical_bytes(tmp_path, rng, dtype):
    left = drawn(rng, dtype)
    assert row(tmp_path, left, left.copy()).status == "identical"


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("first", "second"), [("bfloat16", "float32"), ("float32", "float64"), ("int8", "int32")])
def test_other_dtypes_are_compared_by_value(tmp_path, rng, first, second):
    left = drawn(rng, first)
    same = left.astype(second)
    found = row(tmp_path, left, same)
    assert (found.status, found.elements, found.largest, found.relative) == ("dtype differs", 0, 0.0, 0.0)
    right = same.copy()
    right[3, 5] += 8
    found = row(tmp_path, left, right)
    assert (found.elements, found.largest) == (1, 8.0)
    assert found.relative == pytest.approx(8 / np.linalg.norm(left.astype(np.float64)))


def test_large_integers_of_two_dtypes(tmp_path):
    left, right = np.array([2**60 + 1, 5], np.int64), np.array([2**60, 5], np.uint64)
    assert row(tmp_path, left, right).elements == 1


def test_values_that_are_not_finite(tmp_path):
    left = np.array([np.nan, np.inf, 1.0, -0.0], np.float32)
    assert row(tmp_path, left, left.copy()).status == "identical"
    found = row(tmp_path, left, left.astype(np.float64))
    assert (found.elements, found.largest) == (0, 0.0)
    found = row(tmp_path, left, np.array([np.nan, np.inf, np.nan, 0.0], np.float32))
    assert found.elements == 2
    assert np.isnan(found.largest)


def test_shapes_and_sides(tmp_path):
    ones = np.ones((3, 5), np.float32)
    found = compare(tmp_path, {"a": ones, "b": ones, "c": ones}, {"b": ones.T, "c": ones, "d": ones.astype(BF16)})
    assert [(r.name, r.status) for r in found.rows] == [
        ("a", "only left"),
        ("b", "shape differs"),
        ("c", "identical"),
        ("d", "only right"),
    ]
    assert found.rows[3].dtypes == (None, "BF16")
    assert not found.is_identical


def test_empty_tensors_and_scalars(tmp_path):
    left = {"empty": np.ones((0, 5), np.float32), "scalar": np.float32(3).reshape(())}
    assert compare(tmp_path, left, left).is_identical
    found = compare(tmp_path, left, {"empty": np.ones((0, 5), BF16), "scalar": np.float32(5).reshape(())}).rows
    assert {r.name: (r.status, r.elements, r.largest) for r in found} == {
        "empty": ("dtype differs", 0, 0.0),
        "scalar": ("changed", 1, 2.0),
    }


def test_a_left_of_zeros(tmp_path):
    zeros = np.zeros(7, np.float32)
    assert row(tmp_path, zeros, zeros + 1).relative == np.inf


def packed(path: Path, data: bytes) -> Path:
    header = {"w": {"dtype": "F4", "shape": [2 * len(data)], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_numbers_of_four_bits_are_compared_by_bytes(tmp_path):
    left = packed(tmp_path / "left", bytes(range(11)))
    assert diff_checkpoints(left, packed(tmp_path / "same", bytes(range(11)))).is_identical
    (found,) = diff_checkpoints(left, packed(tmp_path / "right", bytes(range(1, 12)))).rows
    assert (found.status, found.elements, found.largest, found.relative) == ("changed", None, None, None)


def sharded(folder: Path, shards: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    weight_map = {}
    for i, tensors in enumerate(shards):
        write(folder / f"part-{i}.safetensors", tensors)
        weight_map |= dict.fromkeys(tensors, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_against_one_file_and_progress(tmp_path, rng):
    tensors = {name: rng.standard_normal((5, 7)).astype(np.float32) for name in "abcd"}
    left = sharded(tmp_path / "left", [{n: tensors[n] for n in "ac"}, {n: tensors[n] for n in "bd"}])
    right = write(tmp_path / "right.safetensors", tensors)
    seen: list[tuple[int, int]] = []
    found = diff_checkpoints(left, right, on_progress=lambda done, total: seen.append((done, total)))
    assert found.is_identical
    assert seen == [(140 * i, 560) for i in range(1, 5)]
    assert [r.name for r in found.rows] == list("acbd")


GOLDEN = """\
tensor     status         shape      dtype       elements differ  largest  relative
─────────  ─────────────  ─────────  ──────────  ───────────────  ───────  ────────
a          changed        3x5        F32                       1        3     0.775
b          shape differs  3x5 | 5x3  F32                       -        -         -
c          dtype differs  3x5        F32 | BF16                0        0         0
─────────  ─────────────  ─────────  ──────────  ───────────────  ───────  ────────
4 tensors                                                      1
1 identical, 1 changed, 1 dtype differs, 1 shape differs"""


def small(tmp_path: Path) -> CheckpointDifference:
    ones = np.ones((3, 5), np.float32)
    changed = ones.copy()
    changed[1, 2] = 4
    left = dict.fromkeys("abcd", ones)
    return compare(tmp_path, left, {"a": changed, "b": ones.T, "c": ones.astype(BF16), "d": ones})


def test_the_table(tmp_path):
    found = small(tmp_path)
    assert found.counts()["only right"] == 0
    assert str(found) == repr(found) == GOLDEN
    assert "<td>dtype differs</td>" in found._repr_html_()


def test_many_rows_are_cut_in_the_table_alone(tmp_path):
    left = {f"w{i:03}": np.float32([i, 1]) for i in range(33)}
    found = compare(tmp_path, left, {name: array + 1 for name, array in left.items()})
    assert len(found.rows) == 33
    assert str(found).endswith("\nand 13 more\n33 changed")
    assert "w019" in str(found)
    assert "w020" not in str(found)
    assert "<p>and 13 more</p>" in found._repr_html_()


def test_files_that_are_not_there(tmp_path):
    left = write(tmp_path / "left.safetensors", {"w": np.ones(3)})
    with pytest.raises(DataError, match="right: no such file or folder"):
        diff_checkpoints(left, tmp_path / "right")
    (tmp_path / "bad.safetensors").write_bytes(b"1234567890")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        diff_checkpoints(left, tmp_path / "bad.safetensors")


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    small(tmp_path)
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before


def sparse(path: Path, elements: int, changed: dict[int, float]) -> Path:
    """A file of float32 zeros that takes no room, but for some elements."""
    header = {"w": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * elements)
        for index, value in changed.items():
            file.seek(8 + len(text) + 4 * index)
            file.write(np.float32(value).tobytes())
    return path


def test_memory_is_bounded(tmp_path):
    """128 MiB of each side, in less than 40 MiB."""
    elements = 1 << 25
    left = sparse(tmp_path / "left", elements, {0: 3.0, elements - 1: 4.0})
    right = sparse(tmp_path / "right", elements, {0: 3.0, 12_345_678: 12.0, elements - 1: 4.0})
    tracemalloc.start()
    try:
        (found,) = diff_checkpoints(left, right).rows
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (found.status, found.elements, found.largest, found.relative) == ("changed", 1, 12.0, 12 / 5)
    assert peak < 40 << 20
