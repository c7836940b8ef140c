"""What scripts ask of the commands: one object of JSON, silence, exit codes, many adapters in one call."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from jlora import LoraConfig, checkpoints, cli
from jlora.cli._done import plain_fields
from jlora.disk import file_written_whole, write_tensors
from jlora.interop.peft import write_peft

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
CONFIG = LoraConfig(rank=3, alpha=6, factorizations={"**": "oi"})
COMMANDS = {  # a command, its exit code, and the fields that it says beside "command" and "exit_code"
    "merge base adapter --out merged": (0, "out changed numbers same copied rounding size left_out resumed warnings"),
    "unmerge merged adapter --out back": (0, "out changed same left_out exact uncertain numbers largest"),
    "extract base tuned --rank 2 --out found": (0, "out error_left weights unchanged left_out whole why"),
    "resize adapter --rank 2 --out small": (0, "out config"),
    "combine adapter other --method cat --out both": (0, "out config"),
    "convert adapter --to own --out own": (0, "out config"),
    "inspect adapter": (0, "entries warnings total norm parameters"),
    "inspect adapter other": (0, "inspected"),
    "inspect adapter nowhere other": (2, "inspected"),
    "diff adapter adapter": (0, "is_identical counts entries config"),
    "diff adapter other": (1, "is_identical counts entries config"),
    "diff base base": (0, "is_identical counts rows"),
    "diff base tuned": (1, "is_identical counts rows"),
    "verify base adapter --files-only": (0, "checks kinds engines is_right manifest"),
    "verify base adapter": (0, "checks kinds engines is_right manifest"),
    "verify base other --files-only": (1, "checks kinds engines is_right manifest"),
    "verify base adapter --prompt x --files-only": (2, "error"),
    "verify base nowhere": (2, "error"),
    "merge base nowhere --out x": (2, "error"),
    "diff base adapter": (2, "error"),
    "inspect nowhere": (2, "error"),
    "train nowhere.toml": (2, "error"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    """Two checkpoints and two adapters, one of them untrained."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        Path(name).mkdir()
        weights = {key: rng.normal(size=(13, 17)).astype(np.float32) for key in (UP, DOWN)}
        with file_written_whole(f"{name}/model.safetensors") as file:
            write_tensors(file, weights, {"format": "pt"})
        Path(name, "config.json").write_text("{}")
    write_peft("adapter", {UP: pair(rng), DOWN: pair(rng)}, CONFIG)
    write_peft("other", {UP: pair(rng), DOWN: pair(rng) | {"B": np.zeros((3, 13), np.float32)}}, CONFIG)
    return tmp_path


def pair(rng):
    return {"A": rng.normal(size=(17, 3)).astype(np.float32), "B": rng.normal(size=(3, 13)).astype(np.float32)}


def run(capsys, command, *more):
    """The exit code, and what was printed."""
    if command.startswith("unmerge") and not Path("merged").exists():
        assert cli.main(["merge", "base", "adapter", "--out", "merged", "--quiet"]) == 0
    code = cli.main([*command.split(), *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_with_the_documented_fields(command, folder, capsys):
    wanted, fields = COMMANDS[command]
    code, out, err = run(capsys, command, "--json")
    assert code == wanted
    assert out.count("\n") == 1
    said = strict_json(out)
    assert list(said) == ["command", "exit_code", *fields.split()]
    assert said["command"] == command.split()[0]
    assert said["exit_code"] == code
    errors = [each["error"] for each in [said, *said.get("inspected", [])] if "error" in each]
    assert err == "".join(f"jlora: {error}\n" for error in errors)
    assert bool(errors) == (code == 2)


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_prints_errors_alone_and_the_exit_code_is_the_same(command, folder, capsys):
    code, out, err = run(capsys, command, "--quiet")
    assert code == COMMANDS[command][0]
    assert out == ""
    assert bool(err) == (code == 2)


@pytest.mark.parametrize(
    "words", [["merge", "base"], ["nothing"], [], ["diff", "a", "b", "c"], ["diff", "a", "b", "-x"]]
)
def test_a_call_that_cannot_be_read_is_an_object_too(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words, "--json"])
    captured = capsys.readouterr()
    said = strict_json(captured.out)
    assert list(said) == ["command", "exit_code", "error"]
    assert said["exit_code"] == 2
    assert said["command"] == ("merge" if words[:1] == ["merge"] else None)  # whose own options were read
    assert said["error"] in captured.err


def test_the_numbers_are_those_of_the_library(folder, capsys):
    found = checkpoints.inspect("adapter", base="base")
    said = strict_json(run(capsys, "inspect adapter --base base", "--json")[1])
    assert said["entries"] == plain_fields(found.entries)
    assert said["entries"][0]["a_shape"] == [17, 3]
    np.testing.assert_allclose(said["norm"], found.norm, rtol=1e-12)
    said = strict_json(run(capsys, "diff base tuned", "--json")[1])
    rows = checkpoints.diff("base", "tuned").rows
    assert [row["largest"] for row in said["rows"]] == [row.largest for row in rows]
    assert said["counts"]["changed"] == 2


def test_what_has_no_number_in_json_is_null(folder, capsys):
    Path("zero").mkdir()
    with file_written_whole("zero/model.safetensors") as file:
        write_tensors(file, {key: np.zeros((13, 17), np.float32) for key in (UP, DOWN)}, {"format": "pt"})
    code, out, _ = run(capsys, "inspect adapter --base zero", "--json")
    assert code == 0
    assert not np.isfinite(checkpoints.inspect("adapter", base="zero").entries[0].relative)
    assert strict_json(out)["entries"][0]["relative"] is None


def test_inspect_has_a_line_for_each_of_several_adapters(folder, capsys):
    code, out, err = run(capsys, "inspect adapter nowhere other base")
    assert code == 2
    missing, base = err.splitlines()
    assert missing.startswith("jlora: nowhere: no such folder")
    assert base.startswith("jlora: base: this is a checkpoint of a model")
    rows = [line for line in out.splitlines() if line.startswith(("adapter ", "nowhere ", "other ", "base "))]
    one, missing, other, base = rows[1:] if rows[0].split()[1] == "entries" else rows
    assert one.split()[:4] == ["adapter", "2", "3", "180"]
    assert "no such folder" in missing
    assert "untrained" in other
    assert "a checkpoint of a model" in base


def test_an_interrupted_command_says_so_in_the_object(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt(signal.SIGTERM)

    monkeypatch.setattr(checkpoints, "merge", interrupted)
    code, out, _ = run(capsys, "merge base adapter --out x", "--json")
    assert code == 143
    said = strict_json(out)
    assert said["exit_code"] == 143
    assert said["error"].startswith("interrupted")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by 0"), ModuleNotFoundError("by 0", name="mine"), MemoryError("by 0")]
)
def test_an_error_that_nobody_foresaw_is_no_difference(error, folder, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints, "diff", fail)
    code, out, err = run(capsys, "diff base tuned", "--json")
    assert code == 2
    assert strict_json(out)["error"] == f"stopped by {type(error).__name__}: by 0"
    assert "Traceback" in err
    assert "in fail" in err


HELPED = ["merge", "unmerge", "extract", "resize", "combine", "convert", "inspect", "diff", "verify"]


@pytest.mark.parametrize("command", HELPED)
def test_help_tells_exit_codes_and_fields(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert "Exit codes: 0 done; 1 diff found differences, or verify " in " ".join(text.split())
    assert '"exit_code"; "error"' in text
    assert "{fields}" not in text
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "Exit codes: 0 done; 1 diff found differences, or " in capsys.readouterr().out
