"""The command: help, exit codes and messages, and runs that are interrupted or killed and go on."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jlora
from jlora.cli import main
from jlora.recipes import JobConfig, digits
from jlora.storage import read_metadata
from jlora.train import Batches

MINE = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

def model():
    module = nn.Sequential([nn.Dense(7), nn.relu, nn.Dense(3)])
    return module, module.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]

def data(train=40):
    x = np.random.default_rng(0).standard_normal((train + 20, 5)).astype(np.float32)
    examples = {"inputs": x, "labels": x[:, :3].argmax(-1).astype(np.int32)}
    return tuple({name: a[part] for name, a in examples.items()} for part in (slice(train), slice(train, None)))

def without_sklearn():
    raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
"""
JOB = """
[model]
function = "mine_of_test_train:model"
[data]
function = "mine_of_test_train:data"
[lora]
rank = 2
dropout = 0.25
[train]
steps = 12
batch_size = 8
accumulate = 2
log_every = 2
eval_every = 4
checkpoint_every = 4
[full]
enabled = false
"""
# `jlora` that sends itself a signal: after a row of metrics, in the middle of one, while it saves, after the last step,
# before the first, or twice.
SIGNALLED = """
import os, signal, sys, time
from jlora.cli import main
from jlora.recipes import _job
from jlora.train import Checkpoints, MetricsLog

moment, at, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
write, save, write_trained, load = MetricsLog.write, Checkpoints.save, _job.write_trained, _job._load

def strike():
    os.kill(os.getpid(), number)

def write_and_strike(log, row):
    if moment == "half a row" and row["step"] == at:
        with log.path.open("a") as file:
            file.write('{"step": ')
        strike()
    write(log, row)
    if moment in ("a row", "twice") and row["step"] == at:
        strike()
        if moment == "twice":
            strike()
    if moment == "a wait" and row["step"] == at:
        before = signal.getsignal(signal.SIGHUP)
        (log.path.parent / "waits").touch()
        while signal.getsignal(signal.SIGHUP) is before:
            time.sleep(0.01)

def save_and_strike(checkpoints, step, state):
    if moment == "saving" and step == at:
        os.rename = lambda *_: strike()
    save(checkpoints, step, state)

def write_trained_and_strike(*arguments):
    if moment == "after the last step":
        strike()
    return write_trained(*arguments)

def load_and_strike(*arguments):
    task = load(*arguments)
    if moment == "before the run":
        strike()
    return task

MetricsLog.write, Checkpoints.save = write_and_strike, save_and_strike
_job.write_trained, _job._load = write_trained_and_strike, load_and_strike
raise SystemExit(main(sys.argv[4:]))
"""
# A command in a terminal of its own, which is closed as soon as a file is there: the kernel sends SIGHUP, and what is
# written from then on fails.
CLOSED = """
import os, pty, sys
waits, *command = sys.argv[1:]
process, terminal = pty.fork()
if process == 0:
    os.execv(command[0], command)
while not os.path.exists(waits):
    os.read(terminal, 1 << 16)  # what is not read would block it
os.close(terminal)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""
SIGHUP, SIGINT, SIGKILL, SIGTERM = 1, 2, 9, 15


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The folder that the command is called in, with the user's module and job."""
    folder = tmp_path_factory.mktemp("called in")
    (folder / "mine_of_test_train.py").write_text(MINE)
    (folder / "job.toml").write_text(JOB)
    (folder / "folder.toml").mkdir()
    (folder / "broken.toml").write_text("[model\n")
    (folder / "broken.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        yield folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run that was not interrupted."""
    assert call("train", "job.toml", "output.folder=whole") == 0
    return folder / "whole"


def call(*arguments):
    """The exit code of the command."""
    try:
        return main(arguments)
    except SystemExit as exit:
        return exit.code


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(jlora.__file__).parents[1])}


def signalled(moment, at, number, *arguments, ignored=()):
    """The command in a process of its own, that gets a signal."""
    words = [sys.executable, "-c", SIGNALLED, moment, str(at), str(number), *arguments]
    if ignored:
        words = ["sh", "-c", f"trap '' {' '.join(map(str, ignored))}; exec \"$@\"", "sh", *words]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)


def assert_bitwise(run, whole):
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "adapters" / file).read_bytes() == (whole / "adapters" / file).read_bytes()


def way_out(stderr):
    """The arguments of the command that the message gives."""
    return shlex.split(re.search(r"go on with: jlora (.*)", stderr)[1])


def test_a_run_prints_its_tables_and_returns_zero(whole, capsys):
    assert call("train", "job.toml", "output.folder=printed", "train.steps=2") == 0
    out, err = capsys.readouterr()
    assert [text for text in ("layers_0/kernel", "frozen base", "LoRA", "written to printed") if text not in out] == []
    assert err == ""


