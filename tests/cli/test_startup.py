"""What the commands on files import: NumPy, and neither JAX nor what brings it."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jlora import LoraConfig, cli, save_adapters
from jlora.disk import file_written_whole, write_tensors
from jlora.interop.mlx import write_mlx
from jlora.interop.peft import write_peft
from jlora.paths import nest
from tests.cli.test_files import COMMANDS, DOWN, UP

HEAVY = ("chex", "flax", "jax", "jaxlib", "matplotlib", "optax", "orbax", "rich", "scipy", "sklearn", "tqdm")
PROGRAM = f"""
import sys
from jlora import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print([name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""
CONFIG = LoraConfig(rank=3, alpha=6, factorizations={"**": "oi"})


ALL = """
import sys
before = set(sys.modules)  # of the interpreter, and of what an environment starts it with
from jlora import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print(*sorted(set(sys.modules) - before))
sys.exit(code)
"""
NEVER_FOR_FILES = {"asyncio", "html.parser", "importlib.metadata", "importlib.resources", "multiprocessing", "secrets"}


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    """Checkpoints and adapters, of PEFT and of jlora, also with whole values, magnitudes and another library's LoRA."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        weights = {UP: array(rng, 13, 17).astype(ml_dtypes.bfloat16), DOWN: array(rng, 13, 17)}
        write_checkpoint(name, weights)
    write_checkpoint("gemma", {"q/w": array(rng, 5, 7), "q/lora/a": array(rng, 5, 2), "q/lora/b": array(rng, 2, 7)})
    write_checkpoint("qwix", {"q.w": array(rng, 5, 7), "q.w_lora_a": array(rng, 5, 2), "q.w_lora_b": array(rng, 2, 7)})
    for name in ("adapter", "other"):
        write_peft(name, {UP: pair(rng), DOWN: pair(rng)}, CONFIG)
        own = {f"model/layers/0/mlp/{part}_proj/weight": pair(rng) for part in ("up", "down")}
        save_adapters(f"own_{name}", nest(own), CONFIG)
    write_peft("dora", {UP: pair(rng) | {"magnitude": array(rng, 13)}, DOWN: {"value": array(rng, 13, 17)}}, CONFIG)
    write_mlx("mlx", {UP: pair(rng), DOWN: pair(rng)}, CONFIG)
    assert cli.main(["merge", "base", "adapter", "--out", "merged", "--keep-residual", "--quiet"]) == 0
    return tmp_path


def array(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def pair(rng):
    return {"A": array(rng, 17, 3), "B": array(rng, 3, 13)}


def write_checkpoint(name, weights):
    Path(name).mkdir()
    with file_written_whole(f"{name}/model.safetensors") as file:
        write_tensors(file, weights, {"format": "pt"})
    Path(name, "config.json").write_text("{}")


def run(*words):
    """The exit code, the last line that is printed, and the rest."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=120)
    *lines, last = done.stdout.splitlines()
    return done.returncode, last, "\n".join(lines) + done.stderr


CALLS = {  # with the exit code
    "merge base adapter --out out": 0,
    "merge base own_adapter other --weights 1 -0.5 --out out --keep-residual": 0,
    "merge base dora --out out": 0,
    "merge base nowhere --out out": 2,
    "unmerge merged adapter --out out": 0,
    "extract base tuned --rank 2 --out out": 0,
    "extract base tuned --energy 0.9 --format peft --out out": 0,
    "resize adapter --rank 2 --out out": 0,
    "resize own_adapter --rank 5 --out out": 0,
    "combine adapter other --out out": 0,
    "combine own_adapter own_other --method ties_svd --density 0.5 --rank 2 --out out": 0,
    "combine adapter own_other --method cat --out out": 0,
    "convert adapter --to own --out out": 0,
    "convert own_adapter --to peft --out out": 0,
    "convert adapter --to mlx --out out": 0,
    "convert mlx --to own --out out": 0,
    "merge base mlx --out out": 0,
    "convert gemma --names gemma --to own --out out": 0,
    "convert qwix --names qwix --alpha 4 --to own --out out": 0,
    "inspect adapter own_other dora": 0,
    "inspect own_adapter --base base": 0,
    "inspect adapter --base base": 0,
    "diff adapter other": 1,
    "diff own_adapter own_adapter": 0,
    "diff base tuned": 1,
    "verify base adapter --files-only": 0,
    "verify base dora --files-only --engine vllm": 1,
    "verify base own_adapter --files-only": 0,
}


@pytest.mark.parametrize("call", CALLS)
def test_commands_on_files_do_not_import_jax(call, folder):
    code, imported, said = run(*call.split(), *(["--json"] if CALLS[call] != 2 else []))
    assert code == CALLS[call], said
    assert imported == "[]"
    if CALLS[call] != 2:
        assert json.loads(said)["command"] == call.split()[0]


def test_import_gguf_does_not_import_jax(tmp_path, rng):
    ggufs = pytest.importorskip("tests.ggufs")
    file = ggufs.write_llama(tmp_path / "x.gguf", rng)
    code, imported, said = run("import-gguf", str(file), str(tmp_path / "out"), "--json")
    assert (code, json.loads(said)["tensors"]) == (0, 20)
    assert imported == "[]"


HELP = [
    "--help",
    "--version",
    "train --help",
    "generate --help",
    "eval --help",
    "import-gguf --help",
    *(f"{name} --help" for name in COMMANDS),
]


@pytest.mark.parametrize("words", HELP)
def test_help_does_not_import_jax(words):
    code, imported, said = run(*words.split())
    assert (code, imported) == (0, "[]")
    assert "jlora" in said


def test_every_command_on_files_is_called():
    assert {call.split()[0] for call in CALLS} == set(COMMANDS)


def imported(*words):
    done = subprocess.run([sys.executable, "-c", ALL, *words], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].split())


def foreign(modules):
    """The packages among them that are neither Python's nor jlora's."""
    tops = {name.partition(".")[0] for name in modules}
    return {name for name in tops - sys.stdlib_module_names - {"jlora"} if not name.startswith("_")}


@pytest.mark.parametrize("words", ["--help", "--version", "merge --help"])
def test_help_reads_no_more_than_the_arguments_take(words):
    modules = imported(*words.split())
    assert foreign(modules) == set()
    ours = {".".join(name.split(".")[:2]) for name in modules if name.partition(".")[0] == "jlora"}
    assert ours == {"jlora", "jlora.cli", "jlora.compose", "jlora.errors", "jlora.faces", "jlora.tables"}
    assert {name for name in modules if name.startswith("jlora.compose.")} == {"jlora.compose._rules"}


def test_a_merge_takes_numpy_and_three_small_packages(folder):
    modules = imported("merge", "base", "adapter", "--out", "out", "--quiet")
    assert foreign(modules) - {"org"} == {"ml_dtypes", "numpy", "threadpoolctl", "tomli_w"}
    assert modules & NEVER_FOR_FILES == set()
    rooms = {name.split(".")[1] for name in modules if name.startswith("jlora.")}
    assert rooms & {"diagnostics", "linen", "models", "nnx", "recipes", "text", "train", "transform"} == set()
