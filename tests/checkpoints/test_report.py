"""`merge` and `unmerge` say what they did, and do not put in or take out twice what was merged."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jlora import LoraConfig
from jlora.checkpoints import merge, unmerge
from jlora.cli import main
from jlora.disk import Checkpoint
from jlora.errors import DataError
from tests.checkpoints.make import factors, random, read, write_checkpoint, write_own
from tests.checkpoints.test_resume import stopped

NAMES = ["a.weight", "b.weight", "c.weight"]
WHY = (
    "the updates are zero, as of a B or an alpha that is zero, or are lost to rounding: then keep the adapter beside "
    "the base, or merge it into the base in float32"
)


def base_and_adapter(tmp_path: Path, rng: Any, dtype: Any = np.float32, shards: int = 3, **config: Any) -> Any:
    base = write_checkpoint(tmp_path / "base", {name: random(rng, (7, 5), dtype, 1.0) for name in NAMES}, shards)
    entries = {name.replace(".", "/"): factors(rng, (7, 5), "oi", 2) for name in NAMES[:2]}
    given = LoraConfig(rank=2, factorizations={"**": "oi"}, **config)
    return base, entries, given


def differing(left: Path, right: Path, name: str) -> int:
    one, other = (Checkpoint(folder).read(name) for folder in (left, right))
    return int(np.count_nonzero(one != other))


def test_a_zero_update_changes_nothing(tmp_path, rng):
    base, entries, config = base_and_adapter(tmp_path, rng)
    for entry in entries.values():
        entry["B"] = np.zeros_like(entry["B"])
    done = merge(base, write_own(tmp_path / "adapter", entries, config), tmp_path / "out")
    assert (done.changed, done.numbers, done.same, done.copied) == ((), 0, ("a.weight", "b.weight"), 3)
    assert done.warnings == (f"nothing changed: {WHY}",)
    assert str(done).startswith("0 tensors changed (0 numbers) and 3 copied")
    assert [read(tmp_path / "out")[name].tobytes() == read(base)[name].tobytes() for name in NAMES] == [True] * 3


def test_an_alpha_that_is_zero(tmp_path, rng):
    base, entries, config = base_and_adapter(tmp_path, rng, alpha=0)
    done = merge(base, write_own(tmp_path / "adapter", entries, config), tmp_path / "out")
    assert (done.changed, done.numbers) == ((), 0)


def test_what_rounding_takes_is_counted(tmp_path, rng):
    """Some updates of a bfloat16 tensor are below its spacing, all of another."""
    base, entries, config = base_and_adapter(tmp_path, rng, ml_dtypes.bfloat16)
    entries["a/weight"]["B"] *= 1e-3
    entries["b/weight"]["B"] *= 1e-9
    done = merge(base, write_own(tmp_path / "adapter", entries, config), tmp_path / "out")
    count = differing(base, tmp_path / "out", "a.weight")
    assert 0 < count < 35
    assert (done.changed, done.numbers, done.same) == (("a.weight",), count, ("b.weight",))
    assert done.warnings[0] == f"1 of 2 tensors are as they were, b.weight: {WHY}"
    assert done.warnings[1].startswith(
        "rounding to bfloat16 loses more than half of the update of 1 of 2 tensors (a.weight; at most "
    )


@pytest.mark.parametrize("keep_residual", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_numbers_are_counted_in_every_dtype_and_block(tmp_path, rng, dtype, keep_residual, monkeypatch):
    monkeypatch.setattr("jlora.checkpoints._arithmetic.BLOCK", 11)
    base, entries, config = base_and_adapter(tmp_path, rng, dtype)
    entries["a/weight"]["B"][:, 3] = 0  # a row of the weight
    adapter = write_own(tmp_path / "adapter", entries, config)
    done = merge(base, adapter, tmp_path / "out", keep_residual=keep_residual)
    counts = {name: differing(base, tmp_path / "out", name) for name in NAMES}
    assert done.numbers == sum(counts.values()) > 30
    assert done.changed == tuple(name for name in NAMES if counts[name])
    back = unmerge(tmp_path / "out", adapter, tmp_path / "back")
    wanted = [name for name in NAMES if differing(tmp_path / "out", tmp_path / "back", name)]
    assert back.changed == tuple(wanted)
    assert set(back.same) == {"a.weight", "b.weight"} - set(wanted)


@pytest.mark.parametrize("run", ["merge", "unmerge"])
def test_a_run_that_goes_on_counts_what_the_first_one_did(tmp_path, rng, run):
    base, entries, config = base_and_adapter(tmp_path, rng)
    adapter = write_own(tmp_path / "adapter", entries, config)
    source = base
    if run == "unmerge":
        source = tmp_path / "merged"
        merge(base, adapter, source)
    call = {"merge": merge, "unmerge": unmerge}[run]
    stopped(source, adapter, tmp_path / "out", share=0.9, run=call)
    done = call(source, adapter, tmp_path / "out")
    assert done.changed == ("a.weight", "b.weight")
    if run == "merge":
        assert done.resumed == 2
        assert done.numbers == sum(differing(base, tmp_path / "out", name) for name in NAMES)


def test_what_is_merged_already_is_not_merged_again(tmp_path, rng, capsys):
    base, entries, config = base_and_adapter(tmp_path, rng)
    first = write_own(tmp_path / "first", entries, config)
    second = write_own(tmp_path / "second", {"c/weight": factors(rng, (7, 5), "oi", 2)}, config)
    merge(base, first, tmp_path / "one")
    merge(tmp_path / "one", second, tmp_path / "two")
    for folder in ("one", "two"):
        message = rf"{folder}: first is merged in it already, its jlora_merge.json says; start from the base, or remove"
        with pytest.raises(DataError, match=message):
            merge(tmp_path / folder, [first], tmp_path / "out", weights=[0.5])
    with pytest.raises(DataError, match="second is merged in it already"):
        merge(tmp_path / "two", [second], tmp_path / "out")
    (tmp_path / "one" / "jlora_merge.json").unlink()
    assert main(["merge", str(tmp_path / "one"), str(first), "--out", str(tmp_path / "out"), "--quiet"]) == 0


def test_merges_come_out_in_the_other_order(tmp_path, rng):
    base, entries, config = base_and_adapter(tmp_path, rng)
    first = write_own(tmp_path / "first", entries, config)
    second = write_own(tmp_path / "second", {"c/weight": factors(rng, (7, 5), "oi", 2)}, config)
    merge(base, first, tmp_path / "one")
    merge(tmp_path / "one", second, tmp_path / "two", weights=[0.5])
    with pytest.raises(DataError, match=r"merged were the adapters second with the weights \[0\.5\]; given are first"):
        unmerge(tmp_path / "two", first, tmp_path / "back")
    unmerge(tmp_path / "two", second, tmp_path / "back", weights=[0.5])
    unmerge(tmp_path / "back", first, tmp_path / "base again")
    for name, wanted in read(base).items():
        np.testing.assert_allclose(read(tmp_path / "base again")[name], wanted, rtol=0, atol=1e-6)
    with pytest.raises(DataError, match="nothing is merged here"):
        unmerge(tmp_path / "base again", first, tmp_path / "more")
    merge(tmp_path / "base again", first, tmp_path / "again")  # nothing says that it is in it


def test_a_base_is_not_unmerged(tmp_path, rng, capsys):
    base, entries, config = base_and_adapter(tmp_path, rng)
    adapter = write_own(tmp_path / "adapter", entries, config)
    command = ["unmerge", str(base), str(adapter), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "nothing says what was merged into it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    merge(base, adapter, tmp_path / "merged")
    (tmp_path / "merged" / "jlora_merge.json").unlink()  # as another program merges
    command[1] = str(tmp_path / "merged")
    assert main([*command, "--unrecorded"]) == 0
    for name, wanted in read(base).items():
        np.testing.assert_allclose(read(tmp_path / "out")[name], wanted, rtol=0, atol=1e-6)
