"""A head that is the embedding too: merged, transformers says what PEFT's live model did, whichever is adapted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.checkpoints import inspect, merge, unmerge
from jlora.cli import main
from jlora.disk import Checkpoint
from jlora.errors import DataError
from tests.interop.models import LLAMA, load_file, peft, quiet, randomized, torch, transformers

save_file = pytest.importorskip("safetensors.torch").save_file

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = torch.arange(7)[None]


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=37, n_positions=16, n_embd=12, n_layer=1, n_head=2)
    )


def gemma3() -> Any:
    """A model of images and text, whose names on the disk are others, and whose text has a configuration of its own."""
    text = LLAMA | {
        "num_hidden_layers": 1,
        "sliding_window": 8,
        "query_pre_attn_scalar": 6,
        "tie_word_embeddings": True,
    }
    image = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=image | {"image_size": 8, "patch_size": 4}, mm_tokens_per_image=1
    )
    return transformers.Gemma3ForConditionalGeneration(config)


FAMILIES = {
    "llama": (llama, "embed_tokens", "q_proj"),
    "gpt2": (gpt2, "wte", "c_attn"),
    "gemma3": (gemma3, "embed_tokens", "q_proj"),
}
# What is adapted and what is saved: {e} the embedding, {h} the head, {q} another; and whether the two come apart.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "embedding": ({"target_modules": ["{e}"]}, True),
    "head": ({"target_modules": ["lm_head"]}, True),
    "both": ({"target_modules": ["{e}", "lm_head"]}, True),
    "both alike": ({"target_modules": ["{e}"], "ensure_weight_tying": True}, False),
    "embedding saved": ({"target_modules": ["{q}"], "modules_to_save": ["{e}"]}, True),
    "head saved": ({"target_modules": ["{q}"], "modules_to_save": ["lm_head"]}, True),
    "both saved": ({"target_modules": ["{q}"], "modules_to_save": ["{e}", "lm_head"]}, True),
    "both saved alike": ({"target_modules": ["{q}"], "modules_to_save": ["{e}"], "ensure_weight_tying": True}, False),
    "neither": ({"target_modules": ["{q}"]}, False),
}


# PEFT does not know that GPT-2 is tied.
PAIRS = [(family, case) for family in FAMILIES for case in CASES if family != "gpt2" or "alike" not in case]


def adapted(tmp_path: Path, family: str, fields: dict[str, Any], shard: str = "6KB") -> Any:
    """The folders of a base and an adapter, and what PEFT's live model says."""
    make, embedding, other = FAMILIES[family]
    names = {"{e}": embedding, "{q}": other}
    fields = {
        key: [names.get(name, name) for name in value] if isinstance(value, list) else value
        for key, value in fields.items()
    }
    with quiet():
        torch.manual_seed(3)
        model = make().eval()
        model.save_pretrained(str(tmp_path / "base"), max_shard_size=shard)
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **fields))
        randomized(live, trained=True)
        live.save_pretrained(str(tmp_path / "adapter"))
        live = peft.PeftModel.from_pretrained(reloaded(make, tmp_path / "base"), str(tmp_path / "adapter")).eval()
    return tmp_path / "base", tmp_path / "adapter", says(live)


