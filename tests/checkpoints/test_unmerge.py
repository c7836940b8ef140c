"""Adapters taken out of checkpoints: to the bit with a residual, within what the report says without."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.checkpoints import _arithmetic, _residuals, merge, unmerge
from jlora.errors import DataError
from tests.checkpoints.make import (
    DTYPES,
    bits,
    factors,
    peft_parts,
    random,
    read,
    write_checkpoint,
    write_file,
    write_llama,
    write_own,
    write_peft,
)

FLOATS = ["bf16", "fp16", "fp32"]


def residual_files(folder: Path) -> list[Path]:
    return sorted(file for file in (folder / "jlora_residual").rglob("*") if file.is_file())


def merged_llama(folder: Path, rng: np.random.Generator, dtype: Any = DTYPES["bf16"]) -> tuple[Path, Path]:
    """A base and its adapter; the merged checkpoint, with its residual, is in "merged"."""
    _, base, adapter = write_llama(folder, rng, dtype)
    merge(base, adapter, folder / "merged", keep_residual=True)
    return base, adapter


@pytest.mark.parametrize("block", [1 << 18, 97])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_with_a_residual_every_file_is_the_base_again(tmp_path, rng, dtype, block, monkeypatch):
    monkeypatch.setattr(_arithmetic, "BLOCK", block)
    base, adapter = merged_llama(tmp_path, rng, dtype)
    report = unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert bits(tmp_path / "back") == bits(base)
    assert bits(tmp_path / "merged") != bits(base)
    assert (report.exact, report.uncertain, report.largest) == (True, 0, 0.0)
    assert str(report).endswith("every bit is the base's, checked by its hash")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block", [1 << 18, 97])
def test_a_residual_brings_back_what_no_arithmetic_could(tmp_path, rng, dtype, block, monkeypatch):
    monkeypatch.setattr(_arithmetic, "BLOCK", block)
    tensors = {name: random(rng, (31, 29), DTYPES[dtype]) for name in ("dora", "dora_io", "value", "offset")}
    tensors["dora"][3] = 0
    entries = {
        "dora": factors(rng, (31, 29), "oi", 3) | {"magnitude": random(rng, (31,))},
        "dora_io": factors(rng, (31, 29), "io", 3) | {"magnitude": random(rng, (29,))},
        "value": {"value": random(rng, (31, 29))},
        "offset": factors(rng, (31, 29), "oi", 3) | {"offset": random(rng, (31, 29))},
    }
    config = LoraConfig(rank=3, factorizations={"dora_io": "io", "**": "oi"})
    base, adapter = write_checkpoint(tmp_path / "base", tensors), write_own(tmp_path / "adapter", entries, config)
    merge(base, adapter, tmp_path / "merged", keep_residual=True)
    assert unmerge(tmp_path / "merged", adapter, tmp_path / "back").exact
    assert bits(tmp_path / "back") == bits(base)
    shutil.rmtree(tmp_path / "merged" / "jlora_residual")
    with pytest.raises(DataError, match=r"^dora: a value or a norm that is lost cannot be taken out; keep the base"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "back", force=True)


def test_several_adapters_come_out_together(tmp_path, rng):
    tensors, base, first = write_llama(tmp_path, rng)
    second = write_peft(tmp_path / "second", peft_parts(rng, tensors, "up_proj"))
    merge(base, [first, second], tmp_path / "merged", weights=[0.7, -2], keep_residual=True)
    unmerge(tmp_path / "merged", [first, second], tmp_path / "back", weights=[0.7, -2])
    assert bits(tmp_path / "back") == bits(base)


def adversarial(rng: np.random.Generator, dtype: Any) -> Any:
    """Numbers at which rounding is at its worst: denormals, zeros, powers of two and their neighbours, ties, huge."""
    tiny, top = (float(np.finfo(np.float32).tiny), 1e30) if dtype != np.float16 else (6e-5, 3e3)
    powers = 2.0 ** rng.integers(-14, 11, (8, 64))
    rows = [
        rng.standard_normal((8, 64)) * tiny,
        np.where(rng.random((8, 64)) < 0.5, 0.0, -0.0),
        powers,
        np.nextafter(powers.astype(dtype), np.asarray(0, dtype)).astype(np.float64),
        np.nextafter(powers.astype(dtype), np.asarray(4096, dtype)).astype(np.float64),
        rng.integers(-512, 513, (8, 64)) / 256,
        rng.standard_normal((8, 64)) * top,
        rng.standard_normal((8, 64)),
    ]
    return np.concatenate(rows).astype(dtype)


def exact_deltas(rng: np.random.Generator) -> dict[str, Any]:
    """A and B whose products are powers of two and halves of them: the sums are ties."""
    a, b = (2.0 ** rng.integers(-7, 3, shape) * rng.choice([-1, 1], shape) for shape in ((64, 1), (1, 64)))
    return {"A": a.astype(np.float32), "B": b.astype(np.float32)}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["random", "small", "large", "ties", "cancelling"])
@pytest.mark.parametrize("times", [1, 2], ids=["one adapter", "two adapters"])
def test_without_a_residual_the_report_bounds_what_is_off(tmp_path, rng, dtype, kind, times):
    weight = random(rng, (64, 64), DTYPES[dtype]) if kind != "ties" else adversarial(rng, DTYPES[dtype])
    entry = exact_deltas(rng) if kind == "ties" else factors(rng, (64, 64), "oi", 1)
    if kind in ("small", "large"):
        entry["B"] *= np.float32({"small": 0.01, "large": 100}[kind])
    if kind == "cancelling":
        weight = (-2 * entry["A"] @ entry["B"]).T.astype(DTYPES[dtype])
    base = write_checkpoint(tmp_path / "base", {"w": weight, "v": random(rng, (5, 3))})
    config = LoraConfig(rank=1, alpha=2, factorizations={"w": "oi"})
    folders = [write_own(tmp_path / f"adapter {i}", {"w": entry}, config) for i in range(times)]
    weights = [1.0, 0.3][:times]
    merge(base, folders, tmp_path / "merged", weights=weights)
    report = unmerge(tmp_path / "merged", folders, tmp_path / "back", weights=weights)
    found = read(tmp_path / "back")["w"].astype(np.float64)
    off = np.abs(found - weight.astype(np.float64))
    assert report.numbers == weight.size
    assert not report.exact
    assert np.count_nonzero(off) <= report.uncertain
    assert off.max() <= report.largest
    if kind in ("small", "random"):
        assert report.uncertain <= 3 * np.count_nonzero(off) + 0.05 * weight.size
        assert report.largest <= (32 if dtype == "fp32" else 8) * off.max()
    assert f"up to {report.uncertain:,} of 4,096 numbers" in str(report)


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2", "fp64"])
def test_the_report_of_other_dtypes(tmp_path, rng, dtype):
    weight = random(rng, (64, 64), DTYPES[dtype], 0.5)
    base = write_checkpoint(tmp_path / "base", {"w": weight})
    config = LoraConfig(rank=3, factorizations={"w": "oi"})
    adapter = write_own(tmp_path / "adapter", {"w": factors(rng, (64, 64), "oi", 3)}, config)
    merge(base, adapter, tmp_path / "merged")
    report = unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    off = np.abs(read(tmp_path / "back")["w"].astype(np.float64) - weight.astype(np.float64))
    assert np.count_nonzero(off) <= report.uncertain
    assert off.max() <= report.largest


@pytest.mark.parametrize("keep_residual", [True, False])
def test_other_adapters_or_weights_are_refused(tmp_path, rng, keep_residual):
    tensors, base, adapter = write_llama(tmp_path, rng)
    other = write_peft(tmp_path / "other", peft_parts(rng, tensors, "_proj"))
    alpha = shutil.copytree(adapter, tmp_path / "alpha")
    data = json.loads((alpha / "adapter_config.json").read_text()) | {"lora_alpha": 7}
    (alpha / "adapter_config.json").write_text(json.dumps(data))
    merge(base, adapter, tmp_path / "merged", weights=[0.5], keep_residual=keep_residual)
    message = r"merged were the adapters adapter with the weights \[0\.5\]; given are {} with \[{}\]"
    for folders, weight, name in ((other, 0.5, "other"), (alpha, 0.5, "alpha"), (adapter, 1.0, "adapter")):
        with pytest.raises(DataError, match=message.format(name, weight)):
            unmerge(tmp_path / "merged", folders, tmp_path / "back", weights=[weight])
    with pytest.raises(DataError, match=r"given are adapter, adapter with \[0\.5, 0\.5\]"):
        unmerge(tmp_path / "merged", [adapter, adapter], tmp_path / "back", weights=[0.5, 0.5])


def test_what_is_no_merge_is_refused(tmp_path, rng):
    _, adapter = merged_llama(tmp_path, rng)
    unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    with pytest.raises(DataError, match=r"nothing is merged here, its jlora_merge.json says"):
        unmerge(tmp_path / "back", adapter, tmp_path / "again")


def damage(name: str, files: list[Path]) -> None:
    contents = files[0].read_bytes()
    if name == "flipped":
        files[0].write_bytes(contents[:50] + bytes([contents[50] ^ 4]) + contents[51:])
    elif name == "another hash":
        files[0].write_bytes(contents[:-1] + (b"0" if contents[-1:] != b"0" else b"1"))
    elif name == "cut":
        files[0].write_bytes(contents[: len(contents) // 2])
    elif name == "cut to nothing":
        files[0].write_bytes(contents[:20])
    elif name == "missing":
        files[0].unlink()
    elif name == "swapped":
        files[0].write_bytes(files[1].read_bytes())


DAMAGES = {
    "flipped": r"the residual is damaged|does not lead back to the base|is cut short",
    "another hash": r"does not lead back to the base: the weight or the adapters are not those that were merged",
    "cut": r"the residual is cut short",
    "cut to nothing": r"the residual is cut short",
    "missing": r"cannot be read: No such file or directory",
    "swapped": r"does not lead back to the base|is cut short",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_residual_is_refused(tmp_path, rng, name):
    _, adapter = merged_llama(tmp_path, rng)
    files = residual_files(tmp_path / "merged")
    assert len(files) == 6
    damage(name, files)
    with pytest.raises(DataError, match=rf"^\S*{files[0].parent.name}/{files[0].name}: .*({DAMAGES[name]})"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_every_flipped_bit_of_a_residual_is_refused_or_without_effect(tmp_path, rng):
    base = write_checkpoint(tmp_path / "base", {"w": random(rng, (7, 5), DTYPES["bf16"])}, 1)
    config = LoraConfig(rank=2, factorizations={"w": "oi"})
    adapter = write_own(tmp_path / "adapter", {"w": factors(rng, (7, 5), "oi", 2)}, config)
    merge(base, adapter, tmp_path / "merged", keep_residual=True)
    (file,) = residual_files(tmp_path / "merged")
    contents, refused = file.read_bytes(), 0
    for place in range(len(contents)):
        file.write_bytes(contents[:place] + bytes([contents[place] ^ 1 << place % 8]) + contents[place + 1 :])
        try:
            unmerge(tmp_path / "merged", adapter, tmp_path / "back", force=True)
        except DataError:
            refused += 1
        else:
            assert bits(tmp_path / "back") == bits(base)
    assert refused >= len(contents) - 8


def test_a_merged_checkpoint_that_was_changed_is_refused(tmp_path, rng):
    _, adapter = merged_llama(tmp_path, rng)
    shard = sorted((tmp_path / "merged").glob("*.safetensors"))[0]
    tensors = read(shard)
    name = next(name for name in tensors if name.endswith("_proj.weight"))
    tensors[name].reshape(-1).view(np.uint8)[4] ^= 1
    write_file(shard, tensors, {"format": "pt", "made by": "a test"})
    with pytest.raises(DataError, match=rf"{name}: the residual does not lead back to the base"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "back")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("residual", [True, False])
def test_numbers_of_any_bits(tmp_path, rng, dtype, residual):
    size = np.dtype(DTYPES[dtype]).itemsize
    weight = rng.integers(0, 256, (128, 128 * size), np.uint8).view(DTYPES[dtype])
    weight[0, 0] = np.nan
    base = write_checkpoint(tmp_path / "base", {"w": weight}, 1)
    config = LoraConfig(rank=2, factorizations={"w": "oi"})
    adapter = write_own(tmp_path / "adapter", {"w": factors(rng, (128, 128), "oi", 2)}, config)
    merge(base, adapter, tmp_path / "merged", keep_residual=residual)
    report = unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    back = read(tmp_path / "back")["w"]
    if residual:
        assert back.tobytes() == weight.tobytes()
        return
    with np.errstate(invalid="ignore"):
        wide, found = (array.astype(np.float64) for array in (weight, back))
    finite = np.isfinite(wide)
    off = np.abs(found[finite] - wide[finite])
    assert np.count_nonzero(off) <= report.uncertain
    assert off.max() <= report.largest


def test_what_is_not_finite_stays(tmp_path, rng):
    weight = random(rng, (7, 5), DTYPES["bf16"])
    weight[0, :3] = np.inf, -np.inf, np.nan
    base = write_checkpoint(tmp_path / "base", {"w": weight}, 1)
    config = LoraConfig(rank=2, factorizations={"w": "oi"})
    adapter = write_own(tmp_path / "adapter", {"w": factors(rng, (7, 5), "oi", 2)}, config)
    merge(base, adapter, tmp_path / "merged", keep_residual=True)
    unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert bits(tmp_path / "back") == bits(base)
    merge(base, adapter, tmp_path / "merged", force=True)
    report = unmerge(tmp_path / "merged", adapter, tmp_path / "back", force=True)
    found = read(tmp_path / "back")["w"]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(weight))
    assert report.uncertain >= 3


def test_a_residual_that_is_a_pipe_is_not_waited_for(tmp_path, rng):
    _, base, adapter = write_llama(tmp_path, rng, layers=1)
    merge(base, adapter, tmp_path / "merged", keep_residual=True)
    file = next(path for path in (tmp_path / "merged" / "jlora_residual").rglob("*") if path.is_file())
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="cannot be read: no regular file"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "back")


def test_of_a_residual_with_a_sparse_tail_no_more_is_read_than_needed(tmp_path, rng, monkeypatch):
    _, base, adapter = write_llama(tmp_path, rng, layers=1)
    merge(base, adapter, tmp_path / "merged", keep_residual=True)
    file = next(path for path in (tmp_path / "merged" / "jlora_residual").rglob("*") if path.is_file())
    os.truncate(file, 1 << 40)
    counts, read = [], _residuals.ResidualReader._read

    def counted(reader: Any, count: int) -> bytes:
        counts.append(count)
        return read(reader, count)

    monkeypatch.setattr(_residuals.ResidualReader, "_read", counted)
    with pytest.raises(DataError, match="does not lead back to the base"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert sum(counts) < 16 << 20
