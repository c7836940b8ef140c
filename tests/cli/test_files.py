"""The commands on files: what they write and print, exit codes, and errors in one line with the way out."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jlora import LoraConfig, checkpoints, cli
from jlora.adapter import is_entry
from jlora.cli._progress import progress_line
from jlora.disk import Checkpoint, file_written_whole, write_tensors
from jlora.interop.peft import FLAT, is_peft_folder, write_peft
from jlora.paths import leaves_by_path, path_number
from jlora.storage import is_adapters_folder, load_adapters, save_adapters

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
CONFIG = LoraConfig(rank=3, alpha=6, factorizations={"**": "oi"})
COMMANDS = ("merge", "unmerge", "extract", "resize", "combine", "convert", "inspect", "diff", "verify")


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    """A folder to work in, with two checkpoints and two adapters."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        Path(name).mkdir()
        with file_written_whole(f"{name}/model.safetensors") as file:
            write_tensors(
                file, {key: rng.normal(size=(13, 17)).astype(np.float32) for key in (UP, DOWN)}, {"format": "pt"}
            )
        Path(name, "config.json").write_text("{}")
    for name in ("adapter", "other"):
        write_peft(name, {UP: pair(rng), DOWN: pair(rng)}, CONFIG)
    return tmp_path


def pair(rng):
    return {"A": rng.normal(size=(17, 3)).astype(np.float32), "B": rng.normal(size=(3, 13)).astype(np.float32)}


def run(capsys, *arguments):
    """The exit code, and what was printed."""
    code = cli.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def tensors(path):
    checkpoint = Checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def flat_entries(path):
    """The entries of a folder of adapters as NumPy arrays, by the names of the weights."""
    adapters = leaves_by_path(checkpoints.read_adapters(path)[0], is_leaf=is_entry)
    return {
        path.replace("/", "."): {part: np.asarray(array) for part, array in entry.items()}
        for path, entry in adapters.items()
    }


def delta(adapters, name, alpha=6.0):
    a, b = (np.asarray(adapters[name][part], np.float64) for part in "AB")
    return alpha / a.shape[-1] * (a @ b).T


