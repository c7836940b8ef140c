"""--dry-run: the report and the refusals of a command, and not a byte, a name or a time on the disk is another."""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jlora import LoraConfig, checkpoints, cli
from jlora.disk import file_written_whole, read_json, write_tensors, write_whole
from jlora.interop.peft import write_peft
from jlora.storage import save_adapters
from tests.checkpoints.make import factors, llama, write_checkpoint, write_own

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
CONFIG = LoraConfig(rank=3, alpha=6, factorizations={"**": "oi"})
COMMANDS = [
    "merge base adapter --out x",
    "merge base adapter other --weights 1 -0.5 --keep-residual --out a/b/x",
    "merge base adapter --out there --force",
    "unmerge merged adapter --out x",
    "unmerge kept adapter --out x",
    "extract base tuned --rank 2 --out a/x",
    "extract base tuned --rank 2 --format peft --out x",
    "resize adapter --rank 2 --out x",
    "resize adapter --rank 2 --format own --out other --force",
    "combine adapter other --method cat --out x",
    "combine adapter other --method cat --format mlx --out x",
    "convert adapter --to own --out a/x",
    "convert adapter --to mlx --out x",
]
REFUSED = [
    "merge base nowhere --out x",
    "merge base base --out x",
    "merge base adapter --out there",
    "merge base adapter --out base --force",
    "merge base adapter --out adapter --force",
    "merge base adapter --out more --force",
    "merge base adapter --out file",
    "merge base adapter --out file/x",
    "merge base adapter --out file/x/y",
    "merge base adapter --out x --weights 1 2",
    "merge base wrong --out x",
    "merge merged adapter --out x",
    "unmerge base adapter --out x",
    "unmerge merged other --out x",
    "unmerge lost adapter --out x",
    "unmerge merged adapter --out there",
    "extract base base --out x",
    "extract base tuned --out there",
    "extract base tuned --out file",
    "resize adapter --rank 2 --out there",
    "resize adapter --rank 2 --out file/x",
    "resize adapter --rank 2 --out odd --force",
    "combine adapter other --method melt --out x",
    "combine adapter other --weights 1 --method cat --out x",
    "combine adapter other --method cat --out other",
    "convert adapter --to gguf --out x",
    "convert adapter --to mlx --out file",
    "convert magnitude --to peft --out x",
    "convert base --to own --out x",
]


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    """Checkpoints and adapters, what stands in the way of writing, and what killed runs left."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        write_checkpoint(Path(name), {key: rng.normal(size=(13, 17)).astype(np.float32) for key in (UP, DOWN)}, 2)
    for name in ("adapter", "other"):
        write_peft(name, {UP: pair(rng), DOWN: pair(rng)}, CONFIG)
    write_peft("wrong", {"x.q.weight": pair(rng)}, CONFIG)
    save_adapters("magnitude", {UP: {"offset": np.ones(13, np.float32)}}, LoraConfig(rank=3))
    for out, *more in (("merged",), ("there",), ("more",), ("kept", "--keep-residual"), ("lost", "--keep-residual")):
        assert cli.main(["merge", "base", "adapter", "--out", out, "--quiet", *more]) == 0
    next(Path("lost/jlora_residual").rglob("*up_proj*")).unlink()
    Path("more/mine").mkdir()
    Path("more/mine/notes.txt").write_text("mine")
    Path("file").write_text("a file")
    Path("odd/adapter_config.json").mkdir(parents=True)
    Path(f".x.{0:016x}.jlora").mkdir()
    Path("other/.adapter_model.safetensors.jlora-new").write_bytes(b"half")
    return tmp_path


def pair(rng):
    return {"A": rng.normal(size=(17, 3)).astype(np.float32), "B": rng.normal(size=(3, 13)).astype(np.float32)}


def listing(folder):
    """Each name below a folder, with its mode, its time and the hash of what it holds."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = os.lstat(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ino, digest)
    return found


def run(capsys, command, *more):
    """The exit code, and what was printed."""
    try:
        code = cli.main([*command.split(), *more])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_on_the_disk_changes_and_the_report_is_that_of_the_command(command, folder, capsys):
    before = listing(folder)
    code, out, _ = run(capsys, command, "--dry-run", "--json")
    tried = json.loads(out)
    text = run(capsys, command, "--dry-run")[1]
    assert run(capsys, command, "--dry-run", "--quiet")[1] == ""
    assert listing(folder) == before
    assert code == 0
    assert list(tried)[:4] == ["command", "exit_code", "dry_run", "replaces"]
    assert (tried.pop("dry_run"), tried.pop("replaces")) == (True, "--force" in command)
    assert text.startswith("dry run, nothing was written; without --dry-run:\n")
    assert ("replaced, wholly or in part: " in text) == ("--force" in command)
    code, out, _ = run(capsys, command, "--json")
    assert code == 0
    done = json.loads(out)
    counted = [name for name in tried if tried[name] is None and done[name] is not None]
    assert counted == {"merge": ["numbers", "rounding"], "unmerge": ["uncertain", "largest"]}.get(
        command.split()[0], []
    )
    assert {name: value for name, value in tried.items() if name not in counted} == {
        name: value for name, value in done.items() if name not in counted
    }
    assert listing(folder) != before


@pytest.mark.parametrize("command", REFUSED)
def test_refusals_are_the_same(command, folder, capsys):
    before = listing(folder)
    dry = run(capsys, command, "--dry-run")
    assert listing(folder) == before
    assert dry[0] == 2
    assert dry[2]
    assert run(capsys, command) == dry


