"""What merging refuses, and what it says."""

import errno
import json
import os
import shutil
from typing import Any

import numpy as np
import pytest

from jlora import JloraWarning, LoraConfig
from jlora.checkpoints import _arithmetic, merge, unmerge
from jlora.checkpoints import _shards as shards
from jlora.disk import locked_folder
from jlora.errors import DataError
from tests.checkpoints.make import (
    DTYPES,
    bits,
    factors,
    llama,
    peft_parts,
    random,
    write_checkpoint,
    write_file,
    write_llama,
    write_own,
    write_peft,
)

OI = LoraConfig(rank=2, alpha=2, factorizations={"**": "oi"})


@pytest.fixture
def made(tmp_path, rng):
    """A base and an adapter."""
    return write_llama(tmp_path, rng)[1:]


def one_weight(tmp_path: Any, rng: Any, weight: Any, entry: Any = None, **others: Any) -> Any:
    """The checkpoint of a weight `w`, and an adapter of it."""
    base = write_checkpoint(tmp_path / "base", {"w": weight, **others}, 1)
    entry = factors(rng, weight.shape, "oi", 2) if entry is None else entry
    return base, write_own(tmp_path / "adapter", {"w": entry}, OI)


def test_an_output_that_is_there(tmp_path, made):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("words")
    with pytest.raises(DataError, match=r"out: is there already; give another folder, or --force \(force=True\)"):
        merge(*made, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "words"
    with pytest.raises(DataError, match=r"out: holds no checkpoint, but 'precious'; give another folder"):
        merge(*made, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "precious").read_text() == "words"
    (tmp_path / "out" / "model.safetensors").touch()
    merge(*made, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "precious").exists()


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
@pytest.mark.parametrize("foreign", [".git", "notes", "pipe", "link to a folder"])
def test_a_checkpoint_with_something_else_in_it_is_not_replaced(tmp_path, made, foreign, moment):
    out = tmp_path / "out"
    merge(*made, out, keep_residual=True)
    before = bits(out)

    def put(done: int = 0, total: int = 0) -> None:
        if foreign == "pipe":
            if not (out / foreign).exists():
                os.mkfifo(out / foreign)
        elif foreign == "link to a folder":
            if not (out / foreign).exists():
                (out / foreign).symlink_to(tmp_path)
        else:
            (out / foreign).mkdir(exist_ok=True)

    if moment == "before":
        put()
    with pytest.raises(DataError, match=rf"out: would be replaced with '{foreign}' in it, which is no part of"):
        merge(*made, out, weights=[2], force=True, on_progress=put if moment == "meanwhile" else None)
    assert (out / foreign).exists()
    os.rename(out / foreign, tmp_path / "elsewhere")
    assert bits(out) == before
    merge(*made, out, weights=[2], force=True)
    assert bits(out) != before


@pytest.mark.parametrize("name", ["jlora_merge.json", "jlora_residual"])
def test_a_shard_with_a_name_of_jloras_own(tmp_path, made, name):
    base, adapter = made
    index = base / "model.safetensors.index.json"
    first = sorted(base.glob("*.safetensors"))[0]
    index.write_text(index.read_text().replace(first.name, name))
    first.rename(base / name)
    with pytest.raises(
        DataError, match=rf"base/{name}: jlora writes a file of this name; rename the shard, and in the index"
    ):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_residual_can_have(tmp_path, rng):
    name = "ö" * 60
    base = write_checkpoint(tmp_path / "base", {name: random(rng, (7, 5))}, 1)
    adapter = write_own(tmp_path / "adapter", {name: factors(rng, (7, 5), "oi", 2)}, OI)
    with pytest.raises(DataError, match=r"^'ö+': too long a name for the file of a residual; merge without one$"):
        merge(base, adapter, tmp_path / "out", keep_residual=True)
    merge(base, adapter, tmp_path / "out")


def test_an_empty_folder_is_a_place_to_write_to(tmp_path, made):
    (tmp_path / "out").mkdir()
    merge(*made, tmp_path / "out")
    merge(*made, tmp_path / "new" / "folder" / "out")
    assert bits(tmp_path / "out") == bits(tmp_path / "new" / "folder" / "out")


@pytest.mark.parametrize("place", ["base", "adapter", "."])
def test_an_output_that_would_replace_what_is_read(tmp_path, made, place):
    before = bits(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / place)
    for out in (tmp_path / place, tmp_path / "link"):
        with pytest.raises(DataError, match=r"the output would replace \S*, which is read; give another folder"):
            merge(*made, out, force=True)
    (tmp_path / "link").unlink()
    assert bits(tmp_path) == before


def test_the_folder_of_the_file_that_is_read(tmp_path, rng):
    base, adapter = one_weight(tmp_path, rng, random(rng, (7, 5)))
    with pytest.raises(DataError, match=r"the output would replace \S*base, which is read"):
        merge(base / "model.safetensors", adapter, base, force=True)


def test_an_output_that_is_a_file(tmp_path, made):
    (tmp_path / "out").write_text("words")
    with pytest.raises(DataError, match=r"out: is a file; give a folder"):
        merge(*made, tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "words"


@pytest.mark.parametrize("residual", [False, True])
def test_a_disk_without_room(tmp_path, made, monkeypatch, residual):
    usage = shutil.disk_usage(tmp_path)
    size = sum(file.stat().st_size for file in made[0].iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + (64 << 20) - 2000 * (not residual)))
    with pytest.raises(DataError, match=r": 0\.00 GB are to be written, 0\.07 GB are free"):
        merge(*made, tmp_path / "out", keep_residual=residual)
    assert not (tmp_path / "out").exists()
    if residual:
        merge(*made, tmp_path / "out")


def test_no_adapters_and_too_few_weights(tmp_path, made):
    base, adapter = made
    with pytest.raises(DataError, match=r"^no adapters are given$"):
        merge(base, [], tmp_path / "out")
    with pytest.raises(DataError, match=r"^2 adapters and 1 weights: give one weight for each$"):
        merge(base, [adapter, adapter], tmp_path / "out", weights=[1])
    with pytest.raises(ValueError, match=r"^weights = nan: wanted a finite number"):
        merge(base, adapter, tmp_path / "out", weights=[float("nan")])


def test_names_that_the_checkpoint_lacks_are_told_with_the_nearest(tmp_path, rng, made):
    parts = peft_parts(rng, llama(rng), "q_proj", "up_proj")
    parts = {name.replace("q_proj", "query"): part for name, part in parts.items()}
    adapter = write_peft(tmp_path / "other", parts)
    message = (
        r"other: the adapters do not fit the checkpoint: 2 problems:\n"
        r"  model\.layers\.0\.self_attn\.query\.weight: the checkpoint has no such tensor; "
        r"nearest: model\.layers\.0\.self_attn\.[qo]_proj\.weight, .*\n"
        r"  model\.layers\.1\.self_attn\.query\.weight: "
    )
    with pytest.raises(DataError, match=message):
        merge(made[0], adapter, tmp_path / "out")


def test_all_problems_are_told_at_once_and_many_are_counted(tmp_path, rng):
    tensors = {"count": np.arange(35).reshape(7, 5), "w": random(rng, (7, 5))}
    base = write_checkpoint(tmp_path / "base", tensors)
    entries = {name: factors(rng, (7, 5), "oi", 2) for name in ("count", *(f"missing_{i:02}" for i in range(20)))}
    adapter = write_own(tmp_path / "adapter", entries, OI)
    with pytest.raises(DataError, match=r"(?s)21 problems:\n.*missing_00: .*missing_11: .*\n  and 9 more$"):
        merge(base, adapter, tmp_path / "out")


def test_shapes_that_do_not_fit(tmp_path, rng):
    base = write_checkpoint(tmp_path / "base", {name: random(rng, (7, 5)) for name in "vw"})
    wrong = {"v": factors(rng, (7, 3), "oi", 2), "w": {"offset": random(rng, (5, 7))}}
    adapter = write_own(tmp_path / "adapter", wrong, OI)
    message = (
        r"(?s)do not fit the checkpoint: 2 problems:.*v: A \(3, 2\) and B \(2, 7\) do not fit .*w: offset \(5, 7\)"
    )
    with pytest.raises(DataError, match=message):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_])
