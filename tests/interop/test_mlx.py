"""Adapters of mlx-lm: by hand against sums in float64, and against mlx-lm itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import LoraConfig, checkpoints, cli
from jlora.disk import Checkpoint, TensorFile, write_tensors
from jlora.errors import DataError
from jlora.interop.mlx import is_mlx_folder, read_mlx, write_mlx
from jlora.interop.peft import is_peft_folder, read_peft, write_peft
from tests.interop import real_mlx
from tests.interop.files import Rng

UP, EXPERTS, EMBED = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.switch_mlp.gate_proj", "model.embed_tokens"
SCALE = 2.5


def write_hand(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """A folder as mlx-lm writes one."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"fine_tune_type": "lora", "num_layers": 16, "model": "some/llama", "lr_schedule": None}
    data |= {"lora_parameters": {"rank": 3, "scale": SCALE, "dropout": 0.0}} | config
    (folder / "adapter_config.json").write_text(json.dumps(data, indent=4))
    with (folder / "adapters.safetensors").open("wb") as file:
        write_tensors(file, tensors)
    return folder


def normal(rng: Rng, *shape: int) -> Any:
    return rng.standard_normal(shape).astype("float32")


def made(rng: Rng) -> dict[str, Any]:
    return {
        f"{UP}.lora_a": normal(rng, 7, 3),
        f"{UP}.lora_b": normal(rng, 3, 11),
        f"{EXPERTS}.lora_a": normal(rng, 5, 3, 7),
        f"{EXPERTS}.lora_b": normal(rng, 5, 13, 3),
        f"{EMBED}.lora_a": normal(rng, 17, 3),
        f"{EMBED}.lora_b": normal(rng, 3, 7),
    }


def deltas(tensors: dict[str, Any], scale: float = SCALE) -> dict[str, Any]:
    """The update of each weight, in float64."""
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    return {
        f"{UP}.weight": scale * (wide[f"{UP}.lora_a"] @ wide[f"{UP}.lora_b"]).T,
        f"{EXPERTS}.weight": scale * np.einsum("eor,eri->eoi", wide[f"{EXPERTS}.lora_b"], wide[f"{EXPERTS}.lora_a"]),
        f"{EMBED}.weight": scale * wide[f"{EMBED}.lora_a"] @ wide[f"{EMBED}.lora_b"],
    }


