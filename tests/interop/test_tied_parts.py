"""An embedding that several parts of a model share: merged, transformers says what PEFT's live model did."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.checkpoints import inspect, merge, unmerge
from jlora.disk import Checkpoint
from jlora.errors import DataError
from tests.interop.models import LLAMA, load_file, peft, quiet, randomized, torch, transformers

save_file = pytest.importorskip("safetensors.torch").save_file

SIZES = {"vocab_size": 37, "d_model": 12, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
HEADS = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
TOKENS = torch.arange(3, 10)[None]


def t5(**changes: Any) -> Any:
    sizes = {"d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 2, "relative_attention_num_buckets": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES | sizes | changes))


def t5_with_a_head() -> Any:
    """As T5 1.1 and Flan: the head is no embedding, and nothing is scaled before it."""
    return t5(tie_word_embeddings=False)


def switch() -> Any:
    """Its configuration can untie it, and would compute something else."""
    sizes = {"d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 2, "num_experts": 2, "num_sparse_encoder_layers": 0}
    sizes |= {"num_decoder_layers": 1, "num_sparse_decoder_layers": 0}
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**SIZES | sizes)
    )


def bart() -> Any:
    sizes = {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 16, "scale_embedding": True}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SIZES | HEADS | sizes))


def bert() -> Any:
    """The bias of its head is tied too."""
    sizes = {"vocab_size": 37, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
    )


PARTS = {
    "the one that all are": {"target_modules": ["shared"]},
    "of the encoder": {"target_modules": ["encoder.embed_tokens"]},
    "of both": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "all, each its own": {"target_modules": ["shared", "embed_tokens", "lm_head"]},
    "of the decoder, saved": {"target_modules": ["q_proj", "q"], "modules_to_save": ["decoder.embed_tokens"]},
    "neither": {"target_modules": ["q_proj", "q"]},
}
OF_BERT = {
    "embedding": {"target_modules": ["word_embeddings"]},
    "head": {"target_modules": ["decoder"]},
    "both": {"target_modules": ["word_embeddings", "decoder"]},
    "neither": {"target_modules": ["query"]},
}
CASES = [
    *((make, fields) for make in (t5, bart) for fields in PARTS.values()),
    *((t5_with_a_head, PARTS[name]) for name in ("the one that all are", "of both", "head")),
    *((switch, PARTS[name]) for name in ("of the encoder", "head")),
    *((bert, fields) for fields in OF_BERT.values()),
]


def says(model: Any) -> np.ndarray:
    given = {"decoder_input_ids": TOKENS.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), quiet():
        return np.asarray(model(input_ids=TOKENS, **given).logits.numpy())


def reloaded(make: Any, folder: Path) -> Any:
    with quiet():
        kind = type(make())
        model, report = kind.from_pretrained(str(folder), output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def adapted(tmp_path: Path, make: Any, fields: dict[str, Any], shard: str = "1GB") -> Any:
    with quiet():
        torch.manual_seed(3)
        model = make().eval()
        randomized(model)
        model.save_pretrained(str(tmp_path / "base"), max_shard_size=shard)
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **fields))
        randomized(live, trained=True)
        live.save_pretrained(str(tmp_path / "adapter"))
        live = peft.PeftModel.from_pretrained(reloaded(make, tmp_path / "base"), str(tmp_path / "adapter")).eval()
    return tmp_path / "base", tmp_path / "adapter", says(live)


@pytest.mark.parametrize("shard", ["3KB", "1GB"])
@pytest.mark.parametrize(("make", "fields"), CASES)
def test_merged_it_says_what_the_live_model_did(make: Any, fields: dict[str, Any], shard: str, tmp_path: Path) -> None:
    base, adapter, wanted = adapted(tmp_path, make, fields, shard)
    before = says(reloaded(make, base))
    if fields is not PARTS["the one that all are"]:  # which the parts do not ask
        assert np.abs(wanted - before).max() > 1e-3
    merge(base, adapter, tmp_path / "out", keep_residual=True)
    found = says(reloaded(make, tmp_path / "out"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))
    assert inspect(adapter, base=base).entries
    unmerge(tmp_path / "out", adapter, tmp_path / "back")
    np.testing.assert_array_equal(says(reloaded(make, tmp_path / "back")), before)


def test_what_the_report_and_the_configuration_say(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, t5, PARTS["head"])
    done = merge(base, adapter, tmp_path / "out")
    names = "encoder.embed_tokens.weight, decoder.embed_tokens.weight, lm_head.weight"
    assert any(f"{names} was shared.weight" in line and "before 5 makes them" in line for line in done.warnings)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    merge(base, adapter, tmp_path / "tied", tied=True, keep_residual=True)  # PEFT saved the head as a whole too
    assert Checkpoint(tmp_path / "tied").entries.keys() == Checkpoint(base).entries.keys()
    with pytest.raises(DataError, match=r"lm_head\.weight is shared\.weight here, .* give tied \(--tied\)"):
        unmerge(tmp_path / "tied", adapter, tmp_path / "back")
    unmerge(tmp_path / "tied", adapter, tmp_path / "back", tied=True)


def test_several_that_change_in_other_ways_cannot_stay_one(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, bart, PARTS["all, each its own"])
    with pytest.raises(DataError, match=r"lm_head\.weight and .*: the adapters change both, which cannot stay one"):
        merge(base, adapter, tmp_path / "out", tied=True)
    merge(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_the_checkpoint_has_twice(tmp_path: Path) -> None:
    """Older programs tie by config.json alone, which would lose what makes the two differ."""

    def make() -> Any:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))

    base, adapter, wanted = adapted(tmp_path, make, {"target_modules": ["lm_head"]})
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, str(base / "model.safetensors"), {"format": "pt"})
    merge(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(says(reloaded(make, tmp_path / "out")), wanted, rtol=0, atol=2e-5)
    merge(base, adapter, tmp_path / "tied", tied=True)
    both = Checkpoint(tmp_path / "tied")
    np.testing.assert_array_equal(both.read("lm_head.weight"), both.read("model.embed_tokens.weight"))
    assert (both.read("lm_head.weight") != Checkpoint(base).read("lm_head.weight")).any()