def test_numbers_that_are_no_floats(tmp_path, rng, dtype):
    made = one_weight(tmp_path, rng, np.ones((7, 5), dtype))
    with pytest.raises(DataError, match=r": w: dtype \w+ is not floating; dequantize the checkpoint first"):
        merge(*made, tmp_path / "out")


def test_a_value_or_a_magnitude_has_no_weight_and_goes_alone(tmp_path, rng):
    entry = factors(rng, (7, 5), "oi", 2) | {"magnitude": np.ones(7, np.float32)}
    base, adapter = one_weight(tmp_path, rng, random(rng, (7, 5)), entry)
    with pytest.raises(DataError, match=r": w: a whole value or a magnitude has no weight 0\.5"):
        merge(base, adapter, tmp_path / "out", weights=[0.5])
    with pytest.raises(
        DataError, match=r"^w: an update with a magnitude or a whole value goes alone; merge one by one"
    ):
        merge(base, [adapter, adapter], tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_two_entries_for_one_tensor(tmp_path, rng):
    base = write_checkpoint(tmp_path / "base", {"m.w": random(rng, (7, 5))}, 1)
    adapter = write_own(tmp_path / "adapter", {n: factors(rng, (7, 5), "oi", 2) for n in ("m/w", "m.w")}, OI)
    with pytest.raises(DataError, match=r": m\.w: both m[./]w and m[./]w change it"):
        merge(base, adapter, tmp_path / "out")


def test_two_prefixes_under_which_all_fit(tmp_path, rng):
    base = write_checkpoint(tmp_path / "base", {f"{part}.q.weight": random(rng, (7, 5)) for part in ("text", "image")})
    adapter = write_own(tmp_path / "adapter", {"q/weight": factors(rng, (7, 5), "oi", 2)}, OI)
    with pytest.raises(
        DataError,
        match=r"fit several parts of the checkpoint: q/weight may be any of text\.q\.weight, image\.q\.weight$",
    ):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(("experts", "shape"), [(2, (11, 13)), (4, (11, 13)), (3, (11, 7))])
def test_experts_that_do_not_fit(tmp_path, rng, experts, shape):
    tensors = {f"experts.{e}.down_proj.weight": random(rng, (11, 13)) for e in range(3)}
    base = write_checkpoint(tmp_path / "base", tensors)
    entry = factors(rng, (experts, *shape), "boi", 2)
    config = OI.replace(factorizations={"**": "boi"})
    adapter = write_own(tmp_path / "adapter", {"experts/down_proj": entry}, config)
    message = r"no such tensor" if experts != 3 else r"do not fit the weight \(3, 11, 13\)"
    with pytest.raises(DataError, match=message):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "e4m3", "e5m2"])