@pytest.mark.parametrize(
    ("number", "code", "by"),
    [
        (SIGINT, 130, ""),
        pytest.param(SIGTERM, 143, " by SIGTERM", marks=pytest.mark.slow),
        pytest.param(SIGHUP, 129, " by SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_saves_says_how_to_go_on_and_ends_bitwise_the_same(whole, folder, number, code, by):
    out = f"a run {number}"
    arguments = ("train", "job.toml", f"output.folder={out}")
    stopped = signalled("a row", 6, number, *arguments)
    assert stopped.returncode == code
    again = f"jlora train job.toml 'output.folder={out}' --resume"
    assert stopped.stderr.strip() == f"jlora: interrupted{by} after step 6; go on with: {again}"
    assert (folder / out / "checkpoints" / "6").is_dir()
    assert call(*way_out(stopped.stderr)) == 0
    assert_bitwise(folder / out, whole)


@pytest.mark.slow
def test_an_interrupt_after_the_last_step_or_a_second_one_goes_on_as_well(whole, folder):
    arguments = ("train", "job.toml", "output.folder=late")
    twice = signalled("twice", 6, SIGTERM, *arguments)
    assert twice.returncode == 143
    assert "interrupted by SIGTERM after step 4; go on with" in twice.stderr  # what is saved: it stopped at once
    late = signalled("after the last step", 0, SIGTERM, *arguments, "--resume")
    assert late.returncode == 143
    assert "interrupted by SIGTERM after step 12; go on with" in late.stderr
    assert call(*way_out(late.stderr)) == 0
    assert_bitwise(folder / "late", whole)


@pytest.mark.slow
def test_an_extended_run_that_is_interrupted_goes_on(whole, folder, capsys):
    shutil.copytree(whole, folder / "extended")
    arguments = ("train", "job.toml", "output.folder=extended", "train.steps=16")
    stopped = signalled("a row", 14, SIGTERM, *arguments, "--extend")
    assert stopped.returncode == 143
    assert "extended: train.steps was 12, is 16" in stopped.stdout
    assert way_out(stopped.stderr) == [*arguments, "--resume"]
    assert call(*way_out(stopped.stderr)) == 0
    assert read_metadata(folder / "extended" / "adapters")["steps"] == 16


def test_an_interrupt_before_the_run_leaves_nothing(folder):
    stopped = signalled("before the run", 0, SIGTERM, "train", "job.toml", "output.folder=early")
    assert stopped.returncode == 143
    assert stopped.stderr.strip() == "jlora: interrupted before the run began; give the same command again"
    assert not (folder / "early").exists()


@pytest.mark.slow  # of the other commands it is seen in test_files.py
@pytest.mark.parametrize("number", [SIGINT, SIGHUP])
def test_what_is_ignored_stays_ignored(whole, folder, number):
    out = f"ignored {number}"
    ended = signalled("a row", 6, number, "train", "job.toml", f"output.folder={out}", ignored=(number,))
    assert ended.returncode == 0, ended.stderr
    assert_bitwise(folder / out, whole)


def test_a_terminal_that_is_closed_loses_nothing(whole, folder):
    arguments = ("train", "job.toml", "output.folder=closed")
    command = [sys.executable, "-c", SIGNALLED, "a wait", "6", "0", *arguments]
    words = [sys.executable, "-c", CLOSED, str(folder / "closed" / "waits"), *command]
    assert subprocess.run(words, env=environment(), timeout=120).returncode == 129
    assert (folder / "closed" / "checkpoints" / "6").is_dir()
    assert call(*arguments, "--resume") == 0
    assert_bitwise(folder / "closed", whole)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bitwise_the_same(whole, folder):
    arguments = ("train", "job.toml", "output.folder=killed")
    checkpoints = folder / "killed" / "checkpoints"
    for moment, at, left, *again in [
        ("a row", 2, set()),
        ("half a row", 6, {"4"}, "--resume"),
        ("saving", 8, {"4"}, "--resume"),
    ]:
        killed = signalled(moment, at, SIGKILL, *arguments, *again)
        assert killed.returncode == -SIGKILL, killed.stderr
        assert left <= {path.name for path in checkpoints.glob("*")}
    assert call(*arguments, "--resume") == 0
    assert_bitwise(folder / "killed", whole)


def test_an_interrupt_while_the_base_is_trained_names_no_way_that_fails(folder, monkeypatch, capsys):
    def interrupting(*arguments):
        batches = Batches(*arguments)
        return lambda step: os.kill(os.getpid(), SIGINT) or batches(step)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "Batches", interrupting)
        sizes = {"width": 4, "depth": 1, "heads": 1, "hidden": 2, "steps": 2, "cache": "cache"}
        options = ["model.function=jlora.recipes.digits:model", *(f"model.{key}={sizes[key]}" for key in sizes)]
        assert (
            call("train", "job.toml", "output.folder=base", "data.function=jlora.recipes.digits:data", *options) == 130
        )
    err = capsys.readouterr().err
    assert "interrupted" in err
    assert "go on with" not in err or call(*way_out(err)) == 0


@pytest.mark.parametrize("words", [["--resume", "job.toml"], ["job.toml", "--resume"]])
def test_options_and_overrides_stand_in_any_order(whole, words, capsys):
    assert call("train", *words, "output.folder=whole") == 0
    assert call("train", *words, "output.folder=whole", "train.seed=1") == 2
    assert "to resume, give the same configuration; changed: train.seed" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    assert call("--help") == 0
    out, _ = capsys.readouterr()
    assert re.search(r"train +adapt a model with LoRA", out)
    assert "--version" in out


def test_help_of_train_names_every_section_key_option_and_exit_code(capsys):
    assert call("train", "--help") == 0
    out, _ = capsys.readouterr()
    words = [
        "CONFIG",
        "SECTION.KEY=VALUE",
        "--resume",
        "--force",
        "0 done",
        "2 ",
        "130 interrupted",
        "143",
        "129",
        "module:function",
        "--extend",
    ]
    job = JobConfig.from_dict({name: {"function": "m:f"} for name in ("model", "data")})
    for field in dataclasses.fields(job):
        section = getattr(job, field.name)
        words += [f"[{field.name}]", *(key.name for key in dataclasses.fields(section) if key.name != "options")]
    assert [word for word in words if word not in out] == []
    assert max(map(len, out.splitlines())) <= 120


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"jlora {jlora.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train", "the following arguments are required: CONFIG\n"),
        ("train job.toml --reusme", "unrecognized arguments: --reusme"),
        ("train job.toml --resume --force", "--force: not allowed with argument --resume"),
        ("train job.toml --extend --force", "--extend goes on with the run that --force replaces: give one of them"),
        ("train job.toml output.folder=whole train.steps=20 --resume", "changed: train.steps; --extend goes on with"),
        ("train job.toml output.folder=whole train.steps=9 --extend", "wanted 12 or more, to extend the run of 12"),
        ("train none.toml", "jlora: none.toml: cannot be read: No such file or directory"),
        ("train folder.toml", "jlora: folder.toml: cannot be read: "),
        ("train mine_of_test_train.py", "wanted a file that ends in .toml or .json"),
        ("train broken.toml", "jlora: broken.toml: not valid TOML: "),
        ("train broken.json", "jlora: broken.json: not valid JSON: "),
        ("train job.toml rank=3", "override 'rank=3': wanted section.key=value, such as lora.rank=4"),
        ("train job.toml lora.rnk=3", "job.toml: [lora]: LoraConfig: unknown key 'rnk' (did you mean 'rank'?)"),
        ("train job.toml trian.steps=3", "unknown key 'trian' (did you mean 'train'?)"),
        ("train job.toml train.steps=many", "train.steps = 'many': wanted a whole number of at least 1"),
        ("train job.toml full.enabled=False", "full.enabled = 'False': wanted true or false"),
        ("train job.toml lora.target_modules=layer_0", "'layer_0' matches nothing; nearest paths: layers_0"),
        ("train job.toml data.function=nowhere:data", "no module 'nowhere' can be imported"),
        ("train job.toml data.function=mine_of_test_train:dat", "mine_of_test_train has no 'dat'"),
        ("train job.toml data.trian=3", "unknown key 'trian' (did you mean 'train'?)"),
        ("train job.toml data.train=0", "the training set is empty"),
        ("train job.toml data.train=7", "7 examples are fewer than a batch of 8"),
        ("train job.toml data.function=mine_of_test_train:without_sklearn", "sklearn is not installed: pip install"),
        ("train job.toml output.folder=job.toml", "job.toml: is a file; give output.folder another path"),
        ("train job.toml output.folder=job.toml/under", "give output.folder another path"),
        ("train job.toml output.folder=folder.toml/none --resume", "nothing to resume: it holds no run"),
        ("train job.toml output.folder=whole", "is not empty: --resume goes on with it, --force begins anew"),
        ("train job.toml output.folder=. --force", "is not empty: it holds no run of jlora"),
    ],
)
def test_a_wrong_call_gets_a_clear_error_on_stderr_and_exit_code_two(whole, folder, capsys, arguments, message):
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert call(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts and path not in before] == []
