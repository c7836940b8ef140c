"""Every command on files whose names are made for a terminal: it prints text alone, and errors of bounded length."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from jlora import LoraConfig
from jlora.cli import main
from jlora.disk import dump_json, file_written_whole, write_tensors
from jlora.interop.peft import write_peft
from jlora.storage import save_adapters

ESCAPE = "\x1b[2J\x1b]0;title\x07\r\u202e\x9b31m"
NAMES = [f"{ESCAPE}{i}{'x' * 700}.weight" for i in range(70)]
LINES = [f"{ESCAPE}{i}\njlora: all is well{'x' * 3000}.weight" for i in range(70)]
CONFIG = LoraConfig(rank=2, factorizations={"**": "oi"})


def write(path, tensors):
    Path(path).mkdir()
    Path(path, "config.json").write_bytes(dump_json({"tie_word_embeddings": True, ESCAPE: ESCAPE}))
    with file_written_whole(f"{path}/model.safetensors") as file:
        write_tensors(file, tensors, {"format": "pt", ESCAPE: ESCAPE})


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Two checkpoints, three adapters in both formats, and files that are wrong, all with such names."""
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("hostile"))
        embedding = f"embed_tokens.{NAMES[0]}"
        for path in ("base", "tuned"):
            names = [embedding, *NAMES, f"{ESCAPE}.bias"]
            write(path, {name: rng.standard_normal((7, 5) if "weight" in name else 7, np.float32) for name in names})
        pairs = {
            name: {"A": rng.standard_normal((5, 2), np.float32), "B": rng.standard_normal((2, 7), np.float32)}
            for name in (embedding, *NAMES)
        }
        write_peft("adapter", pairs, CONFIG)
        save_adapters("own", {name.replace(".", "/"): pair for name, pair in pairs.items()}, CONFIG)
        zero = {"A": np.ones((5, 2), np.float32), "B": np.zeros((2, 3), np.float32)}
        save_adapters("narrow", dict.fromkeys(LINES, zero), CONFIG)
        write("index", {name: np.ones(3, np.float32) for name in LINES})
        weight_map = {name: f"{ESCAPE}{i}\njlora: all is well.safetensors" for i, name in enumerate(LINES)}
        Path("index/model.safetensors.index.json").write_bytes(dump_json({"weight_map": weight_map}))
        Path("index/model.safetensors").unlink()
        Path("rows.json").write_bytes(dump_json({"row": [{"name": f"{n}.{{x}}", "path": n} for n in LINES]}))
        other = [{"name": f"other{n}", "path": f"{n}"} for n in LINES[:50]]
        Path("other.json").write_bytes(dump_json({"row": [*other, *other]}))
        Path("job.json").write_bytes(dump_json({ESCAPE: {ESCAPE: 1}, "lora": dict.fromkeys(LINES, 1)}))
        lora = {"target_modules": LINES, "rank_pattern": dict.fromkeys(LINES, ESCAPE)}
        Path("job2.json").write_bytes(dump_json({"model": {"function": ESCAPE}, "lora": lora}))
        yield


COMMANDS = {
    "merge base adapter --out merged": 0,
    "unmerge merged adapter --out back": 0,
    "extract base tuned --rank 2 --out found": 0,
    "resize adapter --rank 1 --out small": 0,
    "combine adapter own --method cat --out both": None,
    "convert adapter --to own --out converted": 0,
    "inspect adapter --base base": 0,
    "inspect own": 0,
    "inspect narrow": 0,
    "diff adapter converted": 0,
    "diff base tuned": 1,
    "verify base adapter --files-only": None,
    "verify base own --files-only": None,
    "verify base narrow --files-only": None,
    "unmerge merged own --out x": 2,
    "merge base narrow --out x": 2,
    "merge index adapter --out x": 2,
    "inspect adapter --base index": 2,
    "extract base index --out x": 2,
    "extract base tuned --target nothing --out x": 2,
    "convert adapter --to own --mapping rows.json --out x": 2,
    "convert adapter --to own --mapping other.json --out x": 2,
    "convert own --to peft --mapping other.json --out x": 2,
    "convert base --names gemma --to own --out x": 2,
    "inspect base": 2,
    "train job.json": 2,
    "train job2.json": 2,
}


MADE_BY = {"merged": "merge base adapter --out merged", "converted": "convert adapter --to own --out converted"}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_is_text(command, capsys):
    for name, making in MADE_BY.items():
        if name in command and command != making and not Path(name).exists():
            assert main(making.split()) == 0
    capsys.readouterr()
    if command in MADE_BY.values():
        shutil.rmtree(command.split()[-1], ignore_errors=True)
    code = main(command.split())
    out, err = capsys.readouterr()
    assert COMMANDS[command] in (None, code), err
    for line in (out + err).split("\n"):
        assert line.isprintable(), repr(line)
        assert not line.startswith("jlora: all is well")
    assert len(err) < 20_000
    assert bool(err) == (code > 1)
