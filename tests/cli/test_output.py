"""What is printed where nobody listens, where nothing can be written, and where there is ASCII alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jlora import LoraConfig, cli
from jlora.interop.peft import write_peft

PROGRAM = "import sys; from jlora import cli; sys.exit(cli.main(sys.argv[1:]))"
CONFIG = LoraConfig(rank=3, alpha=6, factorizations={"**": "oi"})
CALLS = {  # with their exit codes
    "inspect adapter": 0,
    "inspect adapter adapter --json": 0,
    "inspect nowhere --json": 2,
    "diff adapter other": 1,
    "convert adapter --to own --out out": 0,
    "merge --help": 0,
    "merge --json": 2,
}
BUFFERED = {"buffered": {}, "unbuffered": {"PYTHONUNBUFFERED": "1"}}


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    for name in ("adapter", "other"):
        parts = {
            "A": rng.normal(size=(17, 3)).astype(np.float32),
            "B": rng.normal(size=(3, 13)).astype(np.float32),
        }
        write_peft(name, {"model.layers.0.mlp.up_proj.weight": parts}, CONFIG)
    return tmp_path


def run(call, environment, through=(), **streams):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [*through, sys.executable, "-c", PROGRAM, *call.split()],
        env=kept | environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        **streams,
    )


@pytest.mark.parametrize("buffered", BUFFERED)
@pytest.mark.parametrize("call", CALLS)
def test_a_pipe_that_is_closed(call, buffered, folder):
    """The exit code is that of the command, and no error is told that the command does not have."""
    read, write = os.pipe()
    os.close(read)
    done = run(call, BUFFERED[buffered], stdout=write)
    os.close(write)
    assert done.returncode == CALLS[call]
    assert "pipe" not in done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stderr) == (CALLS[call] == 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("buffered", BUFFERED)
@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_is_full(call, buffered, folder):
    with open("/dev/full", "w") as full:
        done = run(call, BUFFERED[buffered], stdout=full)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if CALLS[call] != 2 and (call, buffered) != ("merge --help", "unbuffered"):
        assert done.stderr == "jlora: standard output: cannot be written: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the descriptor")
@pytest.mark.parametrize("call", CALLS)
def test_no_standard_output_at_all(call, folder):
    done = run(call, {}, through=("sh", "-c", 'exec "$@" >&-', "sh"))
    assert done.returncode == CALLS[call]
    assert "Traceback" not in done.stderr


def test_a_terminal_of_ascii(folder):
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    Path("adapter").rename("ädapter")
    for call in ("inspect ädapter", "inspect ädapter other", "diff ädapter other", "inspect ö"):
        done = run(call, environment, stdout=subprocess.PIPE)
        assert done.returncode == (1 if call.startswith("diff") else 2 if call.endswith("ö") else 0), done.stderr
        assert (done.stdout + done.stderr).isascii()
    assert "----  ----" in run("inspect ädapter", environment, stdout=subprocess.PIPE).stdout
    assert "\\xe4dapter" in run("inspect ädapter other", environment, stdout=subprocess.PIPE).stdout
    written = run("convert other --to own --out ö", environment, stdout=subprocess.PIPE)
    assert (written.returncode, written.stdout) == (0, "written to \\xf6\n")
    said = json.loads(run("inspect ädapter other --json", environment, stdout=subprocess.PIPE).stdout)
    assert [each["adapters"] for each in said["inspected"]] == ["ädapter", "other"]


def test_the_stream_is_as_before(folder, capfd):
    before = sys.stdout.errors, sys.stderr.errors
    assert cli.main(["inspect", "adapter"]) == 0
    assert (sys.stdout.errors, sys.stderr.errors) == before
    assert "─" in capfd.readouterr().out
