"""A merge that is killed leaves what was there, and goes on where it stopped."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from jlora.checkpoints import _arithmetic, _rewrite, merge, unmerge
from jlora.errors import DataError
from jlora.interop.peft import Row
from tests.checkpoints.make import bits, llama, peft_parts, write_checkpoint, write_llama, write_peft
from tests.faults import calls_of

# Children are forked from a process that has imported everything and started nothing; each kills itself at a call.
CHILDREN = """
import os, sys
from tests.checkpoints.test_resume import small_merge
from tests.faults import failed

for line in sys.stdin:
    *call, calls = line.split()
    child = os.fork()
    if child == 0:
        failed("SIGKILL", int(calls), lambda: small_merge(*call))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def small_merge(base: str, adapter: str, out: str, weight: str) -> int:
    """A merge in small blocks, in place of what is there; returns the number of shards that it took over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_arithmetic, "BLOCK", 400)
        return merge(base, adapter, out, weights=[float(weight)], keep_residual=True, force=True).resumed


class Children:
    """Merges that are killed at a call that changes files."""

    def __enter__(self) -> "Children":
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILDREN],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def killed(self, *call: Any) -> bool:
        """Starts a merge and kills it; whether it was still at work."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, call)) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert status in (0, 9)
        return status == 9


def everything(folder: Path) -> dict[str, bytes]:
    """Every file of an output, its record and its residuals too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def place_of(out: Path) -> Path:
    """The workplace of an output."""
    (place,) = out.parent.glob(f".{out.name}.*.jlora")
    return place


def test_killed_at_counted_calls(tmp_path, rng):
    _, base, adapter = write_llama(tmp_path, rng)
    wanted = {}
    for weight in ("1.0", "2.0"):
        small_merge(str(base), str(adapter), str(tmp_path / "wanted"), weight)
        wanted[weight] = everything(tmp_path / "wanted")
    source, out = bits(base), tmp_path / "out"
    small_merge(str(base), str(adapter), str(out), "1.0")
    total = calls_of(lambda: small_merge(str(base), str(adapter), str(out), "1.0"))
    there, taken, kills, shards, reached = "1.0", 0, 0, set(), set()
    with Children() as children:
        for calls in (*range(0, total, total // 15), *range(total - 40, total)):
            new = "2.0" if there == "1.0" else "1.0"
            kills += children.killed(base, adapter, out, new, calls)  # one that goes on has fewer calls
            assert bits(base) == source
            found = everything(out)
            assert found in (wanted[there], wanted[new])
            shards.add(len(list(tmp_path.glob(".out.*.jlora/new/*.safetensors"))))
            reached.add(found == wanted[new])
            if calls % 3 == 0:
                taken += small_merge(str(base), str(adapter), str(out), new)
                found = everything(out)
                assert found == wanted[new]
            there = there if found == wanted[there] else new
    assert kills > 20
    assert taken > 0
    assert shards >= {1, 2}
    assert reached == {True, False}
    small_merge(str(base), str(adapter), str(out), "2.0")
    assert everything(out) == wanted["2.0"]
    assert {file.name for file in tmp_path.iterdir()} == {"base", "adapter", "wanted", "out"}


class StopError(Exception):
    """The end of a run."""


def stopped(*args: Any, share: float, run: Any = merge, **kwargs: Any) -> None:
    """A run that stops when a share of its bytes is done."""

    def stop(done: int, total: int) -> None:
        if done >= share * total:
            raise StopError

    with pytest.raises(StopError):
        run(*args, on_progress=stop, **kwargs)


@pytest.fixture
def made(tmp_path, rng):
    """A base of three shards, its adapter, and the folder "wanted" of their merge."""
    _, base, adapter = write_llama(tmp_path, rng)
    merge(base, adapter, tmp_path / "wanted")
    return base, adapter


@pytest.mark.parametrize(("share", "shards"), [(0.0, 0), (0.5, 1), (0.9, 2), (1.0, 2)])
@pytest.mark.parametrize("residual", [False, True])
def test_finished_shards_are_taken_over(tmp_path, made, share, shards, residual):
    stopped(*made, tmp_path / "out", share=share, keep_residual=residual)
    assert not (tmp_path / "out").exists()
    merged = merge(*made, tmp_path / "out", keep_residual=residual)
    assert merged.resumed == shards
    assert (f"{shards} shards of them by an earlier run" in str(merged)) == bool(shards)
    assert bits(tmp_path / "out").items() >= bits(tmp_path / "wanted").items()
    if residual:
        assert unmerge(tmp_path / "out", made[1], tmp_path / "back").exact
        assert bits(tmp_path / "back") == bits(made[0])


def test_finished_shards_are_not_written_again(tmp_path, made):
    stopped(*made, tmp_path / "out", share=0.9)
    first = sorted(made[0].glob("*.safetensors"))[0].name
    before = (place_of(tmp_path / "out") / "new" / first).stat()
    merge(*made, tmp_path / "out")
    after = (tmp_path / "out" / first).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_unmerge_goes_on_too(tmp_path, made):
    merge(*made, tmp_path / "merged", keep_residual=True)
    stopped(tmp_path / "merged", made[1], tmp_path / "back", share=0.9, run=unmerge)
    unmerge(tmp_path / "merged", made[1], tmp_path / "back")
    assert bits(tmp_path / "back") == bits(made[0])


def test_an_unmerge_that_goes_on_counts_all_that_is_uncertain(tmp_path, made):
    merge(*made, tmp_path / "merged")
    whole = unmerge(tmp_path / "merged", made[1], tmp_path / "whole")
    stopped(tmp_path / "merged", made[1], tmp_path / "back", share=0.9, run=unmerge)
    report = unmerge(tmp_path / "merged", made[1], tmp_path / "back")
    assert (report.uncertain, report.largest) == (whole.uncertain, whole.largest)


def damage(file: Path) -> None:
    """Turns one bit over; the size and the times stay."""
    times, contents = file.stat(), bytearray(file.read_bytes())
    contents[-3] ^= 4
    file.write_bytes(contents)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_residual_that_was_damaged_is_made_again(tmp_path, made):
    stopped(*made, tmp_path / "out", share=0.9, keep_residual=True)
    shards = sorted((place_of(tmp_path / "out") / "new" / "jlora_residual").iterdir())
    damage(next(file for file in sorted(shards[0].iterdir()) if file.stat().st_size > 64))
    assert merge(*made, tmp_path / "out", keep_residual=True).resumed == 1
    assert unmerge(tmp_path / "out", made[1], tmp_path / "back").exact


CHANGES = [
    *("source", "source of the same time", "adapter", "alpha", "weights", "residual", "boot", "journal", "shard"),
    *("half a shard", "no shard and no hash", "damaged shards", "a shard that is a link", "mapping"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_starts_anew(tmp_path, made, rng, change):
    base, adapter = made
    stopped(base, adapter, tmp_path / "out", share=0.9)
    partial = place_of(tmp_path / "out")
    options: dict[str, Any] = {}
    if change == "source":
        shutil.rmtree(base)
        write_checkpoint(base, llama(rng), 3)
    elif change == "source of the same time":
        write_checkpoint(tmp_path / "other", llama(rng), 3)
        for shard in base.glob("*.safetensors"):
            times = shard.stat()
            shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
            os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change in ("adapter", "alpha"):
        parts = peft_parts(rng, llama(rng), "_proj")
        own = (adapter / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(adapter)
        write_peft(adapter, parts, lora_alpha=7 if change == "alpha" else 6)
        if change == "alpha":
            (adapter / "adapter_model.safetensors").write_bytes(own)
    elif change == "weights":
        options["weights"] = [2.0]
    elif change == "residual":
        options["keep_residual"] = True
    elif change == "boot":
        journal = partial / "journal.json"
        journal.write_text(journal.read_text().replace('"machine": "', '"machine": "0'))
    elif change == "journal":
        (partial / "journal.json").write_text('{"job": ')
    elif change == "mapping":
        options["mapping"] = (Row("{name*}", "other.{name*}"),)
    elif change == "shard":
        for shard in partial.glob("new/*.safetensors"):
            shard.unlink()
    elif change == "half a shard":
        for shard in partial.glob("new/*.safetensors"):
            os.truncate(shard, 1000)
    elif change == "no shard and no hash":
        journal = json.loads((partial / "journal.json").read_text())
        for shard in journal["done"]:
            (partial / "new" / shard).unlink()
            journal["done"][shard][0] = ""
        (partial / "journal.json").write_text(json.dumps(journal))
    elif change == "damaged shards":
        for shard in partial.glob("new/*.safetensors"):
            damage(shard)
    elif change == "a shard that is a link":
        for shard in partial.glob("new/*.safetensors"):
            shard.rename(tmp_path / shard.name)
            shard.symlink_to(tmp_path / shard.name)
    assert merge(base, adapter, tmp_path / "out", **options).resumed == 0
    merge(base, adapter, tmp_path / "fresh", **options)
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def test_a_run_cut_off_between_the_two_renames(tmp_path, made):
    """Where the system has no exchange, a replacement is two renames."""
    merge(*made, tmp_path / "out", weights=[3])
    before = bits(tmp_path / "out")
    stopped(*made, tmp_path / "out", share=0.9, force=True)
    (tmp_path / "out").rename(place_of(tmp_path / "out") / "old")
    stopped(*made, tmp_path / "out", share=1.0, force=True)
    assert bits(tmp_path / "out") == before
    assert merge(*made, tmp_path / "out", force=True).resumed == 2
    assert bits(tmp_path / "out") == bits(tmp_path / "wanted")
    assert not list(tmp_path.glob(".out*"))


# What becomes of a run that stopped behind its second shard and goes on with one argument changed: an argument that is
# new belongs here, and into what a run is known by.
OTHERS: dict[str, dict[str, Any]] = {
    "merge": {
        "weights": [2.0],
        "mapping": (Row("{name*}", "x.{name*}"),),
        "transposed_experts": True,
        "tied": True,
        "resize_vocabulary": True,
        "keep_residual": True,
    },
    "unmerge": {
        "weights": [2.0],
        "mapping": (Row("{name*}", "x.{name*}"),),
        "transposed_experts": True,
        "tied": True,
    },
}
ALIKE = {"force": True, "on_progress": lambda done, total: None}
ALWAYS: dict[str, dict[str, Any]] = {"merge": {}, "unmerge": {"unrecorded": True}}


@pytest.mark.parametrize("command", ["merge", "unmerge"])
def test_every_argument_is_one_that_a_run_is_known_by(tmp_path, rng, command):
    run = {"merge": merge, "unmerge": unmerge}[command]
    base, other = (write_checkpoint(tmp_path / name, llama(rng), 3) for name in ("base", "other"))
    parts = (peft_parts(rng, llama(rng), "_proj") for _ in range(2))
    adapter, another = (write_peft(tmp_path / f"adapter {n}", part) for n, part in enumerate(parts))
    names = [name for name in inspect.signature(run).parameters if name not in ALWAYS[command]]
    assert set(names) == {names[0], "adapters", "out"} | set(OTHERS[command]) | set(ALIKE)
    for name in names:
        given: dict[str, Any] = {names[0]: base, "adapters": adapter, "out": tmp_path / f"out of {name}"}
        given |= ALWAYS[command]
        stopped(**given, share=0.9, run=run)
        change = OTHERS[command] | ALIKE | {names[0]: other, "adapters": another, "out": tmp_path / "another out"}
        changed = given | {name: change[name]}
        assert resumed_by(run, changed) == (2 if name in ALIKE else 0), name
        run(**changed | {"out": tmp_path / f"fresh {name}"})
        assert everything(changed["out"]) == everything(tmp_path / f"fresh {name}"), name


def resumed_by(run: Any, arguments: dict[str, Any]) -> int:
    """How many finished shards a run takes over."""
    with mock.patch.object(_rewrite, "Rewritten", wraps=_rewrite.Rewritten) as written:
        run(**arguments)
    return int(written.call_args.args[0])


@pytest.mark.parametrize("how", ["replaced", "written to", "removed"])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("run", [merge, unmerge])
def test_a_base_that_changes_while_it_is_read(tmp_path, made, rng, run, number, how):
    base, adapter = made
    write_checkpoint(tmp_path / "other", llama(rng), 3)
    shard = sorted(base.glob("*.safetensors"))[number]
    changes = []

    def change(done: int, total: int) -> None:
        if done >= 0.5 * total and not changes:
            changes.append(done)
            if how == "replaced":
                os.replace(tmp_path / "other" / shard.name, shard)
            elif how == "written to":
                damage(shard)
            else:
                shard.unlink()

    with pytest.raises(DataError, match=r"^\S*base/model-0000\d-of-00003.safetensors: (was changed|cannot be read)"):
        run(base, adapter, tmp_path / "out", on_progress=change, **{"unrecorded": True} if run is unmerge else {})
    assert changes
    assert not (tmp_path / "out").exists()


def test_an_option_that_says_no_is_another_run(tmp_path, made):
    """None is what the model says, False what the user does."""
    base, adapter = made
    stopped(base, adapter, tmp_path / "out", share=0.9, transposed_experts=False)
    assert merge(base, adapter, tmp_path / "out").resumed == 0
    stopped(base, adapter, tmp_path / "more", share=0.9)
    assert merge(base, adapter, tmp_path / "more", tied=False, keep_residual=False, mapping=[]).resumed > 0
    rows = [Row("{name*}", "x.{name*}")]
    stopped(base, adapter, tmp_path / "rows", share=0.9, mapping=rows)
    assert merge(base, adapter, tmp_path / "rows", mapping=tuple(rows)).resumed > 0
