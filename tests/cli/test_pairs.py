"""What one command writes, another reads: all pairs, and a refusal that names what was given where they do not fit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jlora import load_adapters
from jlora.adapter import is_entry
from jlora.checkpoints import read_adapters
from jlora.cli import main
from jlora.disk import Checkpoint
from jlora.interop.peft import NESTED, is_peft_folder, read_peft
from jlora.paths import leaves_by_path
from jlora.tree import bind

MINE = """
import numpy as np
from jlora.disk import Checkpoint
from jlora.paths import nest

def model():
    checkpoint = Checkpoint("base")
    def fn(params, x):
        layer = params["model"]["layers"]["0"]["mlp"]
        return (x @ layer["up_proj"]["weight"].T) @ layer["down_proj"]["weight"].T
    return fn, nest({name.replace(".", "/"): checkpoint.read(name) for name in checkpoint.entries})

def data():
    x = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    return ({"inputs": x, "labels": np.arange(16) % 3},) * 2
"""
JOB = """
[model]
function = "mine_of_test_pairs:model"
[data]
function = "mine_of_test_pairs:data"
[lora]
rank = 2
[optimizer]
learning_rate = 0.1
[train]
steps = 3
batch_size = 8
"""
SHAPES = {"model.layers.0.mlp.up_proj.weight": (7, 5), "model.layers.0.mlp.down_proj.weight": (3, 7)}
# The folder that a command writes is named as its row here; each reads what stands above it.
ADAPTERS = {
    "run/adapters": "train job.toml output.folder=run",
    "own": "convert run/adapters --to own --out own",
    "peft": "convert run/adapters --to peft --out peft",
    "resized": "resize run/adapters --rank 2 --out resized",
    "resized_peft": "resize peft --rank 2 --out resized_peft",
    "combined": "combine run/adapters own --weights 0.75 0.25 --method cat --out combined",
    "combined_peft": "combine peft run/adapters --weights 0.5 0.5 --method cat --out combined_peft",
}
CHECKPOINTS = {
    "merged": "merge base run/adapters --out merged --keep-residual",
    "back": "unmerge merged run/adapters --out back",
}
EXTRACTED = {
    "extracted": "extract base merged --rank 2 --out extracted",
    "extracted_peft": "extract base merged --rank 2 --format peft --out extracted_peft",
}
ALL_ADAPTERS = (*ADAPTERS, *EXTRACTED)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The folder that the commands are called in, with all that they write."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "mine_of_test_pairs.py").write_text(MINE)
    (folder / "job.toml").write_text(JOB)
    rng = np.random.default_rng(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(folder), *sys.path])
        write_checkpoint({name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()})
        for command in (ADAPTERS | CHECKPOINTS | EXTRACTED).values():
            assert main(command.split()) == 0, command
        yield folder


def write_checkpoint(tensors):
    from jlora.disk import file_written_whole, write_tensors

    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    with file_written_whole("base/model.safetensors") as file:
        write_tensors(file, tensors, {"format": "pt"})


def tensors(path):
    checkpoint = Checkpoint(path)
    return {name: np.asarray(checkpoint.read(name), np.float64) for name in checkpoint.entries}


def deltas(path):
    """The updates of a folder of adapters, in float64, by the names of the checkpoint."""
    adapters, config, _ = read_adapters(path)
    entries = leaves_by_path(adapters, is_leaf=is_entry)
    found = {}
    for key, shape in SHAPES.items():
        name = key.replace(".", "/")
        a, b = (np.asarray(entries[name][part], np.float64) for part in "AB")
        entry = bind(
            {name: np.zeros(shape, np.float32)},
            {name: entries[name]},
            config.replace(
                target_modules=(name,),
                exclude_modules=(),
                rank_pattern={},
                alpha_pattern={},
                factorizations={name: "oi"},
                rank=config.rank_of(name),
                alpha=config.alpha_of(name),
            ),
        )[name]
        found[key] = entry.scaling * (a @ b).T
    return found


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def trained(folder):
    return deltas("run/adapters")


@pytest.mark.parametrize("written", ALL_ADAPTERS)
class TestAdapters:
    def test_they_are_those_that_were_trained(self, trained, written):
        assert max(np.abs(delta).max() for delta in trained.values()) > 0.05
        assert_close(deltas(written), trained)

    def test_inspect(self, written, capsys):
        for more in ([], ["--base", "base"], ["--base", "merged"]):
            assert main(["inspect", written, *more]) == 0
            assert "2 entries" in capsys.readouterr().out

    @pytest.mark.parametrize("form", ["own", "peft"])
    def test_convert_resize_and_combine(self, trained, tmp_path, written, form):
        outs = [str(tmp_path / name) for name in ("converted", "resized", "combined")]
        assert main(["convert", written, "--to", form, "--out", outs[0]]) == 0
        assert main(["resize", written, "--rank", "2", "--format", form, "--out", outs[1]]) == 0
        combine = ["combine", written, "run/adapters", "--weights", "0.5", "0.5", "--method", "cat"]
        assert main([*combine, "--format", form, "--out", outs[2]]) == 0
        for out in outs:
            assert is_peft_folder(out) == (form == "peft")
            assert_close(deltas(out), trained)

    def test_merge_and_unmerge(self, trained, tmp_path, written):
        merged, back = str(tmp_path / "merged"), str(tmp_path / "back")
        assert main(["merge", "base", written, "--keep-residual", "--out", merged]) == 0
        base = tensors("base")
        assert_close(tensors(merged), {name: base[name] + trained[name] for name in base})
        assert main(["unmerge", merged, written, "--out", back]) == 0
        assert (Path(back) / "model.safetensors").read_bytes() == Path("base/model.safetensors").read_bytes()

    def test_diff(self, written, capsys):
        rounded = written.startswith(("combined", "extracted"))
        assert main(["diff", written, "run/adapters"]) == (1 if rounded else 0)
        assert "2 entries" in capsys.readouterr().out
        assert main(["diff", written, "base"]) == 2
        assert "base: this is a checkpoint of a model, not a folder of adapters" in capsys.readouterr().err

    def test_as_a_library(self, written):
        if is_peft_folder(written):
            adapters, _ = read_peft(written, NESTED)
        else:
            params = {name.replace(".", "/"): np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
            adapters, _ = load_adapters(written, params=params)
        assert len(leaves_by_path(adapters, is_leaf=is_entry)) == 2

    @pytest.mark.parametrize(
        "command", ["merge {} run/adapters --out no", "unmerge {} run/adapters --out no", "extract base {} --out no"]
    )
    def test_where_a_checkpoint_is_wanted(self, written, command, capsys):
        assert main(command.format(written).split()) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert not Path("no").exists()


def test_training_says_its_results_as_one_object(capsys):
    capsys.readouterr()
    assert main(["train", "job.toml", "output.folder=again", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    results = json.loads(Path("again/results.json").read_text())
    assert said == {"command": "train", "exit_code": 0, "out": "again", "results": results}


@pytest.mark.parametrize("written", ["base", *CHECKPOINTS])
class TestCheckpoints:
    def test_merge_extract_diff_and_inspect(self, tmp_path, written, capsys):
        merged = main(["merge", written, "run/adapters", "--out", str(tmp_path / "merged")])
        if written == "merged":
            assert merged == 2
            assert "adapters is merged in it already" in capsys.readouterr().err
            return
        assert merged == 0
        assert (
            main(["extract", written, str(tmp_path / "merged"), "--rank", "2", "--out", str(tmp_path / "found")]) == 0
        )
        assert_close(deltas(tmp_path / "found"), deltas("run/adapters"))
        assert main(["diff", written, "base"]) == 0
        assert main(["inspect", "run/adapters", "--base", written]) == 0

    @pytest.mark.parametrize(
        "command",
        [
            "inspect {}",
            "convert {} --to own --out no",
            "merge base {} --out no",
            "unmerge merged {} --out no",
            "resize {} --rank 1 --out no",
            "combine run/adapters {} --out no",
        ],
    )
    def test_where_adapters_are_wanted(self, written, command, capsys):
        assert main(command.format(written).split()) == 2
        assert f"{written}: this is a checkpoint of a model, not a folder of adapters" in capsys.readouterr().err
        assert not Path("no").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("run", "run: holds no adapters itself, but adapters in it does"),
        ("run/checkpoints", "this is an Orbax checkpoint"),
        ("run/checkpoints/3", "this is an Orbax checkpoint"),
        ("job.toml", "is a file: wanted the folder that save_adapters wrote"),
    ],
)
def test_the_rest_of_a_run_is_no_adapters(given, message, capsys):
    for command in ("inspect {}", "merge base {} --out no", "convert {} --to peft --out no"):
        assert main(command.format(given).split()) == 2
        assert message in capsys.readouterr().err
