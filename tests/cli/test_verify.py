"""`jlora verify` from the command line: tables, exit codes, prompts, engines and manifests."""

import json

import jax
import numpy as np
import pytest

import jlora
from jlora import LoraConfig, cli
from jlora.models import init_params, parse_config, write_adapter
from tests.models.folders import LLAMA, tensors_of, write_folder

MODEL = LLAMA | {"vocab_size": 431}  # as many as the tokenizer below has, and more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter of rank 17, and one whose B is zero."""
    top = tmp_path_factory.mktemp("verify")
    write_folder(top / "base", MODEL, tensors_of(MODEL))
    model = parse_config(MODEL)
    config = LoraConfig(
        rank=4, target_modules=("**/q_proj/weight", "**/v_proj/weight"), factorizations={"model/**": "boi"}
    )
    fresh = jlora.init_lora(jax.random.key(1), init_params(jax.random.key(0), model), config)
    write_adapter(top / "zero", fresh, config, model)
    trained = jax.tree.map(lambda part: part + 0.1, fresh)
    write_adapter(top / "adapter", trained, config, model)
    return top


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def called(*words):
        code = cli.main(["verify", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return called


def test_the_table(run):
    code, out, err = run("base", "adapter")
    assert (code, err) == (0, "")
    assert "model.layers.*.self_attn.q_proj.weight   3 of 3  12 x 12     4" in out
    (logits,) = (line for line in out.splitlines() if line.startswith("logits"))
    assert " ok " in logits
    assert "32 tokens" in logits
    assert "vLLM 0.33.0" in out


def test_a_b_of_zeros(run):
    code, out, _ = run("base", "zero", "--json")
    said = json.loads(out)
    assert (code, said["exit_code"], said["is_right"]) == (1, 1, False)
    wrong = {check["name"]: check["problems"] for check in said["checks"] if check["problems"]}
    assert wrong.keys() == {"numbers", "logits"}
    assert wrong["logits"] == ["the adapters change the logits by 0.0e+00 of the largest: nothing but rounding"]


def test_a_prompt(run, folder):
    pytest.importorskip("tokenizers")
    code, _, err = run("base", "adapter", "--prompt", "The capital of France")
    assert code == 2
    assert "tokenizer" in err
    from tests.text.make import write_folder as write_tokenizer

    write_tokenizer(folder / "base", template=None)
    code, out, _ = run("base", "adapter", "--prompt", "The capital of France", "--json")
    found = next(check["found"] for check in json.loads(out)["checks"] if check["name"] == "logits")
    assert code == 0
    assert not found.endswith("32 tokens")
    code, _, err = run("base", "adapter", "--prompt", "x" * 300)
    assert code == 2
    assert "wanted 1 to 64" in err


def test_engines_count_where_they_are_asked_for(run, folder):
    told = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "rslora").mkdir(exist_ok=True)
    (folder / "rslora" / "adapter_config.json").write_text(json.dumps(told | {"use_rslora": True}))
    tensors = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    (folder / "rslora" / "adapter_model.safetensors").write_bytes(tensors)
    assert run("base", "rslora", "--files-only")[0] == 0
    assert run("base", "rslora", "--files-only", "--engine", "vllm", "--engine", "peft")[0] == 0
    code, out, _ = run("base", "rslora", "--files-only", "--engine", "vllm", "--engine", "sglang")
    assert code == 1
    assert "lora_alpha = " in out


def test_a_manifest_is_written_and_held_to(run, folder, tmp_path):
    sent = tmp_path / "sent.json"
    code, out, _ = run("base", "zero", "--files-only", "--write-manifest", str(sent))
    assert code == 1
    assert "was not written" in out
    assert not sent.exists()
    code, out, _ = run("base", "adapter", "--files-only", "--write-manifest", str(sent), "--json")
    assert (code, json.loads(out)["manifest"]) == (0, str(sent))
    assert run("base", "adapter", "--files-only", "--manifest", str(sent))[0] == 0
    code, out, _ = run("base", "zero", "--files-only", "--manifest", str(sent))
    assert code == 1
    assert "lora_A.weight: is not as it was sent" in out


def test_a_base_that_is_not_known(run, folder, rng):
    other = LLAMA | {"model_type": "unheard"}
    write_folder(folder / "unheard", other, tensors_of(other))
    code, out, _ = run("unheard", "adapter")
    assert code == 0
    assert "unheard" in out


def test_own_format_and_engines(run, folder, rng):
    entry = {"A": rng.normal(size=(12, 2)).astype(np.float32), "B": rng.normal(size=(2, 4)).astype(np.float32)}
    paths = {f"model/layers/{layer}/self_attn/v_proj/weight": entry for layer in range(3)}
    jlora.save_adapters(folder / "own", paths, LoraConfig(rank=2, factorizations={"**": "oi"}))
    code, out, _ = run("base", "own")
    assert code == 0
    assert "PEFT's format: jlora convert --to peft" in out
    code, _, err = run("base", "own", "--files-only", "--engine", "vllm")
    assert code == 2
    assert "convert --to peft" in err
    code, _, err = run("base", "own", "--files-only", "--manifest", "x.json")
    assert code == 2
    assert "a manifest is of PEFT's format" in err