def base_of(rng: Rng, folder: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> dict[str, Any]:
    folder.mkdir()
    tensors = {name: normal(rng, *shape) for name, shape in shapes.items()}
    with (folder / "model.safetensors").open("wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return tensors


SHAPES = {f"{UP}.weight": (11, 7), f"{EXPERTS}.weight": (5, 13, 7), f"{EMBED}.weight": (17, 7)}


@pytest.mark.parametrize("form", ["mlx", "own", "peft"])
def test_merge_adds_the_update_of_the_file_and_of_what_it_is_converted_to(form: str, tmp_path: Path, rng: Rng) -> None:
    tensors = made(rng)
    adapter = write_hand(tmp_path / "adapter", tensors)
    assert is_mlx_folder(adapter)
    base = base_of(rng, tmp_path / "base", SHAPES)
    if form != "mlx":
        checkpoints.convert(adapter, tmp_path / "converted", form)
        adapter = tmp_path / "converted"
        assert is_peft_folder(adapter) == (form == "peft")
        assert not is_mlx_folder(adapter)
    checkpoints.merge(tmp_path / "base", adapter, tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    for name, update in deltas(tensors).items():
        np.testing.assert_allclose(merged.read(name), base[name] + update, rtol=0, atol=2e-5, err_msg=name)


def test_a_file_is_the_same_after_a_way_through_each_format(tmp_path: Path, rng: Rng) -> None:
    tensors = made(rng)
    before = write_hand(tmp_path / "0", tensors)
    for number, form in enumerate(("peft", "own", "mlx"), 1):
        checkpoints.convert(before, tmp_path / str(number), form)
        before = tmp_path / str(number)
    with TensorFile(before / "adapters.safetensors") as file:
        assert file.entries.keys() == tensors.keys()
        for name, array in tensors.items():
            np.testing.assert_array_equal(file.read(name), array, err_msg=name)
    data = json.loads((before / "adapter_config.json").read_text())
    assert data["fine_tune_type"] == "lora"
    assert data["lora_parameters"] | {"keys": 0} == {"rank": 3, "scale": SCALE, "dropout": 0.0, "keys": 0}
    assert set(data["lora_parameters"]["keys"]) == {UP, EXPERTS, EMBED}


def test_dora_is_the_norm_of_the_sum_replaced(tmp_path: Path, rng: Rng) -> None:
    tensors = {f"{UP}.lora_a": normal(rng, 7, 3), f"{UP}.lora_b": normal(rng, 3, 11), f"{UP}.m": 1 + normal(rng, 11)}
    adapter = write_hand(tmp_path / "adapter", tensors, fine_tune_type="dora")
    base = base_of(rng, tmp_path / "base", {f"{UP}.weight": (11, 7)})
    checkpoints.merge(tmp_path / "base", adapter, tmp_path / "merged")
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    total = base[f"{UP}.weight"] + SCALE * (wide[f"{UP}.lora_a"] @ wide[f"{UP}.lora_b"]).T
    wanted = wide[f"{UP}.m"][:, None] * total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(Checkpoint(tmp_path / "merged").read(f"{UP}.weight"), wanted, rtol=0, atol=1e-5)
    checkpoints.convert(adapter, tmp_path / "again", "mlx")
    with TensorFile(tmp_path / "again" / "adapters.safetensors") as file:
        np.testing.assert_array_equal(file.read(f"{UP}.m"), tensors[f"{UP}.m"])
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["fine_tune_type"] == "dora"


def test_other_ranks_and_scalings_become_one(tmp_path: Path, rng: Rng) -> None:
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(4)]
    ranks, alphas = [2, 5, 2, 3], [4.0, 10.0, 7.0, 6.0]
    entries = {
        name: {"A": normal(rng, 7, rank), "B": normal(rng, rank, 11)} for name, rank in zip(names, ranks, strict=True)
    }
    config = LoraConfig(
        rank=2,
        alpha=4,
        rank_pattern=dict(zip(names, ranks, strict=True)),
        alpha_pattern=dict(zip(names, alphas, strict=True)),
        factorizations={"**": "oi"},
    )
    write_mlx(tmp_path, entries, config)
    found, read = read_mlx(tmp_path)
    data = json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]
    assert (data["rank"], data["scale"]) == (5, 2.0)
    for name, rank, alpha in zip(names, ranks, alphas, strict=True):
        a, b = (np.asarray(entries[name][part], np.float64) for part in "AB")
        wide_a, wide_b = (np.asarray(found[name][part], np.float64) for part in "AB")
        assert wide_a.shape == (7, 5)
        np.testing.assert_allclose(
            read.scaling_of(name) * wide_a @ wide_b, alpha / rank * a @ b, rtol=0, atol=1e-5, err_msg=name
        )


def test_inspect_resize_and_combine_take_it(tmp_path: Path, rng: Rng, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {name: array for name, array in made(rng).items() if UP in name}
    for name in ("one", "two"):
        write_hand(tmp_path / name, tensors)
    assert cli.main(["inspect", str(tmp_path / "one")]) == 0
    assert UP.replace(".", "/") in capsys.readouterr().out
    checkpoints.combine([tmp_path / "one", tmp_path / "two"], tmp_path / "both", method="cat")
    assert is_mlx_folder(tmp_path / "both")
    checkpoints.resize(tmp_path / "both", tmp_path / "small", 3)
    found, config = read_mlx(tmp_path / "small")
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    wanted = 2 * SCALE * (wide[f"{UP}.lora_a"] @ wide[f"{UP}.lora_b"]).T
    entry = {part: np.asarray(array, np.float64) for part, array in found[f"{UP}.weight"].items()}
    np.testing.assert_allclose(
        config.scaling_of(f"{UP}.weight") * (entry["A"] @ entry["B"]).T, wanted, rtol=0, atol=1e-4
    )


REFUSED = {
    "full": ({f"{UP}.weight": (11, 7)}, {"fine_tune_type": "full"}, "whole weights and no adapters; mlx_lm.fuse"),
    "kind": ({f"{UP}.lora_a": (7, 3)}, {"fine_tune_type": "other"}, "fine_tune_type = 'other': wanted lora or dora"),
    "alone": ({f"{UP}.lora_a": (7, 3)}, {}, "lora_a and lora_b are not both there"),
    "other": ({f"{UP}.weight": (7, 3)}, {}, "up_proj.weight: no lora_a, lora_b or m of a module"),
    "transposed": ({f"{UP}.lora_a": (3, 7), f"{UP}.lora_b": (11, 3)}, {}, r"wanted \(in, r\) and \(r, out\)"),
    "rank": ({f"{UP}.lora_a": (7, 2), f"{UP}.lora_b": (2, 11)}, {}, "rank 2, but lora_parameters.rank = 3"),
    "m": (
        {f"{UP}.lora_a": (7, 3), f"{UP}.lora_b": (3, 5), f"{UP}.m": (5,)},
        {},
        "a magnitude m, but fine_tune_type is",
    ),
    "no m": ({f"{UP}.lora_a": (7, 3), f"{UP}.lora_b": (3, 5)}, {"fine_tune_type": "dora"}, "has no magnitude m"),
    "scale": ({f"{UP}.lora_a": (7, 3)}, {"lora_parameters": {"rank": 3, "alpha": 4}}, "lora_parameters.scale = None"),
    "no parameters": ({f"{UP}.lora_a": (7, 3)}, {"lora_parameters": None}, "lora_parameters = None: wanted a mapping"),
    "gpt2": (
        {"model.h.0.attn.c_proj.lora_a": (7, 3), "model.h.0.attn.c_proj.lora_b": (3, 7)},
        {},
        "mlx-lm transposes the weights of GPT-2",
    ),
    "falcon": ({f"{UP}.lora_a": (7, 3)}, {"model": "mlx-community/Falcon-H1-0.5B"}, "scales the weights of Falcon-H1"),
    "embedding": (
        {f"{EMBED}.lora_a": (17, 3), f"{EMBED}.lora_b": (3, 7), f"{EMBED}.m": (17,)},
        {"fine_tune_type": "dora"},
        "DoRA of an embedding, whose norms mlx-lm takes token by token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_read_it_names(case: str, tmp_path: Path, rng: Rng) -> None:
    shapes, config, message = REFUSED[case]
    adapter = write_hand(tmp_path / "x", {name: normal(rng, *shape) for name, shape in shapes.items()}, **config)
    with pytest.raises(DataError, match=message):
        read_mlx(adapter)


def test_tensors_without_a_configuration_are_refused(tmp_path: Path, rng: Rng) -> None:
    adapter = write_hand(tmp_path / "x", made(rng))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(DataError, match=r"adapter_config\.json"):
        checkpoints.read_adapters(adapter)


def test_a_base_that_mlx_changes_is_refused_whatever_the_file_says(tmp_path: Path, rng: Rng) -> None:
    name = "model.layers.0.self_attn.q_proj"
    adapter = write_hand(tmp_path / "x", {f"{name}.lora_a": normal(rng, 7, 3), f"{name}.lora_b": normal(rng, 3, 7)})
    base_of(rng, tmp_path / "base", {f"{name}.weight": (7, 7)}, model_type="falcon_h1")
    checkpoints.convert(adapter, tmp_path / "own", "own")
    for given in (adapter, tmp_path / "own"):
        with pytest.raises(DataError, match="mlx-lm scales the weights of Falcon-H1"):
            checkpoints.merge(tmp_path / "base", given, tmp_path / "merged")


UNWRITABLE = {
    "value": ({"up.weight": {"value": (5, 7)}}, "oi", "a part value"),
    "Conv1D": ({"h.0.attn.c_attn.weight": {"A": (7, 2), "B": (2, 5)}}, "io", r"a weight \(in, out\)"),
    "convolution": ({"up.weight": {"A": (7, 3, 3, 2), "B": (2, 5)}}, "oiii", "conv of up.weight"),
    "one expert": ({"m.experts.3.up.weight": {"A": (7, 2), "B": (2, 5)}}, "oi", "a single expert"),
    "some DoRA": (
        {"up.weight": {"A": (7, 2), "B": (2, 5), "magnitude": (5,)}, "down.weight": {"A": (7, 2), "B": (2, 5)}},
        "oi",
        "linear without a magnitude beside DoRA",
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_mlx_has_no_place_for_is_not_written(case: str, tmp_path: Path, rng: Rng) -> None:
    shapes, roles, message = UNWRITABLE[case]
    entries = {path: {part: normal(rng, *shape) for part, shape in parts.items()} for path, parts in shapes.items()}
    with pytest.raises(DataError, match=message):
        write_mlx(tmp_path / "x", entries, LoraConfig(rank=2, factorizations={"**": roles}))
    assert not (tmp_path / "x").exists()


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path: Path, rng: Rng) -> None:
    config = LoraConfig(rank=2, factorizations={"**": "oi"})
    entry = {"A": normal(rng, 7, 2), "B": normal(rng, 2, 5)}
    write_peft(tmp_path, {"up.weight": entry}, config)
    write_mlx(tmp_path, {"up.weight": entry}, config)
    assert is_mlx_folder(tmp_path)
    write_mlx(tmp_path, {"down.weight": entry}, config)
    assert list(read_mlx(tmp_path)[0]) == ["down.weight"]
    write_peft(tmp_path, {"up.weight": entry}, config)
    assert not is_mlx_folder(tmp_path)
    assert list(read_peft(tmp_path)[0]) == ["up.weight"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith((".jlora-new", ".jlora-old"))]


# Against mlx-lm

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 23,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
CASES = {
    "lora": (LLAMA, "lora", [*KEYS, "model.embed_tokens", "lm_head"]),
    "dora": (LLAMA, "dora", KEYS),
    "experts": (MIXTRAL, "lora", ["self_attn.o_proj", "block_sparse_moe.switch_mlp.up_proj"]),
}


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What runs a command of `tests.interop.real_mlx` on the real mlx-lm."""
    target = tmp_path_factory.mktemp("mlx")
    if not real_mlx.install(target):
        pytest.skip("pip cannot install mlx-lm here")

    def run(*arguments: Any) -> None:
        command = [sys.executable, "-W", "ignore", real_mlx.__file__, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=target)
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_mlx_made_merges_to_what_mlx_computes(case: str, ask: Any, tmp_path: Path) -> None:
    settings, kind, keys = CASES[case]
    base, made_there = tmp_path / "base", tmp_path / "made"
    ask("base", json.dumps(settings), base)
    ask("make", base, made_there, kind, *keys)
    ask("logits", base, "-", tmp_path / "plain.npy")
    ask("logits", base, made_there, tmp_path / "wanted.npy")
    checkpoints.merge(base, made_there, tmp_path / "merged")
    ask("logits", tmp_path / "merged", "-", tmp_path / "merged.npy")
    checkpoints.convert(made_there, tmp_path / "peft", "peft")
    checkpoints.convert(tmp_path / "peft", tmp_path / "again", "mlx")
    ask("logits", base, tmp_path / "again", tmp_path / "again.npy")
    plain, wanted = np.load(tmp_path / "plain.npy"), np.load(tmp_path / "wanted.npy")
    assert np.abs(plain - wanted).max() > 0.1
    for name in ("merged", "again"):
        found = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.slow
def test_what_peft_made_is_in_mlx_what_peft_computes(ask: Any, tmp_path: Path) -> None:
    from tests.interop.models import peft, quiet, randomized, torch, transformers

    torch.manual_seed(5)
    with quiet():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
        randomized(model)
        model.save_pretrained(str(tmp_path / "base"))
        fields = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 11}}
        live = peft.get_peft_model(
            model, peft.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "v_proj", "embed_tokens"], **fields)
        ).eval()
        randomized(live, trained=True)
        live.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
        with torch.no_grad():
            wanted = live(torch.tensor(real_mlx.TOKENS)).logits.numpy()
    checkpoints.convert(tmp_path / "peft", tmp_path / "mlx", "mlx")
    ask("logits", tmp_path / "base", "-", tmp_path / "plain.npy")
    ask("logits", tmp_path / "base", tmp_path / "mlx", tmp_path / "found.npy")
    assert np.abs(np.load(tmp_path / "plain.npy") - wanted).max() > 0.1
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), wanted, rtol=0, atol=5e-5 * np.abs(wanted).max())
