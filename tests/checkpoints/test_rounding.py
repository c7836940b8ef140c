"""What rounding leaves of a merged update, against the same sums in float64."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

from jlora import LoraConfig
from jlora.checkpoints import merge
from jlora.cli import main
from jlora.disk import Checkpoint
from tests.checkpoints.make import factors, random, write_checkpoint, write_own

CONFIG = LoraConfig(rank=2, alpha=3, factorizations={"**": "oi"})


def made(tmp_path, rng, dtype, size, parts=None, shape=(37, 29)):
    """A base, an adapter whose B is of this size, and both in float64."""
    base = write_checkpoint(tmp_path / "base", {"up.weight": random(rng, shape, dtype, 1.0)})
    entry = factors(rng, shape, "oi", 2)
    entry["B"] = (size * entry["B"]).astype(np.float32)
    entry |= parts or {}
    folder = write_own(tmp_path / "adapter", {"up/weight": entry}, CONFIG)
    return base, folder, entry


def reference(base, out, entry):
    """share, error and cosine, of all numbers."""
    before, after = (np.asarray(Checkpoint(folder).read("up.weight"), np.float64) for folder in (base, out))
    total = before + 1.5 * (entry["A"].astype(np.float64) @ entry["B"].astype(np.float64)).T
    if "magnitude" in entry:
        total *= (entry["magnitude"] / np.linalg.norm(total, axis=1))[:, None]
    wanted, kept = total - before, after - before
    share = np.count_nonzero(kept) / np.count_nonzero(wanted)
    norm = np.linalg.norm(wanted)
    return share, np.linalg.norm(kept - wanted) / norm, (kept * wanted).sum() / (norm * np.linalg.norm(kept))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (ml_dtypes.bfloat16, 1e-3),
        (ml_dtypes.bfloat16, 1e-2),
        (np.float16, 1e-3),
        (np.float32, 1e-6),
        (np.float32, 1.0),
        (np.float64, 1e-6),
    ],
)
def test_it_is_what_the_same_sums_in_float64_say(tmp_path, rng, dtype, size):
    base, adapter, entry = made(tmp_path, rng, dtype, size)
    whole, tensor = merge(base, adapter, tmp_path / "out").rounding
    share, error, cosine = reference(base, tmp_path / "out", entry)
    assert (whole.tensor, tensor.tensor) == ("", "up.weight")
    for found in (whole, tensor):
        assert found.share == pytest.approx(share, abs=1e-3)
        assert found.error == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert found.cosine == pytest.approx(cosine, abs=1e-5)


def test_under_a_magnitude_it_is_the_scaled_sum(tmp_path, rng):
    magnitude = rng.uniform(4, 7, 37).astype(np.float32)
    base, adapter, entry = made(tmp_path, rng, ml_dtypes.bfloat16, 0.1, {"magnitude": magnitude})
    whole, _ = merge(base, adapter, tmp_path / "out").rounding
    share, error, cosine = reference(base, tmp_path / "out", entry)
    assert (whole.share, whole.error, whole.cosine) == pytest.approx((share, error, cosine), rel=1e-3)


def test_a_large_tensor_is_sampled(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("jlora.checkpoints._arithmetic.BLOCK", 29)  # a row: rows 0, 16 and 32 are asked
    base, adapter, entry = made(tmp_path, rng, ml_dtypes.bfloat16, 1e-2)
    _, tensor = merge(base, adapter, tmp_path / "out").rounding
    before, after = (np.asarray(Checkpoint(f).read("up.weight"), np.float64) for f in (base, tmp_path / "out"))
    wanted = 1.5 * (entry["A"].astype(np.float64) @ entry["B"].astype(np.float64)).T
    rows = slice(0, None, 16)
    error = np.linalg.norm((after - before - wanted)[rows]) / np.linalg.norm(wanted[rows])
    assert tensor.error == pytest.approx(error, rel=1e-3)


def test_a_value_is_there_as_a_whole(tmp_path, rng):
    base = write_checkpoint(tmp_path / "base", {"up.weight": random(rng, (7, 5), ml_dtypes.bfloat16, 1.0)})
    value = {"up/weight": {"value": random(rng, (7, 5), np.float32, 1.0)}}
    done = merge(base, write_own(tmp_path / "adapter", value, LoraConfig(target_modules="up/weight")), tmp_path / "out")
    assert [(one.share, one.error, one.cosine) for one in done.rounding] == [(1, 0, 1)] * 2
    assert not [line for line in done.warnings if "rounding" in line]


def test_an_update_that_is_lost_is_told_with_the_way_out(tmp_path, rng, capsys, monkeypatch):
    made(tmp_path, rng, ml_dtypes.bfloat16, 5e-3)
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "base", "adapter", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"rounding leaves of the update a relative error of [\d.]+ and a cosine of 0\.\d{4}; \d+\.\d%", printed
    )
    assert (
        "warning: rounding to bfloat16 loses more than half of the update of 1 of 1 tensors (up.weight; at most "
        in printed
    )
    assert "keep the adapter beside the base, or merge it into the base in float32" in printed
    assert main(["merge", "base", "adapter", "--out", "again", "--json"]) == 0
    whole, tensor = json.loads(capsys.readouterr().out)["rounding"]
    assert tensor["tensor"] == "up.weight"
    assert whole["error"] == tensor["error"] > 0.5


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_hides_nothing_and_stops_no_merge(tmp_path, rng, odd):
    names = ("down.weight", "up.weight")  # of which the first one's shard is in the journal
    tensors = {name: random(rng, (37, 29), ml_dtypes.bfloat16, 1.0) for name in names}
    entries = {name.replace(".", "/"): factors(rng, (37, 29), "oi", 2) for name in names}
    for entry in entries.values():
        entry["B"] = (5e-3 * entry["B"]).astype(np.float32)
    adapter = write_own(tmp_path / "adapter", entries, CONFIG)
    sound = merge(write_checkpoint(tmp_path / "sound", tensors, 2), adapter, tmp_path / "all").rounding
    for tensor in tensors.values():
        tensor[3, 5] = odd
    done = merge(write_checkpoint(tmp_path / "base", tensors, 2), adapter, tmp_path / "out")
    for found, like in zip(done.rounding, sound, strict=True):
        assert (found.share, found.error, found.cosine) == pytest.approx(
            (like.share, like.error, like.cosine), abs=0.05
        )
        assert found.error > 0.5
    assert "more than half of the update of 2 of 2 tensors" in "".join(done.warnings)


@pytest.mark.parametrize(("dtype", "size", "error"), [(np.float32, 1e25, 0), (ml_dtypes.bfloat16, 1e-25, 1)])
def test_squares_beyond_the_range_of_float32_are_summed_in_float64(tmp_path, rng, dtype, size, error):
    base, adapter, _ = made(tmp_path, rng, dtype, size)
    for found in merge(base, adapter, tmp_path / "out").rounding:
        assert found.error == pytest.approx(error, abs=1e-6)
        assert found.cosine == pytest.approx(1 - error, abs=1e-6)


def test_an_update_of_zeros_loses_nothing(tmp_path, rng):
    base, adapter, _ = made(tmp_path, rng, ml_dtypes.bfloat16, 0.0)
    done = merge(base, adapter, tmp_path / "out")
    assert [(one.share, one.error, one.cosine) for one in done.rounding] == [(1, 0, 1)] * 2
    assert not [line for line in done.warnings if line.startswith("rounding")]


def test_a_run_that_goes_on_has_that_of_all_shards(tmp_path, rng):
    names = [f"{letter}.weight" for letter in "abc"]
    base = write_checkpoint(
        tmp_path / "base", {name: random(rng, (7, 5), ml_dtypes.bfloat16, 1.0) for name in names}, 3
    )
    entries = {name.replace(".", "/"): factors(rng, (7, 5), "oi", 2) for name in names}
    adapter = write_own(tmp_path / "adapter", entries, CONFIG)
    whole = merge(base, adapter, tmp_path / "whole")

    def stop(done, total):
        if done * 2 > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "parts", on_progress=stop)
    parts = merge(base, adapter, tmp_path / "parts")
    assert parts.resumed > 0
    assert parts.rounding == whole.rounding