def reloaded(make: Any, folder: Path) -> Any:
    with quiet():
        kind = type(make())
        model, report = kind.from_pretrained(str(folder), output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def says(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(TOKENS).logits.numpy())


@pytest.mark.parametrize("shard", ["6KB", "1GB"])
@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_merged_it_says_what_the_live_model_did(family: str, case: str, shard: str, tmp_path: Path) -> None:
    fields, apart = CASES[case]
    base, adapter, wanted = adapted(tmp_path, family, fields, shard)
    before = says(reloaded(FAMILIES[family][0], base))
    done = merge(base, adapter, tmp_path / "out", keep_residual=True)
    assert np.abs(wanted - before).max() > 1e-3
    found = says(reloaded(FAMILIES[family][0], tmp_path / "out"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))
    assert any("has a tensor of its own now" in line for line in done.warnings) == apart
    unmerge(tmp_path / "out", adapter, tmp_path / "back")
    np.testing.assert_array_equal(says(reloaded(FAMILIES[family][0], tmp_path / "back")), before)
    if not apart:
        assert [path.name for path in sorted((tmp_path / "back").glob("*.safetensors"))] == [
            path.name for path in sorted(base.glob("*.safetensors"))
        ]


@pytest.mark.parametrize("adapted_one", ["embedding", "head"])
def test_tied_they_stay_one(adapted_one: str, tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, "llama", CASES[adapted_one][0])
    command = ["merge", str(base), str(adapter), "--out", str(tmp_path / "out"), "--tied", "--keep-residual"]
    assert main(command) == 0
    tensors, before = Checkpoint(tmp_path / "out"), Checkpoint(base)
    assert HEAD not in tensors.entries
    file = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_" if adapted_one == "embedding" else ""
    if prefix:
        delta = (file[f"{prefix}B"].double() @ file[f"{prefix}A"].double()).T
    else:
        delta = (
            file["base_model.model.lm_head.lora_B.weight"].double()
            @ file["base_model.model.lm_head.lora_A.weight"].double()
        )
    wanted = before.read(EMBEDDING) + 1.5 * delta.numpy()
    np.testing.assert_allclose(tensors.read(EMBEDDING), wanted, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    with pytest.raises(
        DataError, match=r"lm_head\.weight is model\.embed_tokens\.weight here, .* give tied \(--tied\)"
    ):
        unmerge(tmp_path / "out", adapter, tmp_path / "back")
    unmerge(tmp_path / "out", adapter, tmp_path / "back", tied=True)
    np.testing.assert_allclose(Checkpoint(tmp_path / "back").read(EMBEDDING), before.read(EMBEDDING), rtol=0, atol=1e-5)


def test_what_cannot_stay_one_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, "llama", CASES["both"][0], "1GB")
    with pytest.raises(DataError, match=r"lm_head\.weight and model\.embed_tokens\.weight: the adapters change both"):
        merge(base, adapter, tmp_path / "out", tied=True)
    with pytest.raises(DataError, match=r"give the folder with config\.json, where tying is switched off"):
        merge(base / "model.safetensors", adapter, tmp_path / "out")


def test_a_model_that_is_not_known_by_its_type(tmp_path: Path) -> None:
    """Its configuration says that it is tied; the names are the usual ones."""
    base, adapter, wanted = adapted(tmp_path, "llama", CASES["head"][0])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"model_type": "another", "architectures": ["AnotherForCausalLM"]})
    )
    merge(base, adapter, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {
        "model_type": "another",
        "architectures": ["AnotherForCausalLM"],
        "tie_word_embeddings": False,
    }
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    np.testing.assert_allclose(says(reloaded(llama, tmp_path / "out")), wanted, rtol=0, atol=1e-4)


def test_the_first_files_of_gpt2_lack_the_name_of_the_body(tmp_path: Path) -> None:
    base, adapter, wanted = adapted(tmp_path, "gpt2", CASES["embedding"][0], "1GB")
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(short, str(base / "model.safetensors"), {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (base / "config.json").write_text(json.dumps(config))
    merge(base, adapter, tmp_path / "out")
    np.testing.assert_allclose(says(reloaded(gpt2, tmp_path / "out")), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("first", ["out", "elsewhere"])
def test_a_run_that_goes_on_and_one_that_replaces(first: str, tmp_path: Path) -> None:
    base, adapter, wanted = adapted(tmp_path, "llama", CASES["both"][0])

    def stop(done: int, total: int) -> None:
        if done > 0.7 * total:
            raise InterruptedError

    with pytest.raises(DataError):
        merge(base, adapter, tmp_path / first, on_progress=stop, keep_residual=True)
    done = merge(base, adapter, tmp_path / "out", keep_residual=True)
    assert (done.resumed > 0) == (first == "out")
    assert {HEAD, EMBEDDING} == set(done.changed)
    merge(base, adapter, tmp_path / "out", keep_residual=True, force=True)
    np.testing.assert_allclose(says(reloaded(llama, tmp_path / "out")), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_inspect_finds_what_merge_does(case: str, tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, "llama", CASES[case][0])
    found = inspect(adapter, base=base)
    weight = np.linalg.norm(Checkpoint(base).read(EMBEDDING))
    sizes = {entry.path: entry for entry in found.entries}
    for name in {HEAD, EMBEDDING} & set(sizes):
        if sizes[name].relative is not None:
            np.testing.assert_allclose(sizes[name].relative, sizes[name].norm / weight, rtol=1e-5)