def test_adapters_in_float64_stay_so(folder, rng):
    """As files hold them: JAX would narrow them."""
    entries = {name: {part: array.astype(np.float64) for part, array in pair(rng).items()} for name in (UP, DOWN)}
    save_adapters("wide", entries, CONFIG)
    for command in ("resize wide --rank 5", "combine wide wide --method cat", "convert wide --to own"):
        assert cli.main([*command.split(), "--out", command[:6]]) == 0
        found = flat_entries(command[:6])
        assert {part.dtype.name for entry in found.values() for part in entry.values()} == {"float64"}
        scale = 2 if command.startswith("combine") else 1
        alpha = checkpoints.read_adapters(command[:6])[1].alpha
        for name in entries:
            np.testing.assert_allclose(delta(found, name, alpha), scale * delta(entries, name), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_function_and_has_help(name, capsys):
    assert callable(getattr(checkpoints, name))
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert f"jlora.checkpoints.{name}" in capsys.readouterr().out


def test_merge_and_unmerge(folder, capsys):
    code, out, _ = run(
        capsys, "merge", "base", "adapter", "other", "--weights", 1, -0.5, "-o", "out", "--keep-residual"
    )
    assert (code, out) == (0, "2 tensors changed (442 numbers) and 0 copied, 0.00 GB: out\n")
    read = [checkpoints.read_adapters(name, FLAT)[0] for name in ("adapter", "other")]
    for name, found in tensors("out").items():
        wanted = tensors("base")[name] + delta(read[0], name) - 0.5 * delta(read[1], name)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    code, out, _ = run(capsys, "unmerge", "out", "adapter", "other", "--weights", 1, -0.5, "--out", "back")
    assert code == 0
    assert "every bit is the base's" in out
    assert Path("back/model.safetensors").read_bytes() == Path("base/model.safetensors").read_bytes()


def test_unmerge_without_a_residual_says_what_may_be_off(folder, capsys):
    run(capsys, "merge", "base", "adapter", "--out", "out")
    code, out, _ = run(capsys, "unmerge", "out", "adapter", "--out", "back")
    assert code == 0
    assert "of 442 numbers" in out
    assert "Keep the base, or merge with --keep-residual" in out


def test_extract_reports_and_writes(folder, capsys):
    code, out, _ = run(capsys, "extract", "base", "tuned", "--rank", 13, "--out", "found", "--format", "peft")
    assert code == 0
    assert "2 weights" in out
    assert is_peft_folder("found")
    run(capsys, "merge", "base", "found", "--out", "again")
    for name, found in tensors("again").items():
        np.testing.assert_allclose(found, tensors("tuned")[name], rtol=0, atol=1e-5)
    code, out, _ = run(
        capsys, "extract", "base", "tuned", "--energy", 0.5, "--target", "**/up_proj", "--out", "half", "--force"
    )
    assert code == 0
    assert "1 weight " in out
    assert f"{DOWN.replace('.', '/')}" in out.splitlines()[-2]


def test_resize_combine_convert(folder, capsys):
    assert run(capsys, "resize", "adapter", "--rank", 2, "--out", "small")[:2] == (
        0,
        "adapters of rank 2 written to small\n",
    )
    assert json.loads(Path("small/adapter_config.json").read_text())["r"] == 2
    code, out, _ = run(capsys, "combine", "adapter", "other", "--method", "cat", "--out", "both", "--format", "own")
    assert (code, out) == (0, "2 adapters combined by cat, written to both\n")
    assert load_adapters("both")[1].rank == 6
    assert run(capsys, "convert", "adapter", "--to", "own", "--out", "own")[0] == 0
    assert is_adapters_folder("own")
    assert run(capsys, "convert", "own", "--to", "peft", "--out", "peft")[0] == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("peft", name).read_bytes() == Path("adapter", name).read_bytes()
    code, out, _ = run(capsys, "diff", "adapter", "own")
    assert code == 0
    assert "2 identical" in out


def test_extract_leaves_out_what_is_excluded(folder, capsys):
    for options, wanted in ((["--exclude", "**/down_proj"], {UP}), (["--exclude", "**/up_proj", "--force"], {DOWN})):
        assert run(capsys, "extract", "base", "tuned", "--rank", 3, "--out", "found", *options)[0] == 0
        assert flat_entries("found").keys() == wanted
    code, _, err = run(
        capsys, "extract", "base", "tuned", "--out", "x", "--exclude", "**/up_proj", "--exclude", "**/down_proj"
    )
    assert code == 2
    assert "adapts nothing: what it matches is excluded" in err


def test_combine_prunes_at_random_by_its_seed(folder, capsys):
    parts = [flat_entries(name) for name in ("adapter", "other")]
    found = []
    for seed, options in ((0, []), (7, ["--seed", 7])):
        options = ["--method", "dare_linear", "--density", 0.5, "--format", "own", *options]
        assert run(capsys, "combine", "adapter", "other", "--out", f"seed {seed}", *options)[0] == 0
        combined = flat_entries(f"seed {seed}")
        for name in (UP, DOWN):
            streams = [np.random.default_rng([seed, path_number(name.replace(".", "/")), part]) for part in (0, 1)]
            for side in "AB":
                wanted = 0
                for part, stream in zip(parts, streams, strict=True):
                    array = part[name][side].astype(np.float64)
                    wanted = wanted + np.sqrt(2) * np.where(stream.random(array.shape) < 0.5, array / 0.5, 0)
                np.testing.assert_allclose(combined[name][side], wanted, rtol=1e-5, atol=1e-6)
        found.append(combined[UP]["A"])
    assert not np.array_equal(*found)


def test_combine_and_what_several_adapters_save_as_a_whole(folder, capsys):
    heads = [np.random.default_rng(seed).standard_normal((5, 3)).astype(np.float32) for seed in (1, 2)]
    for name, head in zip(("one", "two"), heads, strict=True):
        write_peft(name, {UP: pair(np.random.default_rng(3)), "lm_head.weight": {"value": head}}, CONFIG)
    options = ["--method", "cat", "--weights", 0.75, 0.25]
    code, _, err = run(capsys, "combine", "one", "two", "--out", "both", *options)
    assert code == 2
    assert "lm_head/weight: parts[0], parts[1] replace the weight by different values" in err
    assert "give values='first' or 'last'" in err
    wanted = {"first": heads[0], "last": heads[1], "mean": 0.75 * heads[0] + 0.25 * heads[1], "leave_out": None}
    for values, head in wanted.items():
        assert run(capsys, "combine", "one", "two", "--out", values, "--values", values, *options)[0] == 0
        found = flat_entries(values)
        assert found.keys() == ({UP} if head is None else {UP, "lm_head.weight"})
        if head is not None:
            np.testing.assert_allclose(found["lm_head.weight"]["value"], head, rtol=1e-6)


def test_combine_and_dora(folder, capsys):
    magnitudes = [np.random.default_rng(seed).random(13).astype(np.float32) for seed in (1, 2)]
    for name, magnitude in zip(("one", "two"), magnitudes, strict=True):
        write_peft(name, {UP: pair(np.random.default_rng(3)) | {"magnitude": magnitude}}, CONFIG)
    code, _, err = run(capsys, "combine", "one", "two", "--out", "both")
    assert code == 2
    assert "DoRA cannot be summed: found a magnitude in parts[0], parts[1], weights that sum to 2" in err
    assert run(capsys, "combine", "one", "two", "--out", "both", "--magnitudes", "mean")[0] == 0
    found = flat_entries("both")[UP]["magnitude"]
    np.testing.assert_allclose(found, (magnitudes[0] + magnitudes[1]) / 2, rtol=1e-6)


@pytest.mark.filterwarnings("always::jlora.JloraWarning")
def test_disjoint_adapters_are_combined_with_a_warning(folder, capsys):
    parts = {"up": {UP: pair(np.random.default_rng(1))}, "down": {DOWN: pair(np.random.default_rng(2))}}
    for name, entries in parts.items():
        write_peft(name, entries, CONFIG)
    code, out, err = run(capsys, "combine", "up", "down", "--weights", 2, -1, "--method", "cat", "--out", "both")
    assert (code, out) == (0, "2 adapters combined by cat, written to both\n")
    assert err.count("\n") == 1
    assert err.startswith("jlora: warning: up: no weight in common with the others: ")
    found = flat_entries("both")
    for name, entries, weight in ((UP, parts["up"], 2), (DOWN, parts["down"], -1)):
        scale = weight * CONFIG.scaling_of(name)
        np.testing.assert_allclose(
            found[name]["A"] @ found[name]["B"], scale * entries[name]["A"] @ entries[name]["B"], rtol=1e-4, atol=1e-6
        )


def test_combine_elects_the_sign_that_is_asked_for(folder, capsys):
    third = {UP: pair(np.random.default_rng(3)), DOWN: pair(np.random.default_rng(4))}
    write_peft("third", third, CONFIG)
    names = ("adapter", "other", "third")
    parts, deltas = [flat_entries(name) for name in names], {}
    for sign in ("total", "frequency"):
        options = ["--method", "ties", "--density", 1, "--format", "own"]
        options += ["--majority-sign", sign] if sign != "total" else []
        assert run(capsys, "combine", *names, "--out", sign, *options)[0] == 0
        found = flat_entries(sign)
        for side in "AB":
            arrays = np.stack([part[UP][side].astype(np.float64) for part in parts])
            votes = arrays.sum(0) if sign == "total" else np.sign(arrays).sum(0)
            agreed = np.sign(arrays) == np.where(votes >= 0, 1, -1)
            wanted = np.sqrt(2) * (arrays * agreed).sum(0) / agreed.sum(0)
            np.testing.assert_allclose(found[UP][side], wanted, rtol=1e-5, atol=1e-6)
        deltas[sign] = found[UP]["A"]
    assert not np.array_equal(deltas["total"], deltas["frequency"])


def test_a_mapping_from_a_file(folder, capsys):
    Path("table.toml").write_text(
        '[[row]]\nname = "model.layers.{i}.mlp.{n}.weight"\npath = "blocks/{i}/{n}/kernel"\ntranspose = [1, 0]\n'
    )
    assert run(capsys, "convert", "adapter", "--to", "own", "--mapping", "table.toml", "--out", "own")[0] == 0
    assert load_adapters("own")[0]["blocks"]["0"]["up_proj"]["kernel"]["A"].shape == (17, 3)
    assert run(capsys, "convert", "own", "--to", "peft", "--mapping", "table.toml", "--out", "peft")[0] == 0
    assert Path("peft/adapter_model.safetensors").read_bytes() == Path("adapter/adapter_model.safetensors").read_bytes()
    Path("bad.toml").write_text("[[row]]\nname = 'a'\n")
    code, _, err = run(capsys, "convert", "adapter", "--to", "own", "--mapping", "bad.toml", "--out", "x")
    assert code == 2
    assert "bad.toml: row 1: wanted name, path" in err


def test_params_of_gemma_and_qwix(folder, capsys, rng):
    for name, a, b in (("gemma", "lora.a", "lora.b"), ("qwix", "kernel_lora_a", "kernel_lora_b")):
        arrays = {"kernel": (5, 7), a: (5, 2), b: (2, 7)}
        with file_written_whole(f"{name}.safetensors") as file:
            write_tensors(file, {f"up.{k}": rng.normal(size=s).astype(np.float32) for k, s in arrays.items()})
        options = ["--alpha", 4] if name == "qwix" else []
        code = run(capsys, "convert", f"{name}.safetensors", "--names", name, "--to", "own", "--out", name, *options)[0]
        assert code == 0
        assert load_adapters(name)[0]["up"]["kernel"]["B"].shape == (2, 7)
    code, _, err = run(capsys, "convert", "qwix.safetensors", "--names", "qwix", "--to", "own", "--out", "x")
    assert (code, err) == (2, "jlora: qwix keeps alpha outside of the params: give alpha (--alpha)\n")


def test_no_command_opens_a_connection(folder, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for command in (
        "merge base adapter --out merged --keep-residual",
        "unmerge merged adapter --out back",
        "extract base tuned --rank 3 --out found",
        "resize adapter --rank 2 --out small",
        "combine adapter other --method cat --out both",
        "convert adapter --to own --out own",
        "inspect own --base base",
        "diff adapter own",
    ):
        assert run(capsys, *command.split())[0] == 0, command


def test_inspect_and_diff(folder, capsys):
    code, out, _ = run(capsys, "inspect", "adapter")
    assert code == 0
    assert UP.replace(".", "/") in out
    code, out, _ = run(capsys, "inspect", "adapter", "--base", "base")
    assert code == 0
    assert "%" in out
    zero = {UP: {"A": np.ones((17, 3), np.float32), "B": np.zeros((3, 13), np.float32)}}
    save_adapters("untrained", zero, CONFIG)
    assert "untrained" in run(capsys, "inspect", "untrained")[1]
    code, out, _ = run(capsys, "diff", "base", "tuned")
    assert code == 1
    assert "2 changed" in out


REFUSED = [  # arguments, what the one line says
    (("merge", "nowhere", "adapter", "--out", "x"), "nowhere: no such file or folder"),
    (("merge", "base", "nowhere", "--out", "x"), "nowhere"),
    (("merge", "base", "base", "--out", "x"), "this is a checkpoint of a model, not a folder of adapters"),
    (("merge", "base", "adapter", "--out", "tuned"), "is there already; give another folder, or --force"),
    (("merge", "base", "adapter", "--out", "base", "--force"), "the output would replace"),
    (("merge", "base", "adapter", "--out", "x", "--weights", "1", "2"), "1 adapters and 2 weights"),
    (("unmerge", "base", "other", "--out", "tuned", "--unrecorded"), "is there already"),
    (("extract", "base", "base", "--out", "x"), "none of the targeted weights changed"),
    (("extract", "base", "tuned", "--out", "x", "--target", "**/k_proj"), "'**/k_proj' matches nothing"),
    (("extract", "base", "tuned", "--out", "x", "--energy", "2"), "0 < energy <= 1"),
    (("resize", "adapter", "--rank", "0", "--out", "x"), "wanted a whole number of at least 1"),
    (("combine", "adapter", "other", "--weights", "1", "--out", "x"), "weights"),
    (("convert", "adapter", "--to", "own", "--out", "other"), "is there already"),
    (("inspect", "base"), "this is a checkpoint of a model, not a folder of adapters"),
    (("diff", "base", "adapter"), "this is a checkpoint of a model, not a folder of adapters"),
    (("diff", "base", "nowhere"), "nowhere: no such file or folder"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_cannot_be_done_is_one_clear_error(folder, capsys, arguments, message):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("jlora: ")
    assert message in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("arguments", [("merge", "base"), ("merge", "a", "b", "-o", "c", "--wat"), ("melt",), ()])
def test_a_call_that_is_wrong_exits_with_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: jlora" in capsys.readouterr().err


def test_ctrl_c_loses_nothing_and_the_same_command_goes_on(folder, rng):
    Path("large").mkdir()
    with file_written_whole("large/model.safetensors") as file:
        arrays = {f"model.layers.{i}.mlp.up_proj.weight": rng.normal(size=(2048, 4096)) for i in range(8)}
        write_tensors(file, {name: array.astype(np.float16) for name, array in arrays.items()})
    entry = {"A": rng.normal(size=(4096, 3)).astype(np.float32), "B": rng.normal(size=(3, 2048)).astype(np.float32)}
    write_peft("wide", dict.fromkeys(arrays, entry), CONFIG)
    command = [sys.executable, "-c", "import sys; from jlora.cli import main; sys.exit(main())"]
    command += ["merge", "large", "wide", "--out", "merged", "--keep-residual"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not list(Path().glob(".merged.*.jlora/new/jlora_residual")) and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.endswith("interrupted; the same command goes on where it can, or starts anew\n")
    assert not Path("merged").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert Checkpoint("merged").entries.keys() == arrays.keys()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGHUP, signal.SIGTERM))]
)
@pytest.mark.parametrize("ignored", [True, False])
def test_what_a_script_ignores_does_not_end_a_command(folder, number, ignored):
    strike = f"os.kill(os.getpid(), {int(number)}) or rename(*arguments)"
    program = "import os, sys; from jlora.cli import main; rename = os.rename;"
    program += f"os.rename = os.replace = lambda *arguments: {strike}; sys.exit(main())"
    words = [sys.executable, "-c", program, "merge", "base", "adapter", "--out", "merged"]
    script = f"trap '' {int(number)}; exec \"$@\"" if ignored else 'exec "$@"'
    done = subprocess.run(["sh", "-c", script, "sh", *words], capture_output=True, text=True)
    assert done.returncode == (0 if ignored else 128 + number), done.stderr
    assert Path("merged").exists() == ignored


def test_the_progress_line(monkeypatch):
    with progress_line("merge") as show:
        assert show is None  # no terminal
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_line("merge") as show:
        show(10**9, 2 * 10**9)
        show(2 * 10**9, 2 * 10**9)
    lines = terminal.getvalue().split("\r")
    assert "merge ━━━━━━━━━━━━              50% 1.00/2.00 GB" in lines[1]
    assert "100% 2.00/2.00 GB" in lines[2]
    assert lines[2].endswith("\n")