@pytest.mark.parametrize("block", [1 << 18, 10])
def test_sums_that_the_dtype_cannot_hold(tmp_path, rng, dtype, block, monkeypatch):
    monkeypatch.setattr(_arithmetic, "BLOCK", block)
    largest = {"fp16": 6e4, "bf16": 3.3e38, "fp32": 3.4e38, "e4m3": 440, "e5m2": 5e4}[dtype]
    weight = random(rng, (7, 5), DTYPES[dtype])
    weight[6, 4] = largest
    entry = {"A": np.ones((5, 2), np.float32), "B": np.full((2, 7), min(largest, 1e38) / 2, np.float32)}
    base, adapter = one_weight(tmp_path, rng, weight, entry)
    message = rf"^w: a sum is too large for {weight.dtype}; scale the adapter, or use a wider checkpoint$"
    for residual in (False, True):
        with pytest.raises(DataError, match=message):
            merge(base, adapter, tmp_path / "out", keep_residual=residual)
    merge(base, adapter, tmp_path / "out", weights=[1e-40])


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "e5m2"])
@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_a_sum_beside_what_is_not_finite_in_the_base(tmp_path, rng, dtype, odd):
    weight = random(rng, (7, 5), DTYPES[dtype])
    weight[6, 3] = odd
    base, adapter = one_weight(tmp_path, rng, weight)
    merge(base, adapter, tmp_path / "merged")
    weight[6, 4] = {"fp16": 6e4, "bf16": 3.3e38, "e5m2": 5e4}[dtype]
    entry = {"A": np.ones((5, 2), np.float32), "B": np.full((2, 7), min(float(weight[6, 4]), 1e38) / 2, np.float32)}
    base, adapter = one_weight(tmp_path / "large", rng, weight, entry)
    with pytest.raises(DataError, match=rf"^w: a sum is too large for {weight.dtype}"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("roles", ["oi", "io"])
def test_a_norm_that_is_infinite_makes_no_zeros(tmp_path, rng, roles):
    weight = random(rng, (7, 5))
    weight[3, 2] = np.inf
    entry = factors(rng, weight.shape, roles, 2) | {"magnitude": np.ones(7 if roles == "oi" else 5, np.float32)}
    config = OI.replace(factorizations={"**": roles})
    base = write_checkpoint(tmp_path / "base", {"w": weight})
    adapter = write_own(tmp_path / "adapter", {"w": entry}, config)
    with pytest.raises(DataError, match=r"^w: a sum is too large for float32"):
        merge(base, adapter, tmp_path / "out")


def test_what_is_taken_out_is_looked_at_too(tmp_path, rng):
    weight = np.zeros((7, 5), np.float16)
    entry = {"A": np.ones((5, 2), np.float32), "B": np.full((2, 7), 4e4, np.float32)}
    base, adapter = one_weight(tmp_path, rng, weight, entry)
    with pytest.raises(DataError, match=r"^w: a sum is too large for float16"):
        unmerge(base, adapter, tmp_path / "out", unrecorded=True)


class FullDisk:
    """Writes that fail after a number of calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
        self.left, self.pwrite = calls, os.pwrite
        monkeypatch.setattr(os, "pwrite", self)
        monkeypatch.setattr(shards, "_copy_range", self.copy)

    def __call__(self, handle: int, data: Any, start: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.pwrite(handle, data, start)

    def copy(self, source: int, target: int, start: int, at: int, count: int) -> int:
        return self(target, os.pread(source, min(count, 5000), start), at)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 5, 20, 33])
def test_a_disk_that_is_full_in_the_middle(tmp_path, made, monkeypatch, calls, residual):
    monkeypatch.setattr(_arithmetic, "BLOCK", 200)
    merge(*made, tmp_path / "wanted", keep_residual=residual)
    merge(*made, tmp_path / "out", weights=[2])
    before = bits(tmp_path / "out")
    with monkeypatch.context() as full:
        FullDisk(full, calls)
        with pytest.raises(DataError, match=r"/out: No space left on device") as refused:
            merge(*made, tmp_path / "out", force=True, keep_residual=residual)
    assert bits(tmp_path / "out") == before
    resumed = merge(*made, tmp_path / "out", force=True, keep_residual=residual).resumed
    assert str(refused.value).endswith("; the same command resumes") == bool(resumed)
    assert bits(tmp_path / "out") == bits(tmp_path / "wanted")
    assert not list(tmp_path.glob(".out*"))


def test_a_disk_that_is_full_while_a_base_is_restored(tmp_path, made, monkeypatch):
    merge(*made, tmp_path / "merged", keep_residual=True)
    with monkeypatch.context() as full:
        FullDisk(full, 5)
        with pytest.raises(DataError, match=r"/out: No space left on device; the same command resumes$"):
            unmerge(tmp_path / "merged", made[1], tmp_path / "out")
    unmerge(tmp_path / "merged", made[1], tmp_path / "out")
    assert bits(tmp_path / "out") == bits(made[0])


def test_a_checkpoint_that_is_cut_while_it_is_read(tmp_path, made, monkeypatch):
    monkeypatch.setattr(_arithmetic, "BLOCK", 100)
    shard = sorted(made[0].glob("*.safetensors"))[-1]
    size = shard.stat().st_size

    def cut(done: int, total: int) -> None:
        if done > total - size:
            os.truncate(shard, 1500)

    with pytest.raises(DataError, match=rf"{shard.name}: cut short at byte"):
        merge(*made, tmp_path / "out", on_progress=cut)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_of_which_a_file_is_missing(tmp_path, made, part):
    (made[1] / part).unlink()
    with pytest.raises(
        DataError, match=r"adapter/adapter_model\.safetensors: (found the format 'pt'|cannot be read: No such)"
    ):
        merge(*made, tmp_path / "out")


def test_a_checkpoint_that_is_none(tmp_path, made):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        merge(tmp_path / "nowhere", made[1], tmp_path / "out")
    with pytest.raises(DataError, match=r"adapter_model\.safetensors|no tensor|do not fit"):
        merge(made[1], made[1], tmp_path / "out")


@pytest.mark.parametrize(("tied", "head", "warned"), [(True, False, True), (True, True, False), (False, False, False)])
def test_an_embedding_that_is_the_output_head_too(tmp_path, rng, tied, head, warned):
    tensors = {"model.embed_tokens.weight": random(rng, (7, 5))} | (
        {"lm_head.weight": random(rng, (7, 5))} if head else {}
    )
    base = write_checkpoint(tmp_path / "base", tensors, 1, tie_word_embeddings=tied)
    entry = {"model/embed_tokens/weight": factors(rng, (7, 5), "io", 2)}
    config = LoraConfig(rank=2, factorizations={"**": "io"})
    merged = merge(base, write_own(tmp_path / "adapter", entry, config), tmp_path / "out")
    line = "model.embed_tokens.weight is several weights (tie_word_embeddings): the adapter acts on all of them"
    assert merged.warnings == ((line,) if warned else ())
    assert (f"warning: {line}" in str(merged)) == warned


def test_a_config_that_is_no_json_is_copied_as_it_is(tmp_path, made):
    (made[0] / "config.json").write_text("{")
    with pytest.warns(JloraWarning, match=r"config\.json: not valid JSON: .*; which weights are tied, .* is not known"):
        assert merge(*made, tmp_path / "out").warnings == ()
    assert (tmp_path / "out" / "config.json").read_text() == "{"


def test_a_record_that_is_damaged(tmp_path, made):
    merge(*made, tmp_path / "merged")
    record = tmp_path / "merged" / "jlora_merge.json"
    good = json.loads(record.read_text())
    odd: list[Any] = [{"command": 3}, good | {"earlier": 3}, good | {"earlier": [3]}, good | {"adapters": {}}, [good]]
    for text, message in (
        ("{", r"not valid JSON"),
        *((json.dumps(each), r"not what jlora writes|object") for each in odd),
    ):
        record.write_text(text)
        for run in (merge, unmerge):
            with pytest.raises(DataError, match=message):
                run(tmp_path / "merged", made[1], tmp_path / "out")


def test_shards_without_an_index_are_not_guessed_at(tmp_path, rng):
    (tmp_path / "base").mkdir()
    for name in "ab":
        write_file(tmp_path / "base" / f"{name}.safetensors", {name: random(rng, (7, 5))})
    with pytest.raises(DataError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        merge(tmp_path / "base", tmp_path / "base", tmp_path / "out")


def test_another_process_at_the_same_output(tmp_path, made):
    partial = tmp_path / ".out.0123456789abcdef.jlora"
    partial.mkdir()
    (partial / "jlora_workplace").write_text("out")
    with locked_folder(partial), pytest.raises(DataError, match="another process is writing here"):
        merge(*made, tmp_path / "out")
    merge(*made, tmp_path / "out")


def test_an_adapter_that_changes_while_it_is_merged(tmp_path, made):
    base, adapter = made

    def change(*_: Any) -> None:
        os.utime(next(adapter.glob("*.safetensors")), ns=(0, 0))

    with pytest.raises(DataError, match="was changed while it was read"):
        merge(base, adapter, tmp_path / "out", on_progress=change)