@pytest.mark.parametrize("command", ["merge base adapter --out x", "unmerge kept adapter --out x"])
def test_a_disk_that_is_too_small(command, folder, capsys, monkeypatch):
    full = shutil.disk_usage(folder)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    dry = run(capsys, command, "--dry-run")
    assert dry[0] == 2
    assert "GB are free" in dry[2]
    assert run(capsys, command) == dry


@pytest.mark.parametrize(
    "command",
    [
        "extract base tuned --rank 2 --out x",
        "resize adapter --rank 2 --out x",
        "resize adapter --rank 2 --format own --out x",
        "combine adapter other --method cat --format mlx --out a/b/x",
        "convert adapter --to own --out other --force",
    ],
)
def test_a_disk_without_room_for_adapters(command, folder, capsys, monkeypatch):
    """The command itself is told so by the system as it writes."""
    usage, before = shutil.disk_usage(folder), listing(folder)
    for free, code in ((100, 2), (1 << 20, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        dry = run(capsys, command, "--dry-run")
        assert (dry[0], "No space left on device" in dry[2]) == (code, code == 2)
    assert listing(folder) == before


def killed(out):
    """The workplace of a run that was killed."""
    place = Path(f".{out}.{7:016x}.jlora")
    place.mkdir()
    (place / "jlora_workplace").write_bytes(out.encode())
    return place


def test_what_another_process_writes(folder, capsys):
    for place, command in (
        (killed("x"), "merge base adapter --out x"),
        (Path("other"), "resize adapter --rank 2 --force"),
    ):
        command = command if "--out" in command else f"{command} --out {place}"
        handle = os.open(place, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        dry = run(capsys, command, "--dry-run")
        assert (dry[0], "another process is writing here" in dry[2]) == (2, True)
        assert run(capsys, command) == dry
        os.close(handle)
        assert run(capsys, command, "--dry-run")[0] == 0


def test_what_a_killed_run_left_stays(folder, capsys):
    """And an output that such a run was about to replace counts as being there."""
    place = killed("there")
    (place / "new").mkdir()
    Path("there").rename(place / "old")
    before = listing(folder)
    dry = run(capsys, "merge base adapter --out there", "--dry-run")
    assert listing(folder) == before
    assert "is there already" in dry[2]
    assert run(capsys, "merge base adapter --out there") == dry
    assert Path("there/jlora_merge.json").is_file()


@pytest.mark.parametrize("out", ["locked", "locked/x", "locked/x/y"])
@pytest.mark.parametrize("command", ["merge base adapter", "resize adapter --rank 2", "convert adapter --to mlx"])
def test_a_folder_that_may_not_be_written_to(command, out, folder, capsys):
    Path("locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("nothing is refused to root")
    is_replaced = command.startswith("merge") and out == "locked"  # an empty folder, of which only the name is needed
    for more in ("--dry-run", "--quiet"):
        code, _, err = run(capsys, f"{command} --out {out}", more)
        assert (code, "Permission denied" in err) == ((0, False) if is_replaced else (2, True))


def test_gguf(tmp_path, monkeypatch, rng, capsys):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    tensors = llama(rng, np.float32, layers=1, width=32)
    write_checkpoint(
        tmp_path / "base",
        tensors,
        1,
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        hidden_size=32,
    )
    write_own(tmp_path / "adapter", {UP: factors(rng, (43, 32), "oi", 3)}, CONFIG)
    Path("file").write_text("a file")
    before = listing(tmp_path)
    assert run(capsys, "convert adapter --to gguf --base base --out a/x.gguf", "--dry-run")[0] == 0
    refused = run(capsys, "convert adapter --to gguf --base base --out file/x.gguf", "--dry-run")
    assert listing(tmp_path) == before
    assert refused[0] == 2
    assert run(capsys, "convert adapter --to gguf --base base --out file/x.gguf") == refused
    assert run(capsys, "convert adapter --to gguf --base base --out a/x.gguf")[0] == 0
    assert Path("a/x.gguf").is_file()


def test_in_python(folder):
    before = listing(folder)
    with checkpoints.dry_run():
        merged = checkpoints.merge("base", "adapter", "x")
        with pytest.raises(AssertionError):
            write_whole("x.json", b"{}")
        with pytest.raises(AssertionError), file_written_whole("x") as file:
            write_tensors(file, {})
    assert listing(folder) == before
    assert (merged.changed, merged.numbers) == (tuple(checkpoints.merge("base", "adapter", "x").changed), None)
    assert read_json(Path("x/jlora_merge.json"))["command"] == "merge"


def test_help_tells_of_it_where_something_is_written(capsys):
    for command in ("merge", "unmerge", "extract", "resize", "combine", "convert"):
        text = run(capsys, command, "--help")[1]
        assert '"dry_run", true, and "replaces"' in " ".join(text.split())
    for command in ("inspect", "diff", "train"):
        assert "--dry-run" not in run(capsys, command, "--help")[1]


def test_a_sum_that_is_too_large_is_found_by_the_command_alone(folder, capsys):
    """As the help says."""
    large = {key: np.full((13, 17), 3e38, np.float32) for key in (UP, DOWN)}
    write_checkpoint(Path("large"), large, 1)
    write_peft("huge", {UP: {"A": np.full((17, 3), 1e19, np.float32), "B": np.full((3, 13), 1e19, np.float32)}}, CONFIG)
    assert run(capsys, "merge large huge --out x", "--dry-run")[0] == 0
    code, _, err = run(capsys, "merge large huge --out x")
    assert (code, UP in err) == (2, True)
    text = " ".join(run(capsys, "merge --help")[1].split())
    assert "Merging computes no sums then, so that one which is too large for its dtype is found only as" in text
